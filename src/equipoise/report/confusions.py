"""Labels, predictions and images become the pairs of classes that are mistaken most, with pictures of the mistakes.

Shapes: N images, P pairs.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from equipoise.base.errors import UserError
from equipoise.data.decode import decode
from equipoise.data.images import ImageList

_SIDE = 72  # pixels
_PIXELS_SEEN = 40  # an image no larger is enlarged without smoothing

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pair:
    """Images of the class `true` that were taken for the class `said`: how many, of how many; the rows of a few, the
    surest first, and of a few that rightly are `said`."""

    true: int
    said: int
    mistakes: int
    images: int
    wrong: list[int]
    typical: list[int]


def confused_pairs(labels_N: Array, predicted_N: Array, confidence_N: Array, classes: int, most: int) -> list[Pair]:
    """At most `most` pairs, those with the most mistakes; of equal ones, the larger share of the class's images."""
    wrong_N = labels_N != predicted_N
    keys_P, mistakes_P = np.unique(
        labels_N[wrong_N].astype(np.int64) * classes + predicted_N[wrong_N], return_counts=True
    )
    images_C = np.bincount(labels_N, minlength=classes)
    share_P = mistakes_P / images_C[keys_P // classes]

    def surest(rows: Array, number: int) -> list[int]:
        return rows[np.argsort(-confidence_N[rows], kind="stable")][:number].tolist()

    pairs: list[Pair] = []
    for place in np.lexsort((-share_P, -mistakes_P))[:most]:
        true, said = divmod(int(keys_P[place]), classes)
        wrong = surest(np.flatnonzero((labels_N == true) & (predicted_N == said)), 3)
        typical = surest(np.flatnonzero((labels_N == said) & (predicted_N == said)), 2)
        pairs.append(Pair(true, said, int(mistakes_P[place]), int(images_C[true]), wrong, typical))
    return pairs


def thumbnails(images: ImageList | None, rows: Sequence[int]) -> list[Markup]:
    """An <img> for each of these images that can be read, with the picture inside; nothing without images."""
    return [picture for row in rows if (picture := _thumbnail(images, row))] if images else []


def _thumbnail(images: ImageList, row: int) -> Markup | None:
    try:
        picture = Image.fromarray(decode(images, row))
    except UserError:
        return None
    small = max(picture.size) <= _PIXELS_SEEN
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, "PNG" if small else "JPEG")
    return Markup('<img class="{}" src="data:image/{};base64,{}" alt="{}" title="{}" width="56" height="56">').format(
        "pixels" if small else "photo",
        "png" if small else "jpeg",
        base64.b64encode(content.getvalue()).decode(),
        images.class_names[images.labels_N[row]],
        images.images.name(row),
    )
