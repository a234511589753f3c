"""What can be trained on is an `ImageList`: where each image is, its label, the class names, the class counts.

A list knows nothing of decoding (`pixels.py`) and reads no pixels. How lists come from what lies on a disk is in
`sources.py`; here is what they are, and how smaller ones are cut out of them.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np
import numpy.typing as npt

from equipoise.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

DIGITS = "digits"
PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}

Indices = npt.NDArray[np.int64]


class Images(Protocol):
    """Where the images of a list are. `name` is what a message calls one, `digest` changes when they change."""

    def __len__(self) -> int: ...
    def take(self, indices_N: Indices) -> "Images": ...
    def name(self, index: int) -> str: ...
    def digest(self) -> str: ...


class Paths(Sequence[str]):
    """Paths one after another in one piece of memory. As a tuple of texts, a list of short ones would take twenty times
    the file it came from, and every loader process would copy it."""

    def __init__(self, paths: Iterable[str]) -> None:
        content, self._ends = bytearray(), array("q")
        for path in paths:
            content += os.fsencode(path)
            self._ends.append(len(content))
        self._content = bytes(content)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(len(self))))
        end = self._ends[index]  # or IndexError
        start = self._ends[index - 1] if index % len(self) else 0
        return os.fsdecode(self._content[start:end])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder, by their paths relative to it."""

    root: Path
    paths: Paths

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices_N: Indices) -> "ImageFiles":
        return replace(self, paths=Paths(self.paths[index] for index in indices_N.tolist()))

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def digest(self) -> str:
        hasher = hashlib.sha256()
        for number, path in enumerate(self.paths):
            hasher.update(os.fsencode(f"\0{path}" if number else path))
        return hasher.hexdigest()


@dataclass(frozen=True)
class EncodedImages:
    """Image files as bytes in the rows of a Parquet column, in memory once however often they are subset."""

    origin: str
    column: "pa.ChunkedArray"
    rows_N: Indices

    def __len__(self) -> int:
        return len(self.rows_N)

    def take(self, indices_N: Indices) -> "EncodedImages":
        return replace(self, rows_N=self.rows_N[indices_N])

    def name(self, index: int) -> str:
        return f"row {self.rows_N[index]} of {self.origin}"

    def content(self, index: int) -> bytes | None:
        """The image file's bytes, or None where the row holds none."""
        value: bytes | None = self.column[int(self.rows_N[index])].as_py()
        return value

    def digest(self) -> str:
        hasher = hashlib.sha256(self.rows_N.tobytes())
        for chunk in self.column.chunks:
            for buffer in chunk.buffers():
                hasher.update(buffer or b"")
        return hasher.hexdigest()


@dataclass(frozen=True)
class PixelArrays:
    """Decoded images in memory, uint8 `[N, H, W, 3]`."""

    origin: str
    pixels_NHW3: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels_NHW3)

    def take(self, indices_N: Indices) -> "PixelArrays":
        return replace(self, pixels_NHW3=self.pixels_NHW3[indices_N])

    def name(self, index: int) -> str:
        return f"image {index} of {self.origin}"

    def digest(self) -> str:
        return _sha256(np.ascontiguousarray(self.pixels_NHW3).tobytes())


@dataclass(frozen=True)
class ImageList:
    """Labelled images. `labels_N` index `class_names`; a class may have no image in a test part."""

    origin: str
    images: Images
    labels_N: Indices
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels_N)

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(np.bincount(self.labels_N, minlength=len(self.class_names)).tolist())

    def take(self, indices_N: Indices) -> "ImageList":
        """The list of these images, in this order."""
        return replace(self, images=self.images.take(indices_N), labels_N=self.labels_N[indices_N])

    def fingerprint(self) -> str:
        """SHA-256 over names of classes, labels, and paths (of files) or contents (of images in memory)."""
        names = os.fsencode("\0".join(self.class_names))
        return _sha256(names + self.labels_N.tobytes() + self.images.digest().encode())


@dataclass(frozen=True)
class Found:
    """What lies at a path, by part ('train', 'validation', 'test'), before anything is asked of it."""

    kind: str  # 'class folders', 'Parquet', 'list files', ...
    parts: dict[str, ImageList]
    divided: bool  # into parts by their names; else all of it is called 'train'
    named: bool = True  # the classes have names, not just numbers
    notes: tuple[str, ...] = ()  # what is odd, but no error
    of_lists: bool = False  # by list files, whose images may not be there
    absent: Mapping[str, UserError] = field(default_factory=dict[str, UserError])  # parts that should be there
    described: tuple[str, ...] = ()  # which files these are


@dataclass(frozen=True)
class Parts:
    """A data set: what it is trained on and, where there is such a part, chosen and scored on."""

    kind: str
    train: ImageList
    validation: ImageList | None
    test: ImageList | None

    def named(self) -> dict[str, ImageList]:
        """The parts that exist, by name."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}


def refuse_outside(root: Path, paths: Iterable[Path]) -> None:
    """Raise UserError for a path below the data folder `root` that links lead out of it."""
    real_root = Path(os.path.realpath(root))
    for path in paths:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(real_root):
            raise UserError(
                f"{path} leads over a link out of the data folder {root}, to {real}; if that is meant, allow it with "
                "--allow-outside"
            )


def training_problems(train: ImageList) -> list[str]:
    """Why `train` cannot be trained on; empty where it can."""
    if len(train.class_names) == 1:
        return [f"{train.origin} has one class only ('{train.class_names[0]}'); a classifier needs two or more"]
    return [
        f"{train.origin}: class '{name}' has no training images; add some or remove the class"
        for name, count in zip(train.class_names, train.class_counts, strict=True)
        if count == 0
    ]


# ---------------------------------------------------------------------------------------------- subsets


def long_tail_counts(largest: int, classes: int, imbalance_factor: float, shape: str) -> list[int]:
    """Images kept of each class (Cao et al., NeurIPS 2019, section 4).

    'exponential': class c keeps `int(largest * (1 / imbalance_factor) ** (c / (classes - 1)))`.
    'step': the second half of the classes keeps `int(largest * (1 / imbalance_factor))`.
    """
    if shape == "step":
        head = classes // 2
        return [largest] * head + [int(largest * (1 / imbalance_factor))] * (classes - head)
    return [int(largest * (1 / imbalance_factor) ** (c / (classes - 1))) for c in range(classes)]


def long_tailed(full: ImageList, imbalance_factor: float, shape: str) -> ImageList:
    """The benchmark's long-tail subset: numpy's legacy generator with seed 0 shuffles each class's indices in label
    order, and the first n of it are kept. Which images these are depends on the order of `full`: of CIFAR as Parquet,
    whose rows are in another order than the archive's, they are not the images of the literature's subset.

    The largest class keeps as many images as the smallest class of `full` has, so that the shape is exact. Raises
    UserError where the smallest class would be left empty.
    """
    counts = long_tail_counts(min(full.class_counts), len(full.class_names), imbalance_factor, shape)
    if min(counts) < 1:
        raise UserError(
            f"imbalance factor {imbalance_factor:g} leaves class '{full.class_names[-1]}' without images; "
            f"with {counts[0]} in the largest class it can be {counts[0]} at most"
        )
    generator = np.random.RandomState(0)
    kept: list[Indices] = []
    for label, count in enumerate(counts):
        indices = np.flatnonzero(full.labels_N == label)
        generator.shuffle(indices)
        kept.append(indices[:count])
    return full.take(np.concatenate(kept))


def hold_out(full: ImageList, share: float) -> tuple[ImageList, ImageList]:
    """(training, validation): `share` of each class, rounded, at least one image of a class that has three or more.

    A class with fewer than three gives none. The split depends on the list alone, never on the training seed, so
    that runs with different seeds are scored on the same images. Raises UserError if nothing could be held out.
    """
    generator = np.random.default_rng(0)
    held: list[Indices] = []
    for label, count in enumerate(full.class_counts):
        shuffled = generator.permutation(np.flatnonzero(full.labels_N == label))
        held.append(shuffled[: max(1, round(share * count)) if count >= 3 else 0])
    chosen = np.sort(np.concatenate(held))
    if len(chosen) == 0:
        raise UserError(f"{full.origin}: no class has three images, so none can be held out; set data.holdout to 0")
    return full.take(np.setdiff1d(np.arange(len(full)), chosen)), full.take(chosen)


def imbalance_factor(class_counts: Sequence[int]) -> float:
    """Largest class count / smallest class count."""
    return max(class_counts) / min(class_counts)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
