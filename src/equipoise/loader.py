"""A list and its views become batches, in an order that depends on (seed, epoch) alone.

`SmallImages` keeps the decoded images in memory and makes the views of a whole batch at once, on the device that
trains. `Photographs` decodes files in worker processes. Both give the same numbers for any number of workers,
because every random number comes from (seed, epoch, index).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equipoise.draws import permutation
from equipoise.errors import UserError
from equipoise.lists import ImageList
from equipoise.pixels import decode, decode_all
from equipoise.views import ViewSettings, evaluation_view, photo_views, small_views

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """`images_VB3SS`: uint8; evaluation batches have one view. All on the device."""

    images_VB3SS: Tensor
    labels_B: Tensor


class Batches(Protocol):
    """What training and evaluation read from."""

    def training(self, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]: ...
    def evaluation(self, batch_size: int) -> Iterator[Batch]: ...


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of an epoch. The last one may be short, but one of a single image is left out: BatchNorm cannot
    normalise it. Every epoch has another order, so no image is left out for good."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1)


def worker_count(workers: int) -> int:
    """Loader processes: -1 means one for each core this process may use."""
    if workers >= 0:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_batches(images: ImageList, settings: ViewSettings, device: torch.device, workers: int = 0) -> "Batches":
    """The loader that fits the policy: images of `digits` and `cifar` are decoded now and stay in memory.

    Raises UserError naming an image that cannot be read: here, or, of photographs, when their turn comes.
    """
    if settings.policy == "photos":
        return Photographs(images, settings, device, workers)
    return SmallImages(images, settings, device)


def _epoch_batches(images: int, seed: int, epoch: int, batch_size: int) -> list[Indices]:
    order = permutation(seed, epoch, images)
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps_per_epoch(images, batch_size))]


def _in_order(images: int, batch_size: int) -> list[Indices]:
    return [np.arange(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]


class SmallImages:
    """Images of one size, in memory; views are made batch-wise on the device."""

    def __init__(self, images: ImageList, settings: ViewSettings, device: torch.device) -> None:
        self._pixels_NSS3 = torch.from_numpy(decode_all(images, settings.size))
        self._labels_N = torch.from_numpy(images.labels_N)
        self._settings = settings
        self._device = device
        # The operations need float64 here and there, which Apple's devices do not have.
        self._view_device = torch.device("cpu") if device.type == "mps" else device

    def _gather(self, indices_B: Indices) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(indices_B)
        images_BSS3 = self._pixels_NSS3[rows].to(self._view_device)
        return images_BSS3.permute(0, 3, 1, 2), self._labels_N[rows]

    def training(self, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
        for indices_B in _epoch_batches(len(self._labels_N), seed, epoch, batch_size):
            images_B3SS, labels_B = self._gather(indices_B)
            views = small_views(images_B3SS, self._settings, seed, epoch, indices_B)
            yield Batch(views.to(self._device), labels_B.to(self._device))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        for indices_B in _in_order(len(self._labels_N), batch_size):
            images_B3SS, labels_B = self._gather(indices_B)
            yield Batch(images_B3SS[None].to(self._device), labels_B.to(self._device))


@dataclass(frozen=True)
class _Task:
    """One batch for a worker: `seed_and_epoch` None asks for the evaluation view."""

    indices_B: Indices
    seed_and_epoch: tuple[int, int] | None


class Photographs:
    """Image files of any size, decoded and made into views by `workers` processes (0: this one)."""

    def __init__(self, images: ImageList, settings: ViewSettings, device: torch.device, workers: int) -> None:
        self._images = images
        self._device = device
        self._tasks: list[_Task] = []
        # The sampler is the list that `_run` refills, so that one set of worker processes serves all epochs.
        self._loader: DataLoader[Batch | UserError] = DataLoader(
            _BatchMaker(images, settings),
            batch_size=None,
            sampler=_Refillable(self._tasks),
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else every epoch would draw from torch's own random state
            worker_init_fn=_start_worker,
        )

    def training(self, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
        batches = _epoch_batches(len(self._images), seed, epoch, batch_size)
        return self._run([_Task(indices_B, (seed, epoch)) for indices_B in batches])

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        return self._run([_Task(indices_B, None) for indices_B in _in_order(len(self._images), batch_size)])

    def _run(self, tasks: Sequence[_Task]) -> Iterator[Batch]:
        self._tasks[:] = tasks
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield Batch(
                batch.images_VB3SS.to(self._device, non_blocking=True),
                batch.labels_B.to(self._device, non_blocking=True),
            )


class _Refillable:
    def __init__(self, tasks: list[_Task]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[_Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


class _BatchMaker(Dataset["Batch | UserError"]):
    """Runs in the workers. An error is returned, not raised: torch would wrap it in a traceback of the worker."""

    def __init__(self, images: ImageList, settings: ViewSettings) -> None:
        self._images = images
        self._settings = settings

    def __getitem__(self, task: _Task) -> "Batch | UserError":  # pyright: ignore[reportIncompatibleMethodOverride]
        labels_B = torch.from_numpy(self._images.labels_N[task.indices_B])
        try:
            photos = [decode(self._images, int(index)) for index in task.indices_B]
        except UserError as error:
            return error
        if task.seed_and_epoch is None:
            views = np.stack([evaluation_view(photo, self._settings.size) for photo in photos])
            return Batch(torch.from_numpy(views).permute(0, 3, 1, 2)[None], labels_B)
        seed, epoch = task.seed_and_epoch
        return Batch(photo_views(photos, self._settings, seed, epoch, task.indices_B), labels_B)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
