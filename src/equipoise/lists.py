"""What lies on a disk becomes an `ImageList`: where each image is, its label, the class names, the class counts.

Three sources: a folder of class folders, Parquet files, and scikit-learn's digits inside its wheel. A list knows
nothing of decoding (`pixels.py`) and reads no pixels.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from equipoise.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
DIGITS = "digits"
_PARTS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_DIGITS_TEST_PER_CLASS = 50

Indices = npt.NDArray[np.int64]


class Images(Protocol):
    """Where the images of a list are. `name` is what a message calls one, `digest` changes when they change."""

    def __len__(self) -> int: ...
    def take(self, indices_N: Indices) -> "Images": ...
    def name(self, index: int) -> str: ...
    def digest(self) -> str: ...


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder, by their paths relative to it."""

    root: Path
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices_N: Indices) -> "ImageFiles":
        return replace(self, paths=tuple(self.paths[index] for index in indices_N))

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def digest(self) -> str:
        return _sha256(os.fsencode("\0".join(self.paths)))


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

    kind: str  # 'class folders', 'Parquet', 'embedded digits'
    parts: dict[str, ImageList]
    divided: bool  # into parts by their names; else all of it is called 'train'
    named: bool = True  # the classes have names, not just numbers
    notes: tuple[str, ...] = ()  # what is odd, but no error


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


# ---------------------------------------------------------------------------------------------- opening


def find_parts(path: str, image_column: str = "", label_column: str = "") -> Found:
    """What lies at `path`: 'digits', a folder of class folders, a Parquet file or a folder of them.

    Above the class folders there may be `train/`, `val/` and `test/`; Parquet files belong to the part that their
    name begins with. Raises UserError for what cannot be read.
    """
    if path == DIGITS:
        return _open_digits()
    if not path:
        raise UserError("this recipe needs data: name a folder with --data FOLDER")
    root = Path(os.path.expanduser(path))
    if not root.exists():
        raise UserError(f"there is no file or folder at {root}")
    tables = _parquet_files(root)
    return _open_parquet(tables, image_column, label_column) if tables else _open_class_folders(root)


def open_parts(
    path: str,
    *,
    image_column: str = "",
    label_column: str = "",
    imbalance: str = "exponential",
    imbalance_factor: float = 1.0,
    holdout: float = 0.0,
) -> Parts:
    """The data set at `path` (see `find_parts`) to train on.

    An `imbalance_factor` above 1 cuts a long tail of that shape out of the training part; then, where there is no
    validation part, the share `holdout` of the training images becomes one. Raises UserError for what cannot be a
    training set: nothing there, an empty class, one class only.
    """
    found = find_parts(path, image_column, label_column)
    if "train" not in found.parts:
        raise UserError(f"{path} has no training part; name it train/ (folders) or train-*.parquet")
    train, validation = found.parts["train"], found.parts.get("validation")
    for problem in training_problems(train):
        raise UserError(problem)
    if imbalance_factor > 1:
        train = long_tailed(train, imbalance_factor, imbalance)
    if validation is None and holdout > 0:
        train, validation = hold_out(train, holdout)
    return Parts(found.kind, train, validation, found.parts.get("test"))


def open_part(
    path: str, part: str, class_names: tuple[str, ...], image_column: str = "", label_column: str = ""
) -> ImageList:
    """The images at `path` on which a model of these classes is to be scored: its part `part`, or all of them where
    it is not divided into parts. Raises UserError where they do not fit the classes."""
    found = find_parts(path, image_column, label_column)
    if part not in found.parts and found.divided:
        raise UserError(f"{path} has no {part} part; it has {', '.join(found.parts)}: choose one with --split")
    images = found.parts[part if found.divided else "train"]
    if not found.named:
        beyond = images.labels_N[images.labels_N >= len(class_names)]
        if len(beyond):
            raise UserError(
                f"{path} has label {beyond[0]}, but the model knows the classes 0 to {len(class_names) - 1}"
            )
        return replace(images, class_names=class_names)
    seen = [name for name, count in zip(images.class_names, images.class_counts, strict=True) if count]
    unknown = [name for name in seen if name not in class_names]
    if unknown:
        raise UserError(f"{path} has a class '{unknown[0]}' that the model does not know; score it without that class")
    of_model = {name: label for label, name in enumerate(class_names)}
    labels_N = np.array([of_model.get(name, 0) for name in images.class_names], np.int64)[images.labels_N]
    return replace(images, labels_N=labels_N, class_names=class_names)


def training_problems(train: ImageList) -> list[str]:
    """Why `train` cannot be trained on; empty where it can."""
    if len(train.class_names) == 1:
        return [f"{train.origin} has one class only ('{train.class_names[0]}'); a classifier needs two or more"]
    return [
        f"{train.origin}: class '{name}' has no training images; add some or remove the class"
        for name, count in zip(train.class_names, train.class_counts, strict=True)
        if count == 0
    ]


def _open_digits() -> Found:
    from sklearn.datasets import load_digits  # over a second of import, needed here alone

    bunch: Any = load_digits()
    gray = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    labels = bunch.target.astype(np.int64)
    names = tuple(str(digit) for digit in range(10))
    everything = ImageList(
        DIGITS, PixelArrays("scikit-learn's digits", np.repeat(gray[..., None], 3, axis=3)), labels, names
    )
    test = np.concatenate([np.flatnonzero(labels == digit)[-_DIGITS_TEST_PER_CLASS:] for digit in range(10)])
    rest = np.setdiff1d(np.arange(len(labels)), test)
    parts = {"train": everything.take(rest), "test": everything.take(np.sort(test))}
    return Found("embedded digits", parts, divided=True)


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _open_class_folders(root: Path) -> Found:
    if not root.is_dir():
        raise UserError(f"{root} is a file, but no Parquet file; name a folder of class folders")
    folders = _folders(root)
    if not folders:
        raise UserError(f"{root} has no sub-folders; put the images of each class in a folder of its own there")
    notes: list[str] = []
    part_folders = _part_folders(root, folders, notes)
    divided = bool(part_folders)
    first = part_folders.get("train", next(iter(part_folders.values()))) if divided else root
    names = tuple(folder.name for folder in _folders(first))
    lists = {part: _class_folders(folder, names, notes) for part, folder in (part_folders or {"train": root}).items()}
    return Found("class folders", lists, divided, notes=tuple(notes))


def _part_folders(root: Path, folders: list[Path], notes: list[str]) -> dict[str, Path]:
    """The folders that are parts; none where all are classes. `train` may be a class: then it holds pictures, not
    folders."""
    candidates = [folder for folder in folders if folder.name.lower() in _PARTS and _folders(folder)]
    others = [folder.name for folder in folders if folder not in candidates]
    parts: dict[str, Path] = {}
    for folder in candidates:
        part = _PARTS[folder.name.lower()]
        if part in parts:
            raise UserError(f"{root} has two {part} parts, {parts[part].name}/ and {folder.name}/; keep one of them")
        parts[part] = folder
    if others and "train" not in parts:
        return {}
    if others:
        notes.append(f"{root}: beside train/, these folders are no part and were passed over: {', '.join(others)}")
    return parts


def _class_folders(root: Path, names: tuple[str, ...], notes: list[str]) -> ImageList:
    unknown = [folder.name for folder in _folders(root) if folder.name not in names]
    if unknown:
        raise UserError(f"{root / unknown[0]} is no class of the training part ({len(names)} classes); remove it")
    paths: list[str] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(names):
        # rglob so that a class may be sorted into further folders; sorted so that every machine sees one order.
        folder = root / name
        files = sorted(entry for entry in folder.rglob("*") if entry.is_file()) if folder.is_dir() else []
        # Hidden folders hold thumbnails and notebook checkpoints: copies of images that are there already.
        files = [entry for entry in files if not any(part[0] == "." for part in entry.relative_to(folder).parts)]
        images = [entry for entry in files if entry.suffix.lower() in SUFFIXES]
        others += len(files) - len(images)
        paths += [entry.relative_to(root).as_posix() for entry in images]
        labels += [label] * len(images)
    if others:
        notes.append(f"{root}: {others} files that are not images by their ending were passed over")
    if not paths:
        raise UserError(f"{root} holds no images in its class folders (known endings: {' '.join(sorted(SUFFIXES))})")
    return ImageList(str(root), ImageFiles(root, tuple(paths)), np.array(labels, dtype=np.int64), names)


# ---------------------------------------------------------------------------------------------- Parquet


def _parquet_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix == ".parquet" else []
    return sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])


def _open_parquet(files: list[Path], image_column: str, label_column: str) -> Found:
    by_part: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in files:
        part = _PARTS.get(file.stem.replace("_", "-").split("-")[0].lower())
        if part:
            by_part.setdefault(part, []).append(file)
        else:
            others.append(file)
    divided = bool(by_part)
    notes = [f"{file}: no part's name (train, val, test) begins its own, passed over" for file in others if divided]
    columns = {
        part: _read_parquet(part_files, image_column, label_column)
        for part, part_files in (by_part or {"train": others}).items()
    }
    _, labels, named = columns.get("train", next(iter(columns.values())))
    if not named and labels.max() >= len(labels):
        raise UserError(f"{files[0]}: label {labels.max()} is out of range: there are {len(labels)} rows only")
    names = named or tuple(str(label) for label in range(int(labels.max()) + 1))
    parts: dict[str, ImageList] = {}
    for part, (column, labels, own_names) in columns.items():
        origin = ", ".join(str(file) for file in by_part.get(part, others))
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(wrong):
            raise UserError(
                f"{origin}: row {wrong[0]} has label {labels[wrong[0]]}, which is out of range: the classes are "
                f"0 to {len(names) - 1}"
            )
        if own_names != named:
            raise UserError(f"{origin} names its classes differently from the training part; make them agree")
        images = EncodedImages(origin, column, np.arange(len(labels)))
        parts[part] = ImageList(origin, images, labels, names)
    return Found("Parquet", parts, divided, bool(named), tuple(notes))


def _read_parquet(files: list[Path], image_column: str, label_column: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """The column of encoded images, the labels, and the class names (empty where the file gives none)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"reading {files[0]} needs pyarrow: pip install 'equipoise[parquet]'") from None
    try:
        schema = pq.read_schema(files[0])
        image_column = image_column or _only(
            [
                field.name
                for field in schema
                if pa.types.is_binary(field.type)
                or pa.types.is_large_binary(field.type)
                or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
            ],
            files[0],
            "images (bytes)",
            "image_column",
        )
        label_column = label_column or _only(
            [field.name for field in schema if pa.types.is_integer(field.type)],
            files[0],
            "labels (integers)",
            "label_column",
        )
        for column in (image_column, label_column):
            if column not in schema.names:
                raise UserError(f"{files[0]} has no column '{column}'; it has {', '.join(schema.names)}")
        table = pa.concat_tables(pq.read_table(file, columns=[image_column, label_column]) for file in files)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{files[0]} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise UserError(f"{files[0]} has no rows")
    images = table.column(image_column)
    if pa.types.is_struct(images.type):
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise UserError(f"{files[0]}: column '{image_column}' holds {images.type}, not image bytes")
    labels = table.column(label_column)
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise UserError(f"{files[0]}: column '{label_column}' must hold a whole number in every row")
    return images, labels.to_numpy().astype(np.int64), _class_names(schema.metadata, label_column)


def _only(columns: list[str], file: Path, what: str, field: str) -> str:
    if len(columns) == 1:
        return columns[0]
    found = f"several columns that could be {what}: {', '.join(columns)}" if columns else f"no column of {what}"
    raise UserError(f"{file} has {found}; name it with --set data.{field}=NAME")


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str) -> tuple[str, ...]:
    """The names that the `datasets` library keeps in the schema's metadata, if it wrote the file."""
    import json

    try:
        info = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label_column]
        return tuple(str(name) for name in info["names"])
    except (KeyError, ValueError, TypeError):
        return ()


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
