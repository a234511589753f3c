"""Every image of a data set is decoded once: bad ones, copies, sizes, and what is odd. Shape suffix: N images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from equipoise.base.progress import counted
from equipoise.data.copies import Details, Pair, detail, find_copies
from equipoise.data.decode import BadImageError, decode, in_order, usable_cores
from equipoise.data.images import PART_NAMES, ImageList, Indices

_ORDER = tuple(dict.fromkeys(PART_NAMES.values()))
_DARK, _BRIGHT = 40, 215  # of 255: nothing is brighter, or darker
_PLAIN = 8  # levels between darkest and brightest
_LONG = 4  # times the short side
_SMALL = 0.25  # of the median short side


_Look = tuple[bytes, Details, tuple[float, ...]]  # digest of the pixels; width, height, darkest, brightest


class Place(NamedTuple):
    """Where an image is: the name of its part, the list of that part, and its row there."""

    part: str
    images: ImageList
    row: int

    @property
    def name(self) -> str:
        return self.images.images.name(self.row)

    @property
    def class_name(self) -> str:
        return self.images.class_names[self.images.labels_N[self.row]]

    def __str__(self) -> str:
        return f"{self.name} ('{self.class_name}', {self.part})"


@dataclass(frozen=True)
class Inspection:
    """What decoding every image has shown. `places`: those of the images that can be read; `copies` (with `too_alike`:
    `find_copies`) and `odd` are by their positions there, `odd` by what is odd about them."""

    places: Sequence[Place]
    sizes_N2: Indices  # width, height
    copies: Mapping[str, Sequence[Pair]]
    too_alike: bool
    odd: Mapping[str, Sequence[int]]
    bad: list[BadImageError]

    def problems(self) -> list[str]:
        """A line for each kind of copies, with their number and the first of them."""
        pairs, lines = self.copies, list[str]()

        def parts(pair: Pair) -> tuple[str, str]:
            return self.places[pair.image].part, self.places[pair.other].part

        for (part, other), of_parts in groupby(sorted(pairs["parts"], key=parts), parts):
            what = f"{part} images that are in the {other} part too"
            lines.append(self._line(what, list(of_parts), "figures on them would be too good"))
        if pairs["labels"]:
            lines.append(self._line("images with two labels", pairs["labels"], "at least one of the two is wrong"))
        if pairs["again"]:
            lines.append(self._line("images that are twice in a class of a part", pairs["again"], "they count twice"))
        return lines

    def _line(self, what: str, pairs: Sequence[Pair], so: str) -> str:
        exact = sum(pair.exact for pair in pairs)
        image, other = (self.places[place] for place in pairs[0][:2])
        kinds = f"{exact:,} pixel for pixel, {len(pairs) - exact:,} nearly"
        advice = "leave one of the two out (a table or a list file can)"
        return f"{what}: {len(pairs):,} ({kinds}; first: {image} and {other}); {so}; {advice}"


def inspect(parts: Mapping[str, ImageList]) -> Inspection:
    """Decode every image of the parts, and compare them all."""
    places, looks, bad = list[Place](), list[_Look](), list[BadImageError]()
    for part in (part for part in _ORDER if part in parts):
        images = parts[part]
        found = in_order(partial(_look, images), range(len(images)), usable_cores())
        for index, look in enumerate(counted(found, len(images), f"decoding {part}")):
            if isinstance(look, BadImageError):
                bad.append(look)
            else:
                places.append(Place(part, images, index))
                looks.append(look)
    figures_N4 = np.array([figures for _, _, figures in looks], np.float64).reshape(-1, 4)
    parts_N = np.array([_ORDER.index(place.part) for place in places], np.int64)
    # By name, since the parts may number their classes differently.
    _, labels_N = np.unique([place.class_name for place in places], return_inverse=True)
    copies = find_copies([digest for digest, *_ in looks], [fine for _, fine, _ in looks], parts_N, labels_N)
    return Inspection(places, figures_N4[:, :2].astype(np.int64), *copies, _odd(figures_N4), bad)


def _look(images: ImageList, index: int) -> _Look | BadImageError:
    try:
        pixels = decode(images, index)
    except BadImageError as error:
        return error
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, key=f"{width} {height}".encode()).digest()
    ends = np.percentile(pixels[:: 1 + height // 64, :: 1 + width // 64], (1, 99)).tolist()
    return digest, detail(pixels), (width, height, *ends)


def _odd(figures_N4: npt.NDArray[np.float64]) -> dict[str, list[int]]:
    """The images that are probably no good pictures of their class, by what is odd about them."""
    darkest_N, brightest_N = figures_N4[:, 2:].T
    short_N, long_N = np.sort(figures_N4[:, :2], axis=1).T
    plain_N = brightest_N - darkest_N < _PLAIN
    odd = {
        "of one colour": plain_N,
        "very dark": (brightest_N < _DARK) & ~plain_N,
        "very bright": (darkest_N > _BRIGHT) & ~plain_N,
        f"more than {_LONG} times as long as wide": long_N > _LONG * short_N,
        "much smaller than the others": short_N < _SMALL * np.median(short_N) if len(short_N) else plain_N,
    }
    return {what: np.flatnonzero(odd_N).tolist() for what, odd_N in odd.items() if odd_N.any()}
