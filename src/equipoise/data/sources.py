"""The data at a path is recognised and becomes image lists, divided into the parts that a run needs. Which data is
meant, and how it is read, a recipe says in its table `data`. CIFAR's files are pickles, and a pickle is a program:
torchvision loads one only if its MD5 is that of the published file."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.base.errors import UserError, several
from equipoise.config.recipe import Data
from equipoise.data.decode import BadImageError, bad_images
from equipoise.data.folders import open_class_folders
from equipoise.data.images import DIGITS, Found, ImageFiles, ImageList, Parts, PixelArrays, absent_files, refuse_outside
from equipoise.data.inspection import Inspection, inspect
from equipoise.data.lists import BENCHMARKS, find_list, open_lists
from equipoise.data.names import normal, unknown_classes
from equipoise.data.packed import FOLDERS, benchmark_of, holds_samples, open_packed
from equipoise.data.parquet import holds_images, open_parquet
from equipoise.data.rows import TABLES, NoTableError
from equipoise.data.storage import copied, folder_of
from equipoise.data.subsets import grouped, hold_out, long_tailed
from equipoise.data.tables import find_tables, open_tables

LISTS = {"train": "data.train_list", "validation": "data.val_list", "test": "data.test_list"}  # part -> recipe field
PARTS = tuple(LISTS)
_DIGITS_TEST_PER_CLASS = 50
_CIFAR = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100"}


def named_lists(data: Data) -> dict[str, Path]:
    """The list files that a recipe names, by part."""
    files = {part: getattr(data, key.removeprefix("data.")) for part, key in LISTS.items()}
    return {part: _local(file) for part, file in files.items() if file}


def _local(file: str) -> Path:
    """A file here, or the copy here of one at a URL."""
    name = file.partition("?")[0].rpartition("/")[2]
    return copied(file) / name if "://" in file else Path(os.path.expanduser(file))


def _files(root: Path, suffix: str) -> list[Path]:
    """The files of this kind at `root`: itself, or those in it and in its `data/`, `train/`, ..."""
    if root.is_file():
        return [root] if root.suffix.lower() == suffix else []
    return sorted(file for folder in FOLDERS for file in (root / folder).glob(f"*{suffix}"))


def _packed(root: Path) -> list[Path]:
    """The tars of packed images at `root`."""
    return [file for file in _files(root, ".tar") if holds_samples(root, file)]


def _refuse_links(root: Path, files: Sequence[Path], data: Data) -> None:
    if root.is_dir() and not data.allow_outside:
        for file in files:
            refuse_outside(root, file)


def _but_for(found: Found, others: Sequence[Path]) -> Found:
    notes = (f"{file} holds no images with labels, and was passed over" for file in others)
    return replace(found, notes=[*found.notes, *notes])


def recognise(path: str) -> str:
    """Which published data set is at `path`, by the names of its own files and folders, or as packed images say:
    'digits', 'imagenet-lt', 'inat2018', 'places-lt', 'cifar10', 'cifar100'; '' for anything else, and for a URL."""
    if path in (DIGITS, "") or "://" in path:
        return path if path == DIGITS else ""
    root = _existing(path)
    if packed := _packed(root):
        return benchmark_of(packed[0])
    if archive := find_cifar(root):
        return archive[1]
    if (root / "train_val2018").is_dir():
        return "inat2018"
    for name, published in BENCHMARKS.items():
        found = [file for known in published.values() if (file := find_list(root, known))]
        # Those of ImageNet may be in the working directory, where the authors' code has them.
        is_imagenet = name == "imagenet-lt" and (root / "train" / "n01440764").is_dir()
        if any(is_imagenet or file.is_relative_to(root) for file in found):
            return name
    return ""


def as_recognised(data: Data) -> Data:
    """The data with the benchmark that it is recognised as, where nothing says what it is."""
    benchmark = data.benchmark or recognise(data.path)
    return replace(data, benchmark=benchmark if benchmark in BENCHMARKS else "")


def find_parts(data: Data | str) -> Found:
    """The data at a path, before anything is asked of it. Raises UserError for what cannot be read, and for files that
    a link leads out of the folder."""
    data = Data(data) if isinstance(data, str) else data
    found = _find(data)
    faults, root = dict(found.faults), Path(os.path.expanduser(data.path))
    files = {name: part.images for name, part in found.parts.items() if isinstance(part.images, ImageFiles)}
    for name, images in files.items():
        bounds = None if data.allow_outside else root if root.is_dir() else root.parent
        if absent := [] if images.url else absent_files(images, bounds):
            number = f"{len(absent):,} of the {len(images):,} images of {found.parts[name].origin} are missing"
            where = "its paths are looked for below the folder given as data"
            faults[name] = f"{images.name(absent[0])} is not there, and {number}; {where}"
    for one, other in combinations(files, 2):
        shared = np.intersect1d(files[one].paths_N, files[other].paths_N)
        if len(shared) and files[one].root == files[other].root:
            number = f"{several(len(shared), 'image')} of the {other} part are in the {one} part too"
            also = f"{number} (first: {os.fsdecode(shared[0])})"
            faults.setdefault(other, f"{also}: figures on them would be too good; name each image once")
    return replace(found, faults=faults)


def _find(data: Data) -> Found:
    if data.path == DIGITS:
        return _open_digits()
    named, url = named_lists(data), data.path.rstrip("/") if "://" in data.path else ""
    if url and named:
        return open_lists(folder_of(url), named, "", False, url)
    root = copied(url, FOLDERS) if url else _existing(data.path)
    if packed := _packed(root):
        if named:
            raise UserError(f"{root} is packed: its parts are in its files, and no list can divide it otherwise")
        _refuse_links(root, packed, data)
        return _but_for(open_packed(root, packed), [file for file in _files(root, ".tar") if file not in packed])
    if url and not _files(root, ".parquet"):
        how = "pack the images (equipoise pack), name tars as train-{000000..000011}.tar, or a list by --train-list"
        raise UserError(f"no packed images (.tar) or Parquet files are listed at {data.path}: {how}")
    if any(file.suffix.lower() in TABLES for file in named.values()):
        return open_tables(root, named, data)
    if data.benchmark or named:
        return open_lists(root, named, data.benchmark, data.allow_outside)
    archive = find_cifar(root)
    tables = [] if archive else _files(root, ".parquet")
    parquet = [file for file in tables if holds_images(file)]
    _refuse_links(root, [*parquet, *([archive[0], *archive[0].glob("*")] if archive else [])], data)
    if archive:
        return open_cifar(*archive)
    if parquet:
        return _but_for(open_parquet(root, parquet, data), [file for file in tables if file not in parquet])
    if root.is_file() and root.suffix.lower() in TABLES:
        return open_tables(root.parent, {"": root}, data)
    if not root.is_dir() or not find_tables(root):
        return open_class_folders(root, data.class_level)
    return _tables_or_folders(root, data)


def _tables_or_folders(root: Path, data: Data) -> Found:
    """The tables in a folder or, where they do not say which image has which label, its class folders; these too where
    a table names none of the images in them, or does not divide what they divide into parts."""
    folders = None
    with contextlib.suppress(UserError):
        opened = open_class_folders(root, data.class_level)
        folders = None if next(iter(opened.parts.values())).training_problem else opened
    if folders is None or data.image_column or data.label_column:
        return open_tables(root, {}, data, guess=folders is None)
    try:
        tables = open_tables(root, {}, data, guess=False)
    except NoTableError as error:
        return replace(folders, notes=[*folders.notes, f"no table of labels: {error}"])
    shared = _paths(tables) & _paths(folders)
    if shared and (tables.divided or not folders.divided):
        return tables
    why = "does not say the parts" if shared else "names none of these images"
    return replace(folders, notes=[*folders.notes, f"passed over, as it {why}: {tables.described[0]}"])


def _paths(found: Found) -> set[str]:
    return {part.images.name(row) for part in found.parts.values() for row in range(len(part))}


def survey(data: Data, check: bool = False) -> tuple[Found, list[str], list[BadImageError], Inspection | None]:
    """The data at a path, recognised where nothing says what it is; what training refuses it for; its bad images, but
    of parts with images missing; and with `check`, for which every image is decoded, all that this shows."""
    found = with_groups(find_parts(as_recognised(data)), data)
    problems = [*found.faults.values()]
    if "train" in found.parts and not problems:
        try:
            divide(found, data)
        except UserError as error:
            problems.append(str(error).partition("; noted: ")[0])
    whole = {name: part for name, part in found.parts.items() if name not in found.faults}
    if check:
        inspection = inspect(whole)
        return found, problems, inspection.bad, inspection
    bad = [error for part in whole.values() for error in bad_images(part)]
    return found, problems, bad, None


def _existing(path: str) -> Path:
    if not path:
        raise UserError("this recipe needs data: name a folder with --data FOLDER")
    root = Path(os.path.expanduser(path))
    if not os.path.exists(root):  # nor where it is too long, or has a zero byte in it, for which Path.exists raises
        raise UserError(f"there is no file or folder at {root}; if a run's data have moved, name it by --data")
    return root


def open_data(data: Data) -> Parts:
    """The data set (see `find_parts`) to train on: an `imbalance_factor` above 1 cuts a long tail out of the training
    part; then, where there is no validation part, the share `holdout` of it becomes one. Raises UserError for what
    cannot be a training set: an empty class, one class only, images that are missing, parts that overlap."""
    return divide(with_groups(find_parts(data), data), data)


def divide(found: Found, data: Data) -> Parts:
    """What was found as it is trained on: see `open_data`."""
    if found.faults:
        raise UserError(next(iter(found.faults.values())))
    if "train" not in found.parts:
        raise UserError(f"{data.path} has no training part; name it train/ (folders) or train-*.parquet")
    train, validation = found.parts["train"], found.parts.get("validation")
    if problem := train.training_problem:
        raise UserError("; noted: ".join([problem, *found.notes]))
    if data.imbalance_factor > 1:
        train = long_tailed(train, data.imbalance_factor, data.imbalance)
    if data.fold and validation is not None:
        raise UserError(f"{data.path} has a validation part: train on that, without data.fold = {data.fold}")
    notes = found.notes
    if validation is None and (data.holdout > 0 or data.fold):
        train, validation = hold_out(train, data.holdout, data.fold)
        held_out = validation.class_counts if validation else (0,) * len(train.class_counts)
        if none := held_out.count(0):
            notes = [*notes, f"{several(none, 'class')} of which no image is held out for validation"]
    return Parts(found.kind, train, validation, found.parts.get("test"), found.described, notes)


def with_groups(found: Found, data: Data) -> Found:
    """What was found with its images in groups, where `data` or a table has some; noted is which parts share groups."""
    parts = {name: grouped(part, data.group_by) if data.group_by else part for name, part in found.parts.items()}
    groups = {name: set(part.groups_N.tolist()) for name, part in parts.items() if part.groups_N is not None}
    notes = list(found.notes)
    for one, other in combinations(groups, 2):
        if shared := groups[one] & groups[other]:
            number = f"{several(len(shared), 'group')} of the {one} part are in the {other} part too"
            notes.append(f"{number} (first: {min(shared)}): figures would be too good")
    return replace(found, parts=parts, notes=notes)


def labelled_as(images: ImageList, class_names: Sequence[str], named: bool) -> ImageList:
    """The images with the labels that a model of these classes gives. They go by the names of classes, or, where these
    are but numbers (not `named`), by number. Raises UserError where they do not fit the classes."""
    known = {normal(name): label for label, name in enumerate(class_names)}
    new_C = [known.get(normal(name), -1) for name in images.class_names]
    if not named:  # numbers are no names; but where both have names, they must agree
        numbers = zip(images.class_names, class_names, strict=False)
        same = [name == other or name.isdigit() or other.isdigit() for name, other in numbers]
        new_C = [label if label < len(same) and same[label] else -1 for label in range(len(new_C))]
    labels_N = np.array(new_C, np.int64)[images.labels_N]
    if labels_N.min() < 0:
        label = int(images.labels_N[labels_N.argmin()])
        what = unknown_classes([images.class_names[label]], class_names, "model")
        raise UserError(f"{images.origin}: {what} (number {label}): this is other data, or named otherwise")
    return replace(images, labels_N=labels_N, class_names=tuple(class_names))


def part_of(found: Found, part: str, path: str) -> ImageList:
    """The part, or all of what is not divided. Raises UserError where there is none, or images are missing."""
    part = part if found.divided else "train"
    if part in found.faults:
        raise UserError(found.faults[part])
    if part not in found.parts:
        raise UserError(f"{path} has no {part} part; it has {', '.join(found.parts)}: score one of them with --split")
    return found.parts[part]


def _open_digits() -> Found:
    from sklearn.datasets import load_digits  # over a second of import, needed here alone

    bunch: Any = load_digits()
    gray = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    labels = bunch.target.astype(np.int64)
    pixels = PixelArrays("scikit-learn's digits", np.repeat(gray[..., None], 3, axis=3))
    everything = ImageList(DIGITS, pixels, labels, tuple(map(str, range(10))))
    test_N = np.zeros(len(labels), bool)
    for digit in range(10):
        test_N[np.flatnonzero(labels == digit)[-_DIGITS_TEST_PER_CLASS:]] = True
    parts = {"train": everything.take(np.flatnonzero(~test_N)), "test": everything.take(np.flatnonzero(test_N))}
    return Found("embedded digits", parts, divided=True)


def find_cifar(root: Path) -> tuple[Path, str] | None:
    """By names alone: the folder of an archive's files, `root` or one in it, and 'cifar10' or 'cifar100'."""
    for folder, name in _CIFAR.items():
        for path in (root, root / folder):
            if path.resolve().name == folder and path.is_dir():
                return path, name
    return None


def open_cifar(path: Path, name: str) -> Found:
    """The parts `train` and `test`; of CIFAR-100 the fine labels. Raises UserError for files that are not published."""
    from torchvision.datasets import CIFAR10, CIFAR100  # a second of import, needed here alone

    dataset = CIFAR10 if name == "cifar10" else CIFAR100
    parts: dict[str, ImageList] = {}
    for part in ("train", "test"):
        try:
            with warnings.catch_warnings(action="ignore"):  # numpy: how Python 2 wrote arrays is deprecated
                read = dataset(path.resolve().parent, train=part == "train")
        except (RuntimeError, OSError):
            why = "a file is missing or cannot be read, or its MD5 differs, so that none was loaded"
            raise UserError(f"{path} is not the published {dataset.__name__}: {why}; take the archive anew") from None
        images = PixelArrays(f"{path} ({part})", np.ascontiguousarray(read.data))
        parts[part] = ImageList(str(path), images, np.array(read.targets, np.int64), tuple(read.classes))
    return Found(f"{dataset.__name__} archive (python)", parts, divided=True)
