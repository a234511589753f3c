"""A list of images and its views become batches, in an order that depends on (seed, epoch) alone, made by any number of
workers ahead of the step. With `skip`, an image that cannot be read is no error: in training another of its class
stands in for it (`decode.stand_in`), in evaluation it is left out, and `bad` says which they were."""

import contextlib
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equipoise.base.errors import UserError
from equipoise.base.script import refuse_unguarded_script
from equipoise.base.world import ALONE, World
from equipoise.config.recipe import Recipe
from equipoise.data.decode import BadImageError, Pixels, decode, in_order, resized, stand_in, usable_cores
from equipoise.data.images import ImageList, Indices, PixelArrays
from equipoise.views.draws import draws, mixing, second_draws
from equipoise.views.views import ViewSettings, evaluation_view, photo_views, small_views, view_settings


@dataclass(frozen=True)
class Batch:
    """`images_VB3SS`: uint8, of this rank; evaluation batches have one view. `labels_G`: of the whole batch, of which
    `rows` are this rank's. A rank without rows has images all the same, which do not count. All on the device. `bad`:
    by index, those of these images that could not be read. `mixed`, where the classifier's views are mixed: the second
    labels `[G]` and the shares `[G]` of the first ones."""

    images_VB3SS: Tensor
    labels_G: Tensor
    rows: slice
    bad: Mapping[int, BadImageError] = field(default_factory=dict[int, BadImageError])
    mixed: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.images_VB3SS, self.labels_G, *self.mixed

    def each(self, made: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch of what is made of each tensor."""
        images_VB3SS, labels_G, *mixed = map(made, self.tensors)
        return replace(self, images_VB3SS=images_VB3SS, labels_G=labels_G, mixed=tuple(mixed))

    def pin_memory(self) -> "Batch":
        """In memory from which a GPU can copy while other work goes on: torch's DataLoader calls this."""
        return self.each(Tensor.pin_memory)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of an epoch. The last one may be short, but one of a single image is left out: BatchNorm cannot
    normalise it. Every epoch has another order, so no image is left out for good."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1)


def worker_count(workers: int, local_ranks: int = 1) -> int:
    """Workers of a loader: -1 means one a core that this process may use, shared by the ranks of this machine."""
    return workers if workers >= 0 else max(1, usable_cores() // local_ranks)


@dataclass(frozen=True)
class Task:
    """A batch to train on, of the images `indices_G`, of which `rows` are this rank's and those `here` are computed
    here. Its views depend on seed, epoch and draws (draws.py); `others_G`: the second draws where views are mixed."""

    indices_G: Indices
    rows: slice
    here: slice
    seed: int
    epoch: int
    draws_G: Indices
    others_G: Indices


class _Tasks:
    """The loader's sampler. It is filled anew for each pass, so that the same processes serve all of them."""

    next: Iterable[Task | Indices] = ()

    def __iter__(self) -> Iterator[Task | Indices]:
        return iter(self.next)


def open_batches(
    images: ImageList,
    settings: ViewSettings,
    device: torch.device,
    workers: int = 0,
    world: World = ALONE,
    skip: bool = False,
) -> "Batches":
    """Batches of `images`, made by `workers` threads or, for an NVIDIA GPU, processes (0: between two steps). Raises
    UserError naming a small image that cannot be read (photographs, when their turn comes), and where processes would
    run the main script again."""
    # The views of digits are made in less time than a process takes to start. A step of ResNet-32 takes 11 ms on a GPU;
    # on a CPU, far longer than its views.
    workers = min(workers, {"digits": 0, "cifar": 6 if device.type == "cuda" else 1}.get(settings.policy, workers))
    if workers and needs_processes(device):
        refuse_unguarded_script()
    return Batches(Maker(images, settings, skip), device, workers, world)


def needs_processes(device: torch.device) -> bool:
    """Whether the workers are processes: threads take turns at what is Python, and a GPU's step is over before them."""
    return device.type == "cuda"


def open_recipe_batches(recipe: Recipe, images: ImageList, device: torch.device, world: World) -> "Batches":
    """Batches of `images` under the recipe's views, by its workers, and with what it says of bad images."""
    workers, skip = worker_count(recipe.workers, world.local_size), recipe.data.on_bad_image == "skip"
    return open_batches(images, view_settings(recipe), device, workers, world, skip)


class Batches:
    """What training and evaluation read from. `bad`: by index, the images that this rank could not read so far."""

    def __init__(self, maker: "Maker", device: torch.device, workers: int, world: World) -> None:
        self.bad = dict(maker.bad)
        self._maker, self._device, self._world, self._workers = maker, device, world, workers
        self._tasks = _Tasks()
        self._receiving: Iterator[Batch | UserError] | None = None

    def __len__(self) -> int:
        """Images of the list."""
        return len(self._maker)

    @cached_property
    def _processes(self) -> "DataLoader[Batch | UserError]":
        return DataLoader(
            self._maker,
            batch_size=None,
            sampler=self._tasks,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else every pass would draw from torch's own random state
            worker_init_fn=_start_worker,
        )

    def training(
        self, seed: int, batch_size: int, steps: range, sampler: str = "instance", epochs: int = 1
    ) -> Iterator[Batch]:
        """This rank's share of the batches of these steps, which are counted from the first of the run's `epochs`. The
        workers go on into the next epoch without a pause."""
        return map(self._arrived, self._received(self._training_tasks(seed, batch_size, steps, sampler, epochs)))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images in order, in batches; of several ranks, rank r has the batches r, r + size, ..., so that each is
        what it would be with one rank, to the last bit."""
        starts = range(self._world.rank * batch_size, len(self), self._world.size * batch_size)
        return self._evaluated([np.arange(start, min(start + batch_size, len(self))) for start in starts])

    def evaluation_of(self, indices_N: Indices, batch_size: int) -> Iterator[tuple[Batch, Indices]]:
        """These images alone, by this rank alone, in batches; with each, which of them could be read."""
        batches = [indices_N[start : start + batch_size] for start in range(0, len(indices_N), batch_size)]
        for batch, indices_B in zip(self._evaluated(batches), batches, strict=True):
            yield batch, np.setdiff1d(indices_B, list(batch.bad))

    def _evaluated(self, batches: Sequence[Indices]) -> Iterator[Batch]:
        # What is in memory only has to be copied: a worker would cost more.
        made = map(self._maker.__getitem__, batches) if self._maker.in_memory else self._received(batches)
        return map(self._arrived, made)

    def prepare(self, look: Callable[[], None] = lambda: None) -> None:
        """Compute what the first batch needs; all ranks call it. `look` is called meanwhile, and may raise."""
        self._maker.prepare(self._world, look)
        self.bad.update(self._maker.bad)

    def close(self) -> None:
        """End the workers."""
        if isinstance(self._receiving, Generator):
            self._receiving.close()
        else:
            getattr(self._receiving, "_shutdown_workers", lambda: None)()  # torch has no public way

    def _training_tasks(self, seed: int, batch_size: int, steps: range, sampler: str, epochs: int) -> Iterator[Task]:
        order = second = np.empty(0, np.int64)
        mix = self._maker.settings.mix
        for step in steps:
            epoch, place = divmod(step, steps_per_epoch(len(self), batch_size))
            if place == 0 or step == steps.start:
                order = draws(seed, epoch, self._maker.labels_N, sampler, epochs)
                if mix != "none":
                    second = second_draws(mix, seed, epoch, self._maker.labels_N, sampler, epochs)
            draws_G, others_G = (of[place * batch_size : (place + 1) * batch_size] for of in (order, second))
            rows = self._world.share(len(draws_G))
            here = rows if rows.stop > rows.start else slice(0, 2)
            yield Task(draws_G % len(self), rows, here, seed, epoch, draws_G, others_G)

    def _received(self, tasks: Iterable[Task | Indices]) -> Iterator[Batch | UserError]:
        if needs_processes(self._device):
            return self._by_processes(tasks)
        self._receiving = in_order(self._maker.__getitem__, tasks, self._workers)
        return self._receiving

    def _by_processes(self, tasks: Iterable[Task | Indices]) -> Iterator[Batch | UserError]:
        self._tasks.next = tasks
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        self._receiving = iter(self._processes)
        # torch's handler would raise the death of a process in whatever line this one is at; without it, torch raises
        # where the batch is waited for. There is none on Windows and in other threads.
        with contextlib.suppress(AttributeError, ValueError):
            signal.signal(signal.SIGCHLD, before)
        try:
            yield from self._receiving
        except (RuntimeError, OSError, EOFError) as error:
            said = str(error).partition("\n")[0]
            # torch begins with "Caught" where code in a process raised, with the traceback from there: a bug.
            if self._workers == 0 or said.startswith("Caught "):
                raise
            advice = "if memory or /dev/shm (docker: --shm-size) ran out, take fewer (--workers) or smaller images"
            raise UserError(f"a loader process was lost ({said}); {advice}") from None

    def _arrived(self, batch: Batch | UserError) -> Batch:
        """The batch on its device."""
        if isinstance(batch, UserError):
            raise batch
        self.bad.update(batch.bad)
        return batch.each(lambda tensor: tensor.to(self._device, non_blocking=True))


class Maker(Dataset["Batch | UserError"]):
    """Makes the batches, in the workers. Photographs are decoded for each batch; images of the size of a view are in
    memory: to decode them each time would take three times as long as their views."""

    def __init__(self, images: ImageList, settings: ViewSettings, skip: bool) -> None:
        self.in_memory = settings.policy != "photos"
        self.bad: dict[int, BadImageError] = {}
        self.settings, self.labels_N = settings, images.labels_N
        self._images, self._skip = images, skip
        self._pixels_NSS3: Pixels | None = None
        if self.in_memory:
            pixels_NSS3 = np.zeros((len(images), settings.size, settings.size, 3), np.uint8)
            threads = 0 if isinstance(images.images, PixelArrays) else usable_cores()  # those are decoded already
            for index, image in enumerate(in_order(partial(self._image, bad=self.bad), range(len(images)), threads)):
                if image is not None:
                    pixels_NSS3[index] = resized(image, settings.size)
            self._pixels_NSS3 = pixels_NSS3

    def __len__(self) -> int:
        return len(self._images)

    def prepare(self, world: World, look: Callable[[], None]) -> None:
        """Images need no preparation."""

    def __getitem__(self, task: Task | Indices) -> Batch | UserError:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return self._training(task) if isinstance(task, Task) else self._evaluation(task)
        except UserError as error:
            return error  # raised, it would arrive wrapped in a traceback

    def _training(self, task: Task) -> Batch:
        seed, epoch, others_G = task.seed, task.epoch, task.others_G
        bad: dict[int, BadImageError] = {}
        views_VB3SS = self._views(task.draws_G[task.here], self.settings, seed, epoch, bad)
        labels_G = torch.from_numpy(self.labels_N[task.indices_G])
        if not len(others_G):
            return Batch(views_VB3SS, labels_G, task.rows, bad)
        boxes_G4, kept_G, shares_G = mixing(self.settings, seed, epoch, others_G)
        places_M = np.flatnonzero(shares_G[task.here] < 1)  # the second images of the others are not needed
        mixed_M = places_M + task.here.start
        if len(mixed_M):
            alone = replace(self.settings, kinds=("cls",))
            second_1M3SS = self._views(others_G[mixed_M], alone, seed, epoch, bad)
            how = boxes_G4[mixed_M].tolist(), kept_G[mixed_M].tolist()
            for place, other_3SS, (top, left, bottom, right), kept in zip(places_M, second_1M3SS[0], *how, strict=True):
                first, second = (of[:, top:bottom, left:right] for of in (views_VB3SS[0, int(place)], other_3SS))
                first.copy_((kept * first + (1 - kept) * second).round_())  # to whole levels, in its place
        mixed = torch.from_numpy(self.labels_N[others_G % len(self)]), torch.from_numpy(shares_G).float()
        return Batch(views_VB3SS, labels_G, task.rows, bad, mixed)

    def _views(
        self, draws_B: Indices, settings: ViewSettings, seed: int, epoch: int, bad: dict[int, BadImageError]
    ) -> Tensor:
        """The views `[V, B, 3, S, S]` of these draws."""
        images: list[Pixels] = []
        for index in (draws_B % len(self)).tolist():
            image = self._image(index, bad)
            if image is None:
                image = stand_in(self._images, index, lambda other: self._image(other, {}))
            images.append(image)
        how = settings, seed, epoch, draws_B
        return small_views(np.stack(images), *how) if self.in_memory else photo_views(images, *how)

    def _evaluation(self, indices_B: Indices) -> Batch:
        bad: dict[int, BadImageError] = {}
        size = self.settings.size
        views_BSS3, good = np.empty((len(indices_B), size, size, 3), np.uint8), list[int]()
        for index in indices_B.tolist():
            image = self._image(index, bad)
            if image is not None:
                views_BSS3[len(good)] = image if self.in_memory else evaluation_view(image, size)
                good.append(index)
        images_1B3SS = torch.from_numpy(views_BSS3[: len(good)]).permute(0, 3, 1, 2)[None]
        labels_B = torch.from_numpy(self._images.labels_N[good])
        return Batch(images_1B3SS, labels_B, slice(0, len(labels_B)), bad)

    def _image(self, index: int, bad: dict[int, BadImageError]) -> Pixels | None:
        """The image; or, with `skip`, None for one that cannot be read, which is added to `bad`."""
        if self._pixels_NSS3 is not None:
            return None if index in self.bad else self._pixels_NSS3[index]
        try:
            return decode(self._images, index)
        except BadImageError as error:
            if not self._skip:
                raise
            bad[index] = error
            return None


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A signal to the whole process group is for the main process: it finishes its step, for which it needs its
    # loader processes. They end with it, or by themselves a minute after SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))
        for other in (signal.SIGUSR1, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
