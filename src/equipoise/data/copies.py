"""Which images are copies of others: the same pixels, or the same picture stored again, smaller or brighter.

Pictures of one kind have the same coarse shapes (a shirt on a table, a ship on the sea), so that correlations of small
images, and hashes of them, take many for copies. What only a copy shares is the detail: a picture of 16 by 16 pixels
from which a blurred one was subtracted. Measured in docs/log.md. Shapes: N images, S side of that picture, K kinds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from equipoise.base.progress import counted
from equipoise.data.images import Indices

Details = npt.NDArray[np.float32]

KINDS = ("parts", "labels", "again")  # in another part; in another class; in neither
COPY = 0.95  # a correlation of details from which on two images are copies
_EXACT = 2.0  # in its place, for those of which every pixel is the same
_RESEMBLES = 0.8  # one that different images reach where all show about the same
_MOST_RESEMBLING = 0.25  # share of the images that may have such a neighbour
_FAINTEST = 1.0  # root mean square, in levels of 255: less detail is noise
_SIDE = 16
_MIDDLE = slice(3, 13)  # without the edge: pictures in one frame share the frame
_ROWS = 512


class Pair(NamedTuple):
    """An image and an earlier one that it is a copy of. `exact`: every pixel is the same."""

    image: int
    other: int
    exact: bool


def detail(pixels: npt.NDArray[np.uint8]) -> Details:
    """The fine shapes of an image `[H, W, 3]` as `[S, S]`."""
    small = cv2.resize(pixels, (2 * _SIDE, 2 * _SIDE), interpolation=cv2.INTER_AREA)
    gray_SS = small.reshape(_SIDE, 2, _SIDE, 6).mean((1, 3), dtype=np.float32)
    return (gray_SS - cv2.GaussianBlur(gray_SS, (0, 0), 1, borderType=cv2.BORDER_REFLECT)).astype(np.float32)


def find_copies(
    digests: Sequence[bytes], details: Sequence[Details], parts_N: Indices, labels_N: Indices
) -> tuple[dict[str, list[Pair]], bool]:
    """The copies among images with these digests of their pixels and these details: of each kind (`KINDS`) at most one
    pair an image, in the order of the images; a pair may be of two kinds. And whether different images resemble each
    other so much that only exact copies were looked for. `parts_N` must ascend: an image of the test part is then a
    copy of one of the training part, not the other way round."""
    numbers: dict[bytes, int] = {}
    pixels_N = np.array([numbers.setdefault(digest, len(numbers)) for digest in digests], np.int64)
    details_NSS = np.array(details, np.float32).reshape(-1, _SIDE, _SIDE)
    whole, middle = _unit(details_NSS), _unit(details_NSS[:, _MIDDLE, _MIDDLE])
    # Of each kind, the image that is most alike, of equal ones the first, and how much.
    other_KN, most_KN = np.zeros((len(KINDS), len(whole)), np.int64), np.zeros((len(KINDS), len(whole)))
    resembling = 0
    for start in counted(range(0, len(whole), _ROWS), len(whole), "comparing", _ROWS):
        stop = min(start + _ROWS, len(whole))
        alike = np.minimum(whole[start:stop] @ whole[:stop].T, middle[start:stop] @ middle[:stop].T)
        alike[pixels_N[start:stop, None] == pixels_N[:stop]] = _EXACT
        alike[:, start:] = np.tril(alike[:, start:], -1)  # with earlier ones only
        nearest = alike.max(1)
        resembling += int(((nearest >= _RESEMBLES) & (nearest < COPY)).sum())
        rows = np.flatnonzero(nearest >= COPY)
        images = rows + start
        in_parts = parts_N[images, None] != parts_N[:stop]
        in_labels = labels_N[images, None] != labels_N[:stop]
        for kind, is_kind in enumerate((in_parts, in_labels, ~(in_parts | in_labels))):
            of_kind = np.where(is_kind, alike[rows], 0)
            other_KN[kind, images], most_KN[kind, images] = of_kind.argmax(1), of_kind.max(1)
    too_alike = resembling > _MOST_RESEMBLING * len(whole)
    pairs: dict[str, list[Pair]] = {}
    for kind, other_N, most_N in zip(KINDS, other_KN, most_KN, strict=True):
        found = np.flatnonzero(most_N >= (_EXACT if too_alike else COPY)).tolist()
        pairs[kind] = [Pair(image, int(other_N[image]), bool(most_N[image] == _EXACT)) for image in found]
    return pairs, too_alike


def _unit(details_NSS: Details) -> Details:
    """Rows of length 1, so that a product is a correlation; zeros for what has next to no detail."""
    _, high, wide = details_NSS.shape
    rows = details_NSS.reshape(-1, high * wide)
    rows = rows - rows.mean(1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(lengths >= _FAINTEST * rows.shape[1] ** 0.5, rows / np.maximum(lengths, 1e-9), 0).astype(np.float32)
