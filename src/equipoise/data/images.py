"""What is trained on and scored: an `ImageList`, which says where each image is and what its label is.

A list reads no pixels: `decode.py` does. `sources.py` makes lists of files; here is what they are, and how smaller ones
are cut out of them. Shape suffix: N images.
"""

import hashlib
import os
import shlex
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

DIGITS = "digits"
PART_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}

Indices = npt.NDArray[np.int64]


class Images(Protocol):
    """Where the images of a list are. `name` is what a message calls one, `digest` changes when they change."""

    def __len__(self) -> int: ...
    def take(self, indices_N: Indices) -> "Images": ...
    def name(self, index: int) -> str: ...
    def digest(self) -> str: ...


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder. `paths_N`: their paths relative to it, as bytes: one array, which processes share after a
    fork (each string would be copied as soon as it is read). `blob`: git blob id of the list file that names them."""

    root: Path
    paths_N: npt.NDArray[np.bytes_]
    blob: str = ""

    @classmethod
    def of(cls, root: Path, paths: Iterable[str]) -> "ImageFiles":
        return cls(root, np.array([os.fsencode(path) for path in paths], np.bytes_))

    def __len__(self) -> int:
        return len(self.paths_N)

    def take(self, indices_N: Indices) -> "ImageFiles":
        return replace(self, paths_N=self.paths_N[indices_N])

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths_N[index])

    def name(self, index: int) -> str:
        return str(self.path(index))

    def digest(self) -> str:
        return _sha256(b"\0".join(self.paths_N.tolist()))


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

    def content(self, index: int) -> bytes:
        """The image file's bytes. Raises ValueError where the row holds none."""
        value: bytes | None = self.column[int(self.rows_N[index])].as_py()
        if value is None:
            raise ValueError("it has no bytes")
        return value

    def digest(self) -> str:
        hasher = hashlib.sha256(self.rows_N.tobytes())
        for chunk in self.column.chunks:
            for buffer in chunk.buffers():
                hasher.update(buffer or b"")
        return hasher.hexdigest()


@dataclass(frozen=True)
class PackedImages(EncodedImages):
    """Image files in rows of a packed file, see `packed.py`. `origin`: its path; `table`: it, mapped into memory."""

    table: "pa.Table"

    @classmethod
    def of(cls, path: Path, rows_N: Indices | None = None) -> "PackedImages":
        """These rows of a file, or all. Raises UserError without pyarrow, and pyarrow's errors for a damaged file."""
        pa = import_pyarrow(path)
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # looks at offsets, not at images
        rows_N = np.arange(table.num_rows) if rows_N is None else rows_N
        return cls(str(path), table["image"], rows_N, table)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedImages.of, (Path(self.origin), self.rows_N)  # another process maps the file itself

    def name(self, index: int) -> str:
        return f"{os.fsdecode(self.table['name'][int(self.rows_N[index])].as_py())} in {self.origin}"

    def content(self, index: int) -> bytes:
        """The image file's bytes. Raises ValueError where they are not those that were packed."""
        content = super().content(index)
        if zlib.crc32(content) != self.table["crc32"][int(self.rows_N[index])].as_py():
            raise ValueError("its bytes have changed since they were packed")
        return content

    def digest(self) -> str:
        names, checksums = self.table["name"].to_pylist(), self.table["crc32"].to_numpy()
        return _sha256(b"\0".join([*names, checksums.tobytes(), self.rows_N.tobytes()]))


def import_pyarrow(path: Path) -> Any:
    """The library pyarrow, which the file at `path` needs. Raises UserError where it is not installed."""
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError:
        raise UserError(f"{path} needs pyarrow: {shlex.quote(sys.executable)} -m pip install pyarrow") from None


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
    """The data at a path, before anything is asked of it."""

    kind: str  # 'class folders', 'Parquet', 'list files', ...
    parts: dict[str, ImageList]  # 'train', 'validation', 'test'
    divided: bool  # into parts by their names; else all of it is called 'train'
    named: bool = True  # the classes have names, not just numbers
    notes: tuple[str, ...] = ()  # what is odd, but no error
    of_lists: bool = False  # list files name the images, which may be missing
    absent: Mapping[str, str] = field(default_factory=dict[str, str])  # parts that should be there -> why they are not
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
