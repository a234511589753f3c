"""Views as they are made in the obvious way: Pillow, torchvision's transforms, timm's RandAugment, image by image.

What the benchmarks compare ours with. `end` says what a view ends as: "normalised", a float tensor as the network wants
it, or "bytes", as ours end, which the network normalises on its device.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision import transforms

View = Callable[[Image.Image], Tensor]
Subject = TypeVar("Subject")

_JITTER = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)


def photo_views(size: int, end: str) -> list[View]:
    """cls, sim, sim of a photograph."""
    crop = [transforms.RandomResizedCrop(size, (0.08, 1)), transforms.RandomHorizontalFlip()]
    fill = {"translate_const": int(0.45 * size), "img_mean": (124, 116, 104)}
    randaug = rand_augment_transform("rand-n2-m10-mstd0.5", fill)
    cls = [*crop, transforms.ColorJitter(0.4, 0.4, 0.4), randaug]
    sim = [*crop, _JITTER, transforms.RandomGrayscale(0.2)]
    return [transforms.Compose([*steps, *_end(end)]) for steps in (cls, sim, sim)]


def cifar_views(end: str) -> list[View]:
    """cls, sim, sim of an image of 32 pixels."""
    auto_augment = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    cls = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), auto_augment]
    crop = [transforms.RandomResizedCrop(32, (0.2, 1)), transforms.RandomHorizontalFlip()]
    sim = [*crop, _JITTER, transforms.RandomGrayscale(0.2)]
    first, *rest = _end(end)
    return [transforms.Compose([*cls, first, _cutout, *rest]), *[transforms.Compose([*sim, *_end(end)])] * 2]


def _end(end: str) -> list[Any]:
    if end == "bytes":
        return [transforms.PILToTensor()]
    return [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def _cutout(image: Tensor) -> Tensor:
    side = image.shape[-1]
    y, x = np.random.randint(side), np.random.randint(side)
    image[:, max(0, y - side // 4) : y + side // 4, max(0, x - side // 4) : x + side // 4] = 0
    return image


def all_views(
    subjects: Sequence[Subject], opened: Callable[[Subject], Image.Image], views: Sequence[View], batch: int
) -> Callable[[], None]:
    """What makes the views of everything, image by image, stacked batch by batch."""

    def run() -> None:
        for first in range(0, len(subjects), batch):
            rows: list[list[torch.Tensor]] = []
            for subject in subjects[first : first + batch]:
                image = opened(subject)
                rows.append([view(image) for view in views])
            for view in zip(*rows, strict=True):
                torch.stack(view)

    return run
