"""torchrun's environment becomes a world of ranks, which exchange tensors and notice when one of them is lost.

One process a GPU (or a share of a CPU's cores), started by torchrun or by whatever sets the same variables. Without
them the world has one rank, and everything here does nothing.

Shapes: B images of this rank, G images of the whole batch.
"""

import hashlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from equipoise.base.errors import SaidError, SharedError, Stopped, UserError, in_words, out_of_memory, reason

Made = TypeVar("Made")

LOST = 3  # exit code of the ranks that another one has left
_BEAT = 1.0  # seconds between two signs of life
_SILENCE = 12.0  # seconds without one after which a rank is taken for lost; torchrun kills what is left after 30


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`, and `local_rank` of the `local_size` ranks on this host. `launch`: what torchrun calls
    this launch, the same after a restart. `restarted`: torchrun has started it anew."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launch: str = ""
    restarted: bool = False
    _watch: "list[_Watch]" = field(default_factory=list["_Watch"], repr=False, compare=False)
    _session: list[str] = field(default_factory=list[str], repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The rows of a batch that are this rank's: contiguous, and none counted twice. A rank has at least two, since
        BatchNorm cannot normalise one; where there are too few for that, the last ranks have none."""
        ranks = max(1, min(self.size, rows // 2))
        first, end = (min(rank, ranks) * rows // ranks for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    def first_makes(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes, on every rank. What it raises for the user becomes a SharedError of all."""
        if self.size == 1:
            return make()
        made: list[Any] = [None]
        if self.is_first:
            try:
                made = [make()]
            except (UserError, OSError) as error:
                made = [SharedError(in_words(error))]
        dist.broadcast_object_list(made, src=0)
        if isinstance(made[0], SharedError):
            raise made[0]
        return made[0]

    def each_makes(self, make: Callable[[], Made]) -> Made:
        """What this rank makes, once every rank has. What one raises for the user becomes a SharedError of all that
        names it; where one was stopped, all are."""
        if self.size == 1:
            return make()
        made, said, stopped = None, None, None
        try:
            made = make()
        except (UserError, OSError) as error:
            said = in_words(error)
        except Stopped as error:
            stopped = error
        sayings, stops = zip(*self.gather_objects((said, stopped)), strict=True)
        wrong = [rank for rank, text in enumerate(sayings) if text]
        if wrong:
            whose = "" if len(set(sayings)) == 1 else f"rank {wrong[0]}: "
            raise SharedError(f"{whose}{sayings[wrong[0]]}")
        if any(stops):
            raise next(filter(None, stops))
        return made  # pyright: ignore[reportReturnType]

    def gather_in_turn(self, values: Sequence[Made]) -> list[Made]:
        """All ranks' values in the order of the work, of which rank r did the parts r, r + size, ..."""
        of_ranks: list[Sequence[Made]] = self.gather_objects(values)
        return [of_ranks[part % self.size][part // self.size] for part in range(sum(map(len, of_ranks)))]

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, rows_BX: Tensor, batch: int) -> Tensor:
        """`[G, ...]` the rows of every rank, in the order of the batch of `batch` rows; the gradient flows back.

        Each rank may use the result differently: the gradients of all uses are summed where a row came from.
        """
        if self.size == 1:
            return rows_BX
        shares = [World(rank, self.size).share(batch) for rank in range(self.size)]
        return _GatherRows.apply(rows_BX, self.rank, tuple(share.stop - share.start for share in shares))  # pyright: ignore[reportReturnType]

    def first_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0 (averages of BatchNorm), as DataParallel keeps those of its first
        GPU."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def session(self, store: dist.Store) -> str:
        """A name that exactly these processes share. torchrun's store outlives them: what is in it may be of ranks that
        were there before a restart.

        Rank 0 writes down who is there until each of these has read its own name in the list.
        """
        own = uuid.uuid4().hex
        store.set(f"equipoise/here/{self.rank}", own)
        names = [f"equipoise/here/{rank}" for rank in range(self.size)]
        session = ""
        while not self._session:
            if self.is_first:
                session = " ".join(name.decode() for name in store.multi_get(names))
                store.set("equipoise/session", session)
            else:
                session = store.get("equipoise/session").decode()
            if session.split()[self.rank : self.rank + 1] == [own]:
                store.set(f"equipoise/read/{self.rank}", session)
                if self.is_first:
                    read = store.multi_get([name.replace("here", "read") for name in names])
                    if {name.decode() for name in read} == {session}:
                        store.set("equipoise/begin", session)
                if store.check(["equipoise/begin"]) and store.get("equipoise/begin").decode() == session:
                    self._session.append(hashlib.sha256(session.encode()).hexdigest()[:16])
            time.sleep(0.02)
        return self._session[0]

    def watch(self) -> None:
        """From now on, end this process within seconds of another rank's end."""
        self._watch.append(_Watch(self, self._session[0]))

    def end_watch(self) -> None:
        """Stop looking after the others."""
        for watch in self._watch:
            watch.stop()

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def fail(self, message: str, says_it: bool) -> bool:
        """Tell the other ranks why this one ends, and whether it says so itself in a line: which it should where this
        is True, and not where another rank of this host has spoken."""
        return all(watch.tell(f"rank {self.rank}: {message}", says_it) for watch in self._watch)

    def when_told_to_end(self, leave: Callable[[], None]) -> None:
        """What this process has to do before it ends because another rank had an error of the user's."""
        for watch in self._watch:
            watch.leave = leave

    def await_end(self, error: Exception) -> None:
        """If it was an exchange that failed: give the watch the time to find out why, to say so, and to end this
        process."""
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun has seen it too, but does not say which rank
            time.sleep(_SILENCE + 5 * _BEAT)


ALONE = World()


@contextmanager
def join() -> Generator[World]:
    """The world of this process, joined to its other ranks for the time of the context.

    nccl moves what is on GPUs, gloo the rest, and all of it where there are more ranks than GPUs. Raises UserError
    where the others cannot be reached.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise UserError(
                "torch.distributed has a process group already; start the processes with torchrun and let equipoise "
                "make it"
            )
        yield ALONE
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if size == 1:
        yield World(launch=launch, restarted=restarted)
        return
    environment = {name: os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if absent := [name for name, value in environment.items() if not value]:
        raise UserError(f"WORLD_SIZE is {size}, but {absent[0]} is not set; start several processes with torchrun")
    world = World(
        rank=int(environment["RANK"]),
        size=size,
        local_rank=int(environment["LOCAL_RANK"]),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        launch=launch,
        restarted=restarted,
    )
    try:
        store, rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(world.session(store), store)
        # nccl refuses ranks that share a GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world.local_size else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        world.watch()
    except (dist.DistError, RuntimeError, ValueError) as error:
        place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        why = reason(error, library=True, otherwise="torch does not say why")
        raise UserError(f"rank {world.rank} could not join the other {size - 1} ranks at {place} ({why})") from None
    try:
        yield world
        dist.barrier()  # nobody leaves before all are done: a rank that ends early would be taken for lost
        dist.destroy_process_group()
    except (SharedError, Stopped):  # of all ranks: none has anything to tell the others
        dist.destroy_process_group()  # else its threads may abort the process when Python ends
        raise
    except Exception as error:
        if isinstance(error, (UserError, OSError)) or out_of_memory(error):
            # The memory of several GPUs ends in the same step.
            kind = UserError if world.fail(in_words(error), says_it=True) else SaidError
            raise kind(f"rank {world.rank}: {in_words(error)}") from None
        world.await_end(error)
        world.fail(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}", says_it=False)
        raise
    finally:
        world.end_watch()


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, of which each may have another number. Backward: the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, rows_BX: Tensor, rank: int, sizes: Sequence[int]) -> Tensor:
        ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
        longest = max(sizes)
        padded = F.pad(rows_BX.flatten(1), (0, 0, 0, longest - len(rows_BX))).contiguous()
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        rows_GX = torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
        return rows_GX.view(-1, *rows_BX.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient_GX = gradients[0].clone(memory_format=torch.contiguous_format)  # another use may have the same one
        dist.all_reduce(gradient_GX)
        return gradient_GX[ctx.start : ctx.start + ctx.size], None, None


# ---------------------------------------------------------------------------------------------- lost ranks


class _Watch:
    """Signs of life in torchrun's store, over a connection of its own, and what follows when one stays away.

    Each rank looks after the next one and tells all what it finds, so that the store's work grows with the number of
    ranks and not with its square. A second thread looks at the clock: the first may hang in a cut connection. Neither
    waits for the main thread, which may hang in an exchange with the rank that is lost.
    """

    def __init__(self, world: World, session: str) -> None:
        self._place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
        )
        self._store = dist.PrefixStore(f"equipoise/{session}", client)
        self._world = world
        self._host = socket.gethostname()
        self._next = (world.rank + 1) % world.size
        self._stopped = threading.Event()
        self._contact = self._next_seen = time.monotonic()
        self.leave: Callable[[], None] = lambda: None
        self._store.set(f"host of {world.rank}", self._host)
        self._store.set(f"beat/{world.rank}", "0")
        dist.barrier()
        self._beating, looking = (threading.Thread(target=work, daemon=True) for work in (self._beat, self._look))
        self._beating.start()
        looking.start()

    def stop(self) -> None:
        """Python's end must not find the first thread in an exchange with the store: the process would be aborted."""
        self._stopped.set()
        if self._beating is not threading.current_thread():
            self._beating.join(_SILENCE)

    def tell(self, message: str, said: bool) -> bool:
        """Tell all ranks why they must end. `said`: nobody else on this host needs to say it. Returns whether nobody
        had."""
        self.stop()
        try:
            first = self._store.add(f"said on {self._host}", int(said)) <= 1
            self._store.set("end", f"told {message}")
        except RuntimeError:
            return True  # no connection: they will find out by the silence
        return first

    def _beat(self) -> None:
        beats, last = 0, b""
        while not self._stopped.is_set():
            beats += 1
            try:
                self._store.set(f"beat/{self._world.rank}", str(beats))
                seen = self._store.get(f"beat/{self._next}")
                if self._store.check(["end"]):
                    how, _, message = self._store.get("end").decode().partition(" ")
                    if how == "told":
                        self.leave()
                    self._end(message)
                now = time.monotonic()
                # After a pause of this rank's own, nobody's silence is known.
                if seen != last or now - self._contact > 5 * _BEAT:
                    last, self._next_seen = seen, now
                self._contact = now
                if now - self._next_seen > _SILENCE:
                    host = self._store.get(f"host of {self._next}").decode()
                    message = f"rank {self._next} (on {host}) is lost: no sign of life for {_SILENCE:.0f} s"
                    self._store.set("end", f"lost {message}")
                    self._end(message)
            except RuntimeError:
                pass  # no connection: _look counts the seconds
            self._stopped.wait(_BEAT)

    def _look(self) -> None:
        previous = time.monotonic()
        while not self._stopped.wait(_BEAT):
            now = time.monotonic()
            if now - previous > 5 * _BEAT:
                self._contact = now  # the machine was asleep
            previous = now
            if now - self._contact > _SILENCE + 3 * _BEAT:
                self._end(f"rank {self._world.rank} has lost the others: {self._place} does not answer", cut_off=True)

    def _end(self, message: str, cut_off: bool = False) -> NoReturn:
        """End this process. The first rank of each host that comes here speaks, unless the cause has spoken itself."""
        speaks = self._world.local_rank == 0 if cut_off else self._store.add(f"said on {self._host}", 1) == 1
        if speaks:
            print(f"equipoise: {message}; all ranks stop", file=sys.stderr, flush=True)
        os._exit(LOST)
