"""torchrun's environment becomes a world of ranks, which exchange tensors and fail together.

One process a GPU (or a share of a CPU's cores), started by torchrun or by whatever sets the same variables. Without
them the world has one rank, and everything here does nothing.

Shapes: B images of this rank, G images of the whole batch.
"""

import os
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from equipoise.base.errors import (
    LostRankError,
    SaidError,
    SharedError,
    Stopped,
    UserError,
    in_words,
    out_of_memory,
    reason,
)

Made = TypeVar("Made")

# How long ranks wait for one that is alive but does not come: rank 0 may save or open data for minutes. The end of a
# process is noticed at once, since its connections close.
_PATIENCE = timedelta(minutes=20)


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`, and `local_rank` of the `local_size` ranks on this host. `launch`: torchrun's name for
    this launch, the same after a restart. `restarted`: torchrun has started this process anew after a failure."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launch: str = ""
    restarted: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The rows of a batch of `rows` that this rank computes: contiguous, each row on one rank. A rank has at least
        two, since BatchNorm cannot normalise one; where there are too few for that, the last ranks have none."""
        ranks = max(1, min(self.size, rows // 2))
        first, end = (min(rank, ranks) * rows // ranks for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    def first_makes(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes, on every rank. Its UserError or OSError becomes a SharedError of all ranks."""
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
        """What this rank makes, once every rank has. The UserError or OSError of one rank becomes a SharedError of all
        ranks that names it; where one was stopped, all are."""
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
        """The values of all ranks in the order of the work, of which rank r did the parts r, r + size, ..."""
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
        """`[G, ...]` the rows of every rank, in the order of the batch of `batch` rows.

        Each rank may use the result differently: a row's gradient is the sum of the gradients on all ranks.
        """
        if self.size == 1:
            return rows_BX
        shares = [World(rank, self.size).share(batch) for rank in range(self.size)]
        return _GatherRows.apply(rows_BX, self.rank, tuple(share.stop - share.start for share in shares))  # pyright: ignore[reportReturnType]

    def first_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm's averages), as DataParallel keeps those of its first GPU."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@contextmanager
def join() -> Generator[World]:
    """The world of this process, joined to its other ranks for the time of the context.

    nccl exchanges tensors on GPUs, gloo all others, and all tensors where there are more ranks than GPUs. Raises
    UserError where the other ranks cannot be reached, and for an error of the user's in the context; LostRankError
    where an exchange with the others failed; SaidError for either where another rank of this host has said it.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise UserError(
                "torch.distributed has a process group already; start the processes with torchrun and let equipoise "
                "make it"
            )
        yield ALONE
        return
    world = _world_of_environment()
    if world.size == 1:
        yield world
        return
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        store = _store_of_this_start(store, rank, size)
        # nccl refuses ranks that share a GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world.local_size else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        why = reason(error, library=True, otherwise="torch does not say why")
        raise UserError(
            f"rank {world.rank} could not join the other {world.size - 1} ranks ({why}); start all with torchrun"
        ) from None
    try:
        yield world
        dist.barrier()  # a rank that ends early would fail the exchanges of the others
    except (SharedError, Stopped):  # all ranks raise it
        dist.destroy_process_group()  # else its threads may abort the process when Python ends
        raise
    except Exception as error:
        failure = _said_once(error, world, store)
        if failure is error:
            raise
        raise failure from None
    dist.destroy_process_group()


def _world_of_environment() -> World:
    def number(name: str, default: int = 0) -> int:
        return int(os.environ.get(name, default))

    return World(
        rank=number("RANK"),
        size=number("WORLD_SIZE", 1),
        local_rank=number("LOCAL_RANK"),
        local_size=number("LOCAL_WORLD_SIZE", 1),
        launch=os.environ.get("TORCHELASTIC_RUN_ID", ""),
        restarted=number("TORCHELASTIC_RESTART_COUNT") > 0,
    )


def _store_of_this_start(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of torchrun's store that exactly these processes share. The store outlives a restart, and may hold the
    addresses of processes that have ended."""
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("equipoise/first", own)
        others = [store.get(f"equipoise/{own}/{other}").decode() for other in range(1, size)]  # waits for them
        store.set(f"equipoise/{own}/all", " ".join(others))
        return dist.PrefixStore(own, store)
    while True:
        first = store.get("equipoise/first").decode()  # may still be that of the start before
        store.set(f"equipoise/{first}/{rank}", own)
        if store.check([f"equipoise/{first}/all"]) and own in store.get(f"equipoise/{first}/all").decode():
            return dist.PrefixStore(first, store)
        time.sleep(0.02)


def lost_rank(error: Exception) -> LostRankError | None:
    """The error of a failed exchange with the other ranks as one line; None for any other error."""
    if isinstance(error, LostRankError):
        return error
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return None
    why = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]  # without the place in gloo's source
    return LostRankError(f"an exchange with the other ranks failed ({why}): torchrun names the rank that ended first")


def _said_once(error: Exception, world: World, store: dist.Store) -> Exception:
    """What this rank raises for an error that the others do not share. On each host the first rank that fails speaks.
    Where it fails because another rank did, it says that rank's error, which is in the store."""
    lost = lost_rank(error)
    bug = lost is None and not isinstance(error, (UserError, OSError)) and not out_of_memory(error)
    text = f"rank {world.rank}: {repr(error)[:200] if bug else in_words(lost or error)}"
    try:
        speaks = store.add(f"failures on the host of rank {world.rank - world.local_rank}", 1) == 1
        if lost is None:
            store.set("cause", text)
        elif store.check(["cause"]):
            text = store.get("cause").decode()
    except RuntimeError:  # torchrun, which keeps the store, has ended
        speaks = world.local_rank == 0
    if bug:
        get_error_handler().record_exception(error)  # for torchrun's summary
        return error
    failure = (LostRankError if lost else UserError)(text) if speaks else SaidError(text)
    failure.code = (lost or failure).code
    return failure


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
