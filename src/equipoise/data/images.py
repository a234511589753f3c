"""What can be trained on is an `ImageList`: where each image is, its label, the class names, the class counts.

A list knows nothing of decoding (`pixels.py`) and reads no pixels. How lists come from what lies on a disk is in
`sources.py`; here is what they are, and how smaller ones are cut out of them.
"""

import hashlib
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError
from equipoise.base.files import is_text

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
_BLOCK = 2**14


class Images(Protocol):
    """Where the images of a list are. `name` is what a message calls one, `digest` changes when they change."""

    def __len__(self) -> int: ...
    def take(self, indices_N: Indices) -> "Images": ...
    def name(self, index: int) -> str: ...
    def digest(self) -> str: ...


class Paths:
    """Many paths, in one string of bytes with a start and an end for each.

    A million take a third of the memory of as many strings, and processes that share them by fork copy nothing: of
    strings, each has a reference count, which is written to by reading.
    """

    def __init__(self, content: bytes, starts_N: Indices, ends_N: Indices) -> None:
        self._content, self._starts_N, self._ends_N = content, starts_N, ends_N

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Paths":
        content, ends = bytearray(), array("q", [0])
        for path in paths:
            content += os.fsencode(path)
            ends.append(len(content))
        ends_N = np.frombuffer(ends, np.int64)
        return cls(bytes(content), ends_N[:-1], ends_N[1:])

    def __len__(self) -> int:
        return len(self._starts_N)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._content[self._starts_N[index] : self._ends_N[index]])

    def encoded(self) -> Iterator[bytes]:
        """Each path as bytes."""
        for first in range(0, len(self), _BLOCK):
            block = slice(first, first + _BLOCK)  # as lists, whose numbers are faster to read one by one
            for start, end in zip(self._starts_N[block].tolist(), self._ends_N[block].tolist(), strict=True):
                yield self._content[start:end]

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded())

    def take(self, indices_N: Indices) -> "Paths":
        return Paths(self._content, self._starts_N[indices_N], self._ends_N[indices_N])

    @cached_property
    def hashes(self) -> Indices:
        """A hash of each, of 64 bits and of this process only: taken for the path itself, wrongly in one of ten million
        lists of a million paths."""
        return np.fromiter(map(hash, self.encoded()), np.int64, len(self))

    @cached_property
    def folder_hashes(self) -> Indices:
        """The same of what is before the last slash."""
        folders = (path.rpartition(b"/")[0] for path in self.encoded())
        return np.fromiter(map(hash, folders), np.int64, len(self))

    def digest(self) -> str:
        """SHA-256 over all of them, with a zero byte between."""
        hasher, encoded = hashlib.sha256(), self.encoded()
        for number, block in enumerate(iter(lambda: b"\0".join(islice(encoded, _BLOCK)), b"")):
            hasher.update(b"\0" + block if number else block)
        return hasher.hexdigest()


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder, by their paths relative to it. `blob`: of the list file that names them, if one does."""

    root: Path
    paths: Paths
    blob: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices_N: Indices) -> "ImageFiles":
        return replace(self, paths=self.paths.take(indices_N))

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def digest(self) -> str:
        return self.paths.digest()


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


class MappedFile:
    """A file mapped into memory: read where it is looked at, and shared by all processes that look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r").view(np.ndarray)

    def __reduce__(self) -> tuple[type["MappedFile"], tuple[Path]]:
        return MappedFile, (self.path,)  # not the content


@dataclass(frozen=True)
class PackedImages:
    """Image files one after the other in one file. `index_digest` stands for all of them; `checksums_N`: CRC-32."""

    file: MappedFile
    index_digest: str
    names: Paths
    starts_N: Indices
    ends_N: Indices
    checksums_N: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.starts_N)

    def take(self, indices_N: Indices) -> "PackedImages":
        return replace(
            self,
            names=self.names.take(indices_N),
            starts_N=self.starts_N[indices_N],
            ends_N=self.ends_N[indices_N],
            checksums_N=self.checksums_N[indices_N],
        )

    def name(self, index: int) -> str:
        return f"{self.names[index]} in {self.file.path}"

    def content(self, index: int) -> bytes:
        """The image file's bytes. Raises ValueError where they are not those that were packed."""
        content = self.file.content[self.starts_N[index] : self.ends_N[index]].tobytes()
        if zlib.crc32(content) != self.checksums_N[index]:
            raise ValueError("its bytes have changed since they were packed")
        return content

    def digest(self) -> str:
        return _sha256(self.index_digest.encode() + self.starts_N.tobytes())


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

    def __post_init__(self) -> None:
        if not is_text("\0".join(self.class_names)):
            name = next(name for name in self.class_names if not is_text(name))
            raise UserError(f"{self.origin} names a class {name!r}, which cannot be written as text; rename it")

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
    described: tuple[str, ...] = ()  # as in `Found`
    notes: tuple[str, ...] = ()

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
            if not os.path.lexists(real):
                raise UserError(f"{path} is a link to nothing (to {real}); remove it")
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


def of_classes(full: ImageList) -> list[Indices]:
    """The indices of each class's images, ascending. Sorted once: with many classes, a search for each is slow."""
    order_N = np.argsort(full.labels_N, kind="stable")
    return np.split(order_N, np.cumsum(full.class_counts)[:-1])


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
            f"the subset's largest class has as many as the smallest of all here, {counts[0]}, so it can be "
            f"{counts[0]} at most"
        )
    generator = np.random.RandomState(0)
    kept: list[Indices] = []
    for indices, count in zip(of_classes(full), counts, strict=True):
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
    for indices, count in zip(of_classes(full), full.class_counts, strict=True):
        shuffled = generator.permutation(indices)
        held.append(shuffled[: max(1, round(share * count)) if count >= 3 else 0])
    chosen = np.sort(np.concatenate(held))
    if len(chosen) == 0:
        raise UserError(
            f"{full.origin}: no class has three images, so none can be held out; give it more, or set --holdout 0"
        )
    return full.take(np.setdiff1d(np.arange(len(full)), chosen)), full.take(chosen)


def imbalance_factor(class_counts: Sequence[int]) -> float:
    """Largest class count / smallest class count."""
    return max(class_counts) / min(class_counts)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
