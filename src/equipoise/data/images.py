"""What is trained on and scored: an `ImageList`, which says where each image is and what its label is. A list reads no
pixels: `decode.py` does. `sources.py` makes lists of files; here is what they are, and `subsets.py` cuts smaller ones
out of them. Shape suffix: N images."""

import contextlib
import hashlib
import os
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, quoted
from equipoise.data.storage import download

DIGITS = "digits"
PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

Indices = npt.NDArray[np.int64]


# Each kind has `take` (a subset), `name` (what a message calls an image) and `digest` (it changes when they change).


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder. `paths_N`: their relative paths, in one array, which forked processes share. `url`: from
    where those that are not there yet are copied."""

    root: Path
    paths_N: npt.NDArray[np.bytes_]
    url: str = ""

    @classmethod
    def of(cls, root: Path, paths: Iterable[str]) -> "ImageFiles":
        return cls(root, np.array([os.fsencode(path) for path in paths], np.bytes_))

    def __len__(self) -> int:
        return len(self.paths_N)

    def take(self, indices_N: Indices) -> "ImageFiles":
        return replace(self, paths_N=self.paths_N[indices_N])

    def path(self, index: int) -> Path:
        name = os.fsdecode(self.paths_N[index])
        path = self.root / name
        if self.url and not path.exists():
            download(f"{self.url}/{name}", path)
        return path

    def name(self, index: int) -> str:
        name = os.fsdecode(self.paths_N[index])
        return f"{self.url}/{name}" if self.url else str(self.root / name)

    def content(self, index: int) -> bytes:
        return self.path(index).read_bytes()

    def digest(self) -> str:
        return hashlib.sha256(b"\0".join(self.paths_N.tolist())).hexdigest()


@dataclass(frozen=True)
class EncodedImages:
    """Image files as bytes, in the column `image` of pyarrow's `table`."""

    origin: str
    table: Any
    rows_N: Indices

    def take(self, indices_N: Indices) -> "EncodedImages":
        return replace(self, rows_N=self.rows_N[indices_N])

    def name(self, index: int) -> str:
        return f"row {self.rows_N[index]} of {self.origin}"

    def content(self, index: int) -> bytes:
        return self.table["image"][int(self.rows_N[index])].as_py() or b""

    def digest(self) -> str:
        hasher = hashlib.sha256(self.rows_N.tobytes())
        for chunk in self.table["image"].chunks:
            for buffer in chunk.buffers():
                hasher.update(buffer or b"")
        return hasher.hexdigest()


@dataclass(frozen=True)
class TarImages:
    """Image files in tars, opened for each: any process can, and none is mapped, which kills where a file was cut.
    `places_N4`: number of the tar, first byte, bytes, CRC-32 (-1: not known)."""

    tars: Sequence[Path]
    paths_N: npt.NDArray[np.bytes_]
    places_N4: Indices

    def take(self, indices_N: Indices) -> "TarImages":
        return replace(self, paths_N=self.paths_N[indices_N], places_N4=self.places_N4[indices_N])

    def name(self, index: int) -> str:
        return f"{os.fsdecode(self.paths_N[index])} in {self.tars[self.places_N4[index, 0]]}"

    def content(self, index: int) -> bytes:
        """Raises ValueError where the bytes are not those that were packed."""
        tar, start, size, checksum = self.places_N4[index].tolist()
        with self.tars[tar].open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size or (checksum >= 0 and zlib.crc32(content) != checksum):
            raise ValueError("its bytes have changed since they were packed")
        return content

    def digest(self) -> str:
        return hashlib.sha256(b"\0".join([*self.paths_N.tolist(), self.places_N4[:, 2:].tobytes()])).hexdigest()


def import_pyarrow(path: str | Path) -> Any:
    """The library pyarrow, which the file at `path` needs. Raises UserError where it is not installed."""
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError:
        raise UserError(f"{path} needs pyarrow: {quoted(sys.executable)} -m pip install pyarrow") from None


@dataclass(frozen=True)
class PixelArrays:
    """Decoded images in memory, uint8 `[N, H, W, 3]`."""

    origin: str
    pixels_NHW3: npt.NDArray[np.uint8]

    def take(self, indices_N: Indices) -> "PixelArrays":
        return replace(self, pixels_NHW3=self.pixels_NHW3[indices_N])

    def name(self, index: int) -> str:
        return f"image {index} of {self.origin}"

    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.pixels_NHW3).tobytes()).hexdigest()


@dataclass(frozen=True)
class ImageList:
    """Labelled images. `labels_N` index `class_names`; a class may have no image in a test part."""

    origin: str
    images: ImageFiles | EncodedImages | TarImages | PixelArrays
    labels_N: Indices
    class_names: tuple[str, ...]
    groups_N: npt.NDArray[np.str_] | None = None  # images of one specimen, film or place are not independent

    def __len__(self) -> int:
        return len(self.labels_N)

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(np.bincount(self.labels_N, minlength=len(self.class_names)).tolist())

    def take(self, indices_N: Indices) -> "ImageList":
        """The list of these images, in this order."""
        groups_N = None if self.groups_N is None else self.groups_N[indices_N]
        return replace(self, images=self.images.take(indices_N), labels_N=self.labels_N[indices_N], groups_N=groups_N)

    @property
    def training_problem(self) -> str | None:
        """Why these images cannot be trained on; None where they can."""
        if len(self.class_names) == 1:
            return f"{self.origin} has one class only ('{self.class_names[0]}'); a classifier needs two or more"
        if 0 in self.class_counts:
            empty = self.class_names[self.class_counts.index(0)]
            return f"{self.origin}: class '{empty}' has no training images; add some, or keep its folder elsewhere"
        return None

    def fingerprint(self) -> str:
        """SHA-256 over names of classes, labels, and paths (of files) or contents (of images in memory)."""
        names = os.fsencode("\0".join(self.class_names))
        return hashlib.sha256(names + self.labels_N.tobytes() + self.images.digest().encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """The data at a path, before anything is asked of it."""

    kind: str  # 'class folders', 'Parquet', 'list files', ...
    parts: dict[str, ImageList]  # 'train', 'validation', 'test'
    divided: bool  # into parts by their names; else all of it is called 'train'
    named: bool = True  # the classes have names, not just numbers
    notes: Sequence[str] = ()  # what is odd, but no error
    faults: Mapping[str, str] = field(default_factory=dict[str, str])  # part -> why it must not be used, or is missing
    described: Sequence[str] = ()  # which files these are
    benchmark: str = ""  # the published data set that they are


@dataclass(frozen=True)
class Parts:
    """A data set: what it is trained on and, where there is such a part, chosen and scored on."""

    kind: str
    train: ImageList
    validation: ImageList | None
    test: ImageList | None
    described: Sequence[str] = ()  # as in `Found`
    notes: Sequence[str] = ()

    def named(self) -> dict[str, ImageList]:
        """The parts that exist, by name."""
        parts = ("train", self.train), ("validation", self.validation), ("test", self.test)
        return {name: part for name, part in parts if part is not None}


def absent_files(files: ImageFiles, bounds: Path | None) -> list[int]:
    """Indices of the files that are not there. Each folder is listed once; no file is opened. Raises UserError for a
    file or a folder that a link leads out of the folder `bounds`."""
    absent: list[int] = []
    is_link: dict[bytes, dict[bytes, bool]] = {}  # folder -> name of each file in it -> whether that is a link
    for index, path in enumerate(files.paths_N.tolist()):
        folder, _, name = path.rpartition(b"/")
        if folder not in is_link:
            is_link[folder] = {}
            if bounds:
                refuse_outside(bounds, files.root / os.fsdecode(folder))
            with contextlib.suppress(OSError), os.scandir(os.path.join(os.fsencode(files.root), folder)) as entries:
                is_link[folder] = {entry.name: entry.is_symlink() for entry in entries}
        if name not in is_link[folder]:
            absent.append(index)
        elif bounds and is_link[folder][name]:
            refuse_outside(bounds, files.path(index))
    return absent


def refuse_outside(root: Path, path: Path) -> None:
    """Raise UserError for a path below the data folder `root` that a link leads out of it."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        if not real.exists():
            raise UserError(f"{path} is a link to {real}, which is not there: a disk that is not mounted?")
        what = f"{path} leads over a link out of the data folder {root}, to {real}"
        raise UserError(f"{what}; if that is meant, allow it with --allow-outside")


def imbalance_factor(class_counts: Sequence[int]) -> float:
    """Largest class count / smallest class count, of the classes that have images."""
    filled = [count for count in class_counts if count] or [1]
    return max(filled) / min(filled)
