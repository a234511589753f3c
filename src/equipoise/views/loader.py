"""A list and its views become batches, in an order that depends on (seed, epoch) alone.

Worker processes make the batches ahead of the step, so that a GPU does not wait for them: photographs are decoded
there, small images lie in memory. Any number of workers gives the same numbers, because every random number comes from
(seed, epoch, index).

With `skip`, an image that cannot be read is no error: in training another of its class stands in for it
(`pixels.stand_ins`), in evaluation it is left out, and `bad` says which they were.
"""

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from equipoise.base.errors import UserError, out_of_memory
from equipoise.base.world import ALONE, World
from equipoise.data.decode import (
    BadImageError,
    Pixels,
    decode,
    decode_all,
    decode_another,
    no_image_left,
    stand_ins,
    usable_cores,
)
from equipoise.data.images import ImageList
from equipoise.views.draws import permutation
from equipoise.views.views import ViewSettings, evaluation_view, photo_views, small_views

Indices = npt.NDArray[np.int64]

_SECONDS_AFTER_SIGTERM = 60
_NOTHING = -1  # the index that no image has
# Processes that make the views of small images: on a GPU six at most, since a step of ResNet-32 takes 4 ms there; on a
# CPU one is many times faster than the step.
_SMALL_WORKERS = {"cuda": 6}
_LESS_MEMORY = "take fewer of them (--workers) or smaller images"


@dataclass(frozen=True)
class Batch:
    """`images_VB3SS`: uint8, of this rank; evaluation batches have one view. `labels_G`: of the whole batch, of which
    `rows` are this rank's. A rank without rows has images all the same, which do not count. All on the device. `bad`:
    by index, those of these images that could not be read."""

    images_VB3SS: Tensor
    labels_G: Tensor
    rows: slice
    bad: Mapping[int, BadImageError] = field(default_factory=dict[int, BadImageError])

    def pin_memory(self) -> "Batch":
        """In memory from which a GPU can copy while other work goes on: torch's DataLoader calls this."""
        return replace(self, images_VB3SS=self.images_VB3SS.pin_memory(), labels_G=self.labels_G.pin_memory())


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of an epoch. The last one may be short, but one of a single image is left out: BatchNorm cannot
    normalise it. Every epoch has another order, so no image is left out for good."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1)


def worker_count(workers: int, local_ranks: int = 1) -> int:
    """Loader processes: -1 means one for each core this process may use, of which it has its share."""
    if workers >= 0:
        return workers
    return max(1, usable_cores() // local_ranks)


def open_batches(
    images: ImageList,
    settings: ViewSettings,
    device: torch.device,
    workers: int = 0,
    world: World = ALONE,
    skip: bool = False,
) -> "Batches":
    """Batches of `images`, made by `workers` processes (0: this one). Images of `digits` and `cifar` are decoded now
    and stay in memory.

    Raises UserError naming an image that cannot be read, or with `skip` a class of which none can: here, or, of
    photographs, when their turn comes.
    """
    if settings.policy == "photos":
        return Batches(_PhotoMaker(images, settings, skip, workers), device, workers, world)
    # The digits' views are made by torch, in less time than a process takes to start.
    workers = 0 if settings.policy == "digits" else min(workers, _SMALL_WORKERS.get(device.type, 1))
    return Batches(_SmallMaker(images, settings, skip), device, workers, world)


def _in_order(images: int, batch_size: int, world: World) -> list[Indices]:
    """Whole batches go to the ranks, so that each is what it would be with one rank, to the last bit."""
    starts = range(world.rank * batch_size, images, world.size * batch_size)
    return [np.arange(start, min(start + batch_size, images)) for start in starts]


def _share(indices_G: Indices, world: World) -> tuple[Indices, slice]:
    """The images that this rank computes of a batch, and which rows of it count as its own."""
    rows = world.share(len(indices_G))
    return indices_G[rows] if rows.stop > rows.start else indices_G[:2], rows


@dataclass(frozen=True)
class _Task:
    """One batch to be made: `seed_and_epoch` None asks for the evaluation view. The other two are `Batch`'s."""

    indices_B: Indices
    seed_and_epoch: tuple[int, int] | None
    indices_G: Indices
    rows: slice


class Batches:
    """What training and evaluation read from. `bad`: by index, the images that this rank could not read so far."""

    def __init__(self, maker: "_Maker", device: torch.device, workers: int, world: World = ALONE) -> None:
        self.bad = dict(maker.bad)
        self._maker = maker
        self._device = device
        self._world = world
        self._tasks: list[Iterable[_Task]] = []
        # The sampler is the list that `_ahead` refills, so that one set of worker processes serves all epochs.
        self._loader: DataLoader[Batch | UserError] | None = DataLoader(
            maker,
            batch_size=None,
            sampler=_Refillable(self._tasks),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else every epoch would draw from torch's own random state
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        """Images of the list."""
        return len(self._maker)

    def training(self, seed: int, batch_size: int, steps: range) -> Iterator[Batch]:
        """This rank's share of the batches of these steps, which are counted from the run's first. The workers go on
        into the next epoch without a pause."""
        return self._ahead(self._training_tasks(seed, batch_size, steps))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images in order, in batches; of several ranks, rank r has the batches r, r + size, ..."""
        readable_N = self._maker.evaluated()
        tasks = [
            _Task(readable_N[rows], None, readable_N[rows], slice(0, len(rows)))
            for rows in _in_order(len(readable_N), batch_size, self._world)
        ]
        # Small images only have to be copied: a process would cost more.
        return self._ahead(tasks) if self._maker.decodes else (self._arrived(self._made(task)) for task in tasks)

    def _made(self, task: _Task) -> "Batch | UserError":
        batch = self._maker[task]
        return batch.pin_memory() if self._device.type == "cuda" and isinstance(batch, Batch) else batch

    def _training_tasks(self, seed: int, batch_size: int, steps: range) -> Iterator[_Task]:
        images, per_epoch = len(self._maker), steps_per_epoch(len(self._maker), batch_size)
        epoch, order = -1, np.empty(0, np.int64)
        for step in steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = permutation(seed, epoch, images)
            first = step % per_epoch * batch_size
            indices_G = order[first : first + batch_size]
            indices_B, rows = _share(indices_G, self._world)
            yield _Task(indices_B, (seed, epoch), indices_G, rows)

    def _ahead(self, tasks: Iterable[_Task]) -> Iterator[Batch]:
        self._tasks[:] = [tasks]
        batches = self._start()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # torch's word for it, or a broken connection
                # The connection breaks before the process is gone, which takes a while if it is dumped.
                death = self._death(wait_for=1 if isinstance(error, RuntimeError) else 60)
                if death is None:
                    raise
                raise death from None
            yield self._arrived(batch)

    def _arrived(self, batch: "Batch | UserError") -> Batch:
        """The batch on its device."""
        if isinstance(batch, UserError):
            raise batch
        self.bad.update(batch.bad)
        return replace(
            batch,
            images_VB3SS=batch.images_VB3SS.to(self._device, non_blocking=True),
            labels_G=batch.labels_G.to(self._device, non_blocking=True),
        )

    def _start(self) -> Iterator["Batch | UserError"]:
        """The loader's batches. torch would let the death of a worker raise an error in whatever line this process is
        at just then; here it is noticed where its batch is waited for, at most five seconds later."""
        assert self._loader is not None, "it is closed"
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return iter(self._loader)  # then torch sets no handler either
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self._loader)
        finally:
            signal.signal(signal.SIGCHLD, handler)

    def _death(self, wait_for: float) -> UserError | None:
        """What to say of a worker that is dead, or dies within so many seconds; None where all live."""
        iterator = self._loader._iterator if self._loader is not None else None  # pyright: ignore[reportPrivateUsage]
        workers: list[BaseProcess] = getattr(iterator, "_workers", [])
        dying = wait([worker.sentinel for worker in workers], wait_for if workers else 0)
        for worker, reading in zip(workers, self._maker.reading_W.tolist(), strict=False):
            worker.join(5 if worker.sentinel in dying else 0)  # its files are closed before it has ended
            code = worker.exitcode
            if code is not None:
                how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
                last = self._maker.name(reading)
                return UserError(
                    f"a loader process {how}; the image it read or was reading last: {last}; if memory ran out, "
                    f"{_LESS_MEMORY}"
                )
        return None

    def close(self) -> None:
        iterator = self._loader._iterator if self._loader is not None else None  # pyright: ignore[reportPrivateUsage]
        self._loader = None
        if iterator is None:
            return
        try:
            iterator._shutdown_workers()  # pyright: ignore
        finally:  # where memory is short, they may not even hear of it
            for worker in getattr(iterator, "_workers", []):
                worker.kill()


class _Refillable:
    def __init__(self, tasks: list[Iterable[_Task]]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[_Task]:
        return iter(self._tasks[0])


class _Maker(Dataset["Batch | UserError"]):
    """Makes the batches, in the workers. An error is returned, not raised: torch would wrap it in a traceback of the
    worker."""

    decodes: bool  # whether each batch is read from files

    def __init__(self, images: ImageList, settings: ViewSettings, skip: bool, workers: int = 0) -> None:
        self.bad: dict[int, BadImageError] = {}
        self._images = images
        self._settings = settings
        self._skip = skip
        # What each worker reads, in memory that all of them see: a dead one cannot say it any more.
        self.reading_W = torch.full((max(workers, 1),), _NOTHING).share_memory_()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, task: _Task) -> "Batch | UserError":  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return self._batch(task)
        except UserError as error:
            return error
        except Exception as error:
            if get_worker_info() is None or not out_of_memory(error):
                raise
            return UserError(f"there is not enough memory for the loader processes; {_LESS_MEMORY}")

    def name(self, index: int) -> str:
        """The name of an image, for people."""
        return self._images.images.name(index) if index != _NOTHING else "none yet"

    def evaluated(self) -> Indices:
        """The images that evaluation asks for."""
        return np.arange(len(self._images))

    def _batch(self, task: _Task) -> Batch:
        raise NotImplementedError


class _SmallMaker(_Maker):
    """Images of one size, in memory."""

    decodes = False

    def __init__(self, images: ImageList, settings: ViewSettings, skip: bool) -> None:
        super().__init__(images, settings, skip)
        self._pixels_NSS3, self.bad = decode_all(images, settings.size, skip)

    @cached_property
    def _shown(self) -> Indices:
        """Which image is shown in the place of each: itself, or what stands in for it."""
        shown_N = np.arange(len(self))
        for index in self.bad:
            others = [other for other in stand_ins(self._images, index) if other not in self.bad]
            if not others:
                raise no_image_left(self._images, int(self._images.labels_N[index]))
            shown_N[index] = others[0]
        return shown_N

    def evaluated(self) -> Indices:
        return np.setdiff1d(np.arange(len(self._images)), list(self.bad))

    def _batch(self, task: _Task) -> Batch:
        labels_G = torch.from_numpy(self._images.labels_N[task.indices_G])
        if task.seed_and_epoch is None:
            return Batch(self._gather(task.indices_B)[None], labels_G, task.rows)
        small_B3SS = self._gather(self._shown[task.indices_B])
        return Batch(small_views(small_B3SS, self._settings, *task.seed_and_epoch, task.indices_B), labels_G, task.rows)

    def _gather(self, indices_B: Indices) -> Tensor:
        return torch.from_numpy(self._pixels_NSS3[indices_B]).permute(0, 3, 1, 2)


class _PhotoMaker(_Maker):
    """Image files of any size."""

    decodes = True

    def _batch(self, task: _Task) -> Batch:
        bad: dict[int, BadImageError] = {}
        photos = [self._photo(index, task, bad) for index in task.indices_B.tolist()]
        read = [photo for photo in photos if photo is not None]
        if task.seed_and_epoch is not None:  # then every photograph has something that stands in for it
            views_VB3SS = photo_views(read, self._settings, *task.seed_and_epoch, task.indices_B)
            return Batch(views_VB3SS, torch.from_numpy(self._images.labels_N[task.indices_G]), task.rows, bad)
        labels_B = self._images.labels_N[[index for index in task.indices_B.tolist() if index not in bad]]
        views = np.empty((len(read), self._settings.size, self._settings.size, 3), np.uint8)
        for row, photo in enumerate(read):
            views[row] = evaluation_view(photo, self._settings.size)
        images_1B3SS = torch.from_numpy(views).permute(0, 3, 1, 2)[None]
        return Batch(images_1B3SS, torch.from_numpy(labels_B), slice(0, len(read)), bad)

    def _photo(self, index: int, task: _Task, bad: dict[int, BadImageError]) -> Pixels | None:
        """The image, or what stands in for it; None for one that evaluation leaves out."""
        worker = get_worker_info()
        self.reading_W[worker.id if worker else 0] = index
        try:
            return decode(self._images, index)
        except BadImageError as error:
            if not self._skip:
                raise
            bad[index] = error
            return None if task.seed_and_epoch is None else decode_another(self._images, index)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A signal to the whole group of processes is the main one's to answer: it finishes its step, for which it needs its
    # workers. They end with it, or by themselves should it not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, _end_later)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _end_later(*_: object) -> None:
    signal.alarm(_SECONDS_AFTER_SIGTERM)
