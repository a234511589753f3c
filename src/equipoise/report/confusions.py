"""Labels, predictions and images become the pairs of classes that are mistaken most, with pictures of the mistakes.

Shapes: N images, P pairs.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Pair(NamedTuple):
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
    surest_N = np.argsort(-confidence_N, kind="stable")
    true_N, said_N = labels_N[surest_N].astype(np.int64), predicted_N[surest_N]
    keys_P, mistakes_P = np.unique((true_N * classes + said_N)[true_N != said_N], return_counts=True)
    images_C = np.bincount(true_N, minlength=classes)
    share_P = mistakes_P / images_C[keys_P // classes]
    pairs: list[Pair] = []
    for place in np.lexsort((-share_P, -mistakes_P))[:most]:
        true, said = divmod(int(keys_P[place]), classes)
        wrong = surest_N[(true_N == true) & (said_N == said)][:3].tolist()
        typical = surest_N[(true_N == said) & (said_N == said)][:2].tolist()
        pairs.append(Pair(true, said, int(mistakes_P[place]), int(images_C[true]), wrong, typical))
    return pairs


def thumbnails(images: ImageList, rows: Sequence[int]) -> list[Markup]:
    """An <img> for each of these images that can be read, with the picture inside."""
    pictures: list[Markup] = []
    for row in rows:
        try:
            picture = Image.fromarray(decode(images, row))
        except UserError:
            continue
        look, kind = ("pixels", "png") if max(picture.size) <= _PIXELS_SEEN else ("photo", "jpeg")
        picture.thumbnail((_SIDE, _SIDE))
        content = io.BytesIO()
        picture.save(content, kind)
        data, class_name = base64.b64encode(content.getvalue()).decode(), images.class_names[images.labels_N[row]]
        pictures.append(
            Markup('<img class="{}" src="data:image/{};base64,{}" alt="{}" title="{}" width="56" height="56">').format(
                look, kind, data, class_name, images.images.name(row)
            )
        )
    return pictures
