"""torchrun's environment becomes a world of ranks, which exchange tensors and fail together. Without it the world has
one rank, and everything here does nothing. Shapes: B images of this rank, G images of the whole batch."""

import hashlib
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
from torch import Tensor, nn

from equipoise.base.errors import LostRankError, SharedError, Stopped, UserError, in_words, out_of_memory, reason

Made = TypeVar("Made")
# For a rank that is alive but does not come: rank 0 may save for minutes. The end of a process is noticed at once.
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

    def each_makes(self, make: Callable[[], Made]) -> Made:
        """What this rank makes, once every rank has. The UserError or OSError of one rank becomes a SharedError of all
        ranks that names it; where one was stopped, all are."""
        if self.size == 1:
            return make()
        made = failure = None
        try:
            made = make()
        except (UserError, OSError) as error:
            failure = SharedError(f"rank {self.rank}: {in_words(error)}")
        except Stopped as error:
            failure = error
        for failed in filter(None, self.gather_objects(failure)):
            raise failed
        return made  # pyright: ignore[reportReturnType]

    def first_makes(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes, on every rank. Its errors become those of all ranks, as in `each_makes`."""
        made: list[Any] = [self.each_makes(lambda: make() if self.is_first else None)]
        if self.size > 1:
            dist.broadcast_object_list(made, src=0)  # a checkpoint is too large to be gathered from all
        return made[0]

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
        """`[G, ...]` the rows of every rank, in the order of the batch of `batch` rows. Each rank may use the result
        differently: a row's gradient is the sum of the gradients on all ranks."""
        if self.size == 1:
            return rows_BX
        rows_GX = rows_BX.new_zeros(batch, *rows_BX.shape[1:])
        rows_GX[self.share(batch)] = rows_BX
        return sum_over_ranks(rows_GX)

    def first_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm's averages), as DataParallel keeps those of its first GPU."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


ALONE = World()


@contextmanager
def join() -> Generator[World]:
    """The world of this process, joined to its other ranks for the time of the context. Raises UserError, with the
    number of the rank, where they cannot be reached and for an error of the user's in the context; LostRankError where
    an exchange with them failed."""
    get = os.environ.get
    ranks = int(get("RANK", 0)), int(get("WORLD_SIZE", 1)), int(get("LOCAL_RANK", 0)), int(get("LOCAL_WORLD_SIZE", 1))
    world = World(*ranks, get("TORCHELASTIC_RUN_ID", ""), get("TORCHELASTIC_RESTART_COUNT", "0") != "0")
    if world.size == 1:
        yield world
        return
    try:
        store = _store_of_this_start()
        # nccl refuses ranks that share a GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world.local_size else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        why = reason(error, library=True, otherwise="torch does not say why")
        raise UserError(f"rank {world.rank} could not join the others ({why}); start all with torchrun") from None
    try:
        yield world
        dist.barrier()  # a rank that ends early would fail the exchanges of the others
    except Exception as error:
        if lost := lost_rank(error):
            raise lost from None
        if isinstance(error, SharedError | Stopped):  # all ranks raise it
            dist.destroy_process_group()  # else its threads may abort the process when Python ends
        elif isinstance(error, UserError | OSError) or out_of_memory(error):
            raise UserError(f"rank {world.rank}: {in_words(error)}") from None
        raise
    dist.destroy_process_group()


def _store_of_this_start() -> dist.Store:
    """The part of torchrun's store that exactly these processes share. The store outlives a restart, and may hold the
    addresses of processes that have ended; hosts may count their restarts differently."""
    store, rank, size = next(dist.rendezvous("env://"))
    store.set(f"equipoise/id/{rank}", uuid.uuid4().hex)
    until = time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < until:  # all ranks have seen the same ranks
        ids = b"".join(store.multi_get([f"equipoise/id/{other}" for other in range(size)]))
        seen = hashlib.sha256(ids).hexdigest()
        store.set(f"equipoise/seen/{rank}", seen)
        if set(store.multi_get([f"equipoise/seen/{other}" for other in range(size)])) == {seen.encode()}:
            return dist.PrefixStore(seen, store)
        time.sleep(0.05)
    raise RuntimeError("they did not come")


def lost_rank(error: Exception) -> LostRankError | None:
    """The error of a failed exchange with the other ranks as one line; None for any other error."""
    if isinstance(error, LostRankError):
        return error
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return None
    why = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]  # without the place in gloo's source
    return LostRankError(f"an exchange with the other ranks failed ({why}): one has ended; it or torchrun says why")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)  # of a gradient, another use may have the same one
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum_over_ranks(gradient)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over several ranks. Its gradient is the sum of the gradients on all ranks."""
    return _Sum.apply(x)  # pyright: ignore[reportReturnType]
