"""Which images are copies of others: the same pixels, or the same picture stored again, smaller or brighter.

Pictures of one kind have the same coarse shapes (a shirt on a table, a ship on the sea), so that correlations of small
images, and hashes of them, take many for copies. What only a copy shares is the detail: a picture of 16 by 16 pixels
from which a blurred one was subtracted. Measured in docs/log.md. Shapes: N images, S side of that picture, K kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from equipoise.base.progress import counted
from equipoise.data.images import Indices

Details = npt.NDArray[np.float32]

KINDS = ("parts", "labels", "again")  # in another part; in another class; in neither
COPY = 0.95  # a correlation of details from which on two images are copies
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


@dataclass(frozen=True)
class Copies:
    """`pairs`: of each kind (`KINDS`) at most one pair an image, in the order of the images; a pair may be of two
    kinds. `too_alike`: different images resemble each other so much that only exact copies were looked for."""

    pairs: dict[str, list[Pair]]
    too_alike: bool


def detail(pixels: npt.NDArray[np.uint8]) -> Details:
    """The fine shapes of an image `[H, W, 3]` as `[S, S]`."""
    small = cv2.resize(pixels, (2 * _SIDE, 2 * _SIDE), interpolation=cv2.INTER_AREA)
    gray_SS = small.reshape(_SIDE, 2, _SIDE, 6).mean((1, 3), dtype=np.float32)
    return (gray_SS - cv2.GaussianBlur(gray_SS, (0, 0), 1, borderType=cv2.BORDER_REFLECT)).astype(np.float32)


def find_copies(digests: Sequence[bytes], details: Sequence[Details], parts_N: Indices, labels_N: Indices) -> Copies:
    """The copies among images with these digests of their pixels and these details. `parts_N` must ascend: an image of
    the test part is then a copy of one of the training part, not the other way round."""
    pairs: dict[str, list[Pair]] = {}
    details_NSS = np.array(details, np.float32).reshape(-1, _SIDE, _SIDE)
    near_KN, too_alike = _near(details_NSS, parts_N, labels_N)
    for kind, exact_N, near_N in zip(KINDS, _same_pixels(digests, parts_N, labels_N), near_KN, strict=True):
        other_N = np.where(exact_N >= 0, exact_N, near_N)
        found = np.flatnonzero(other_N >= 0).tolist()
        pairs[kind] = [Pair(image, int(other_N[image]), bool(exact_N[image] >= 0)) for image in found]
    return Copies(pairs, too_alike)


def _same_pixels(digests: Sequence[bytes], parts_N: Indices, labels_N: Indices) -> Indices:
    """For each kind and image the first image of that kind with its digest, as `[K, N]`; -1 where there is none."""
    other_KN = np.full((len(KINDS), len(digests)), -1)
    first_of: dict[bytes, dict[tuple[int, int], int]] = {}  # of a digest, part and label -> first image
    for image, (digest, *place) in enumerate(zip(digests, parts_N.tolist(), labels_N.tolist(), strict=True)):
        earlier = first_of.setdefault(digest, {})  # as few as there are parts and labels
        in_parts = [other for (part, _), other in earlier.items() if part != place[0]]
        in_labels = [other for (_, label), other in earlier.items() if label != place[1]]
        again = earlier.setdefault((place[0], place[1]), image)
        other_KN[:, image] = [min(in_parts, default=-1), min(in_labels, default=-1), -1 if again == image else again]
    return other_KN


def _near(details_NSS: Details, parts_N: Indices, labels_N: Indices) -> tuple[Indices, bool]:
    """For each kind and image the earlier image of that kind whose detail is most alike, as `[K, N]`, and whether too
    many resemble each other; -1 where there is none that may be a copy."""
    whole, middle = _unit(details_NSS), _unit(details_NSS[:, _MIDDLE, _MIDDLE])
    other_KN = np.full((len(KINDS), len(whole)), -1)
    resembling = 0
    for start in counted(range(0, len(whole), _ROWS), len(whole), "comparing", _ROWS):
        stop = min(start + _ROWS, len(whole))
        alike = np.minimum(whole[start:stop] @ whole[:stop].T, middle[start:stop] @ middle[:stop].T)
        alike[:, start:] = np.tril(alike[:, start:], -1)  # with earlier ones only
        nearest = alike.max(1)
        resembling += int(((nearest >= _RESEMBLES) & (nearest < COPY)).sum())
        rows = np.flatnonzero(nearest >= COPY)
        of_rows, others = np.nonzero(alike[rows] >= COPY)
        images = rows[of_rows] + start
        order = np.argsort(alike[images - start, others], kind="stable")  # the last one assigned stays
        images, others = images[order], others[order]
        in_parts, in_labels = parts_N[images] != parts_N[others], labels_N[images] != labels_N[others]
        for kind, chosen in enumerate((in_parts, in_labels, ~(in_parts | in_labels))):
            other_KN[kind, images[chosen]] = others[chosen]
    if resembling > _MOST_RESEMBLING * len(whole):
        return np.full_like(other_KN, -1), True
    return other_KN, False


def _unit(details_NSS: Details) -> Details:
    """Rows of length 1, so that a product is a correlation; zeros for what has next to no detail."""
    _, high, wide = details_NSS.shape
    rows = details_NSS.reshape(-1, high * wide)
    rows = rows - rows.mean(1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(lengths >= _FAINTEST * rows.shape[1] ** 0.5, rows / np.maximum(lengths, 1e-9), 0).astype(np.float32)
