"""Predictions, labels and training counts become the figures of the field: top-1, per class, many/medium/few."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MANY_ABOVE = 100  # Liu et al., CVPR 2019: many > 100 training images, few < 20, medium between, both ends inclusive
FEW_BELOW = 20


@dataclass(frozen=True)
class Accuracy:
    """Fractions, not percent. `None` is "there is nothing to average", which is not the same as 0."""

    images: int
    top1: float
    mean_per_class: float
    many: float | None
    medium: float | None
    few: float | None
    per_class: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "per_class": list(self.per_class)}


def shot_group(train_count: int) -> str:
    """'many', 'medium' or 'few' by the number of training images of the class."""
    if train_count > MANY_ABOVE:
        return "many"
    return "few" if train_count < FEW_BELOW else "medium"


def accuracy(
    predictions_N: npt.NDArray[np.int64], labels_N: npt.NDArray[np.int64], train_counts_C: Sequence[int]
) -> Accuracy:
    """Top-1 over all images; per class; and the means of per-class accuracy over each shot group.

    `train_counts_C` are the training images of each class, which decide its group. A class without test images has
    no accuracy and enters no mean. Raises ValueError on an empty set or a label outside the classes.
    """
    classes = len(train_counts_C)
    if len(labels_N) == 0:
        raise ValueError("there are no images to score")
    if labels_N.min() < 0 or labels_N.max() >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}")
    images_C = np.bincount(labels_N, minlength=classes)
    correct_C = np.bincount(labels_N[predictions_N == labels_N], minlength=classes)
    per_class = tuple(
        float(right) / int(seen) if seen else None for right, seen in zip(correct_C, images_C, strict=True)
    )

    def mean(group: str | None) -> float | None:
        members = [
            share
            for share, count in zip(per_class, train_counts_C, strict=True)
            if share is not None and group in (None, shot_group(count))
        ]
        return sum(members) / len(members) if members else None

    overall = mean(None)
    assert overall is not None, "some class has images"
    return Accuracy(
        images=len(labels_N),
        top1=float((predictions_N == labels_N).mean()),
        mean_per_class=overall,
        many=mean("many"),
        medium=mean("medium"),
        few=mean("few"),
        per_class=per_class,
    )
