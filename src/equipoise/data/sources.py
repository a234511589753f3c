"""The data at a path is recognised and becomes image lists, divided into the parts that a run needs.

Six sources: a folder of class folders (`folders.py`), list files (`lists.py`), Parquet (`parquet.py`), the CIFAR
archives (`cifar.py`), packed images (`packed.py`), and scikit-learn's digits inside its wheel.

Which data is meant, and how it is to be read, a recipe says in its table `data`.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.base.errors import UserError
from equipoise.base.progress import counted
from equipoise.config.recipe import Data
from equipoise.data import lists as list_files
from equipoise.data.cifar import find_cifar, open_cifar
from equipoise.data.decode import BadImageError, bad_images
from equipoise.data.folders import open_class_folders
from equipoise.data.images import (
    DIGITS,
    Found,
    ImageList,
    Parts,
    PixelArrays,
    hold_out,
    long_tailed,
    missing_files,
    refuse_outside,
    training_problem,
)
from equipoise.data.lists import BENCHMARKS, find_list
from equipoise.data.packed import open_packed, packed_files
from equipoise.data.parquet import open_parquet, parquet_files

LISTS = {"train": "data.train_list", "validation": "data.val_list", "test": "data.test_list"}  # part -> recipe field
PARTS = tuple(LISTS)
_DIGITS_TEST_PER_CLASS = 50
_FIRST_OF_IMAGENET = Path("train", "n01440764")


def named_lists(data: Data) -> dict[str, str]:
    """The list files that a recipe names, by part."""
    files = {part: getattr(data, key.removeprefix("data.")) for part, key in LISTS.items()}
    return {part: file for part, file in files.items() if file}


# ---------------------------------------------------------------------------------------------- what a path holds


def recognise(path: str) -> str:
    """Which published data set is at `path`, by the names of its own files and folders: 'digits', 'imagenet-lt',
    'inat2018', 'places-lt', 'cifar10', 'cifar100'; '' for anything else. A packed file says itself what it was."""
    if path in (DIGITS, ""):
        return path
    root = _existing(path)
    if packed := packed_files(root):
        return open_packed(packed).benchmark
    if archive := find_cifar(root):
        return f"cifar{archive.classes}"
    if (root / "train_val2018").is_dir():
        return "inat2018"
    for name, published in BENCHMARKS.items():
        found = [file for known in published.values() if (file := find_list(root, known))]
        # Those of ImageNet may be in the working directory, where the authors' code has them.
        if any(file.is_relative_to(root) for file in found):
            return name
        if found and name == "imagenet-lt" and (root / _FIRST_OF_IMAGENET).is_dir():
            return name
    return ""


def as_recognised(data: Data) -> tuple[Data, list[str]]:
    """The data with the benchmark that it is recognised as, where nothing says what it is, or none if its lists are
    missing: then the folders are looked at as they are. And what is wrong then."""
    if named_lists(data) or data.path == DIGITS or packed_files(_existing(data.path)):
        return data, []
    root, benchmark = _existing(data.path), data.benchmark or recognise(data.path)
    published = BENCHMARKS.get(benchmark, {})
    if not published:
        return data, []
    if any(find_list(root, known) for known in published.values()):
        return replace(data, benchmark=benchmark), []
    return replace(data, benchmark=""), [list_files.absent_list(root, *known) for known in published.items()]


def find_parts(data: Data | str) -> Found:
    """The data at a path, before anything is asked of it.

    Above class folders there may be `train/`, `val/` and `test/`; Parquet files belong to the part that their name
    begins with; a list file may be the path itself. Raises UserError for what cannot be read.
    """
    data = Data(data) if isinstance(data, str) else data
    if data.path == DIGITS:
        return _open_digits()
    root = _existing(data.path)
    if packed := packed_files(root):
        if named_lists(data):
            raise UserError(f"{root} is packed: its parts are in its files, and no list can divide it otherwise")
        return open_packed(packed)
    if data.benchmark or named_lists(data):
        return _open_list_files(root, data)
    archive = find_cifar(root)
    tables = parquet_files(root) if archive is None else []
    if root.is_dir() and not data.allow_outside:
        for file in [*tables, *([archive.path, *archive.path.glob("*")] if archive else [])]:
            refuse_outside(root, file)
    if archive is not None:
        return Found(f"CIFAR-{archive.classes} archive ({archive.form})", open_cifar(archive), divided=True)
    if tables:
        return open_parquet(tables, data.image_column, data.label_column)
    return open_class_folders(root, data.allow_outside)


def survey(data: Data, check: bool = False) -> tuple[Found, list[str], list[BadImageError]]:
    """The data at a path, recognised where nothing says what it is; every problem with it as a whole; and its bad
    images: those whose header is none, or with `check` all that cannot be decoded, with a line of progress.

    Raises UserError for what cannot be read at all."""
    data, problems = as_recognised(data)
    found = find_parts(data)
    problems += [*found.notes, *found.absent.values(), *disagreements(found)]
    if "train" in found.parts and (problem := training_problem(found.parts["train"])):
        problems.append(problem)
    bad: list[BadImageError] = []
    for name, part in found.parts.items():
        there = part.take(np.setdiff1d(np.arange(len(part)), found.missing.get(name, ())))
        looked_at = bad_images(there, decoded=check)
        if check:
            looked_at = counted(looked_at, len(there), f"decoding {name}")
        bad += [error for error in looked_at if error is not None]
    return found, problems, bad


def disagreements(found: Found) -> list[str]:
    """What is wrong between list files and the images they name, and between the lists: images that are missing, and
    images that are trained or chosen on and scored on."""
    absences = [_absence(found, part) for part in found.missing]
    pairs = itertools.combinations([found.parts[part] for part in found.missing], 2)
    overlaps = [list_files.overlap(*pair) for pair in pairs]
    return [said for said in absences + overlaps if said]


def _absence(found: Found, part: str) -> str | None:
    """One line about the images of a list that are missing; None where none are."""
    images, missing = found.parts[part], found.missing.get(part)
    if not missing:
        return None
    return (
        f"{images.images.name(missing[0])} is not there, and {len(missing):,} of the {len(images):,} images of "
        f"{images.origin} are missing; its paths are looked for below the folder given as data"
    )


def _existing(path: str) -> Path:
    if not path:
        raise UserError("this recipe needs data: name a folder with --data FOLDER")
    root = Path(os.path.expanduser(path))
    try:
        root.stat()
    except (OSError, ValueError):  # missing, no permission, too long, a zero byte in it
        raise UserError(
            f"there is no file or folder at {root}; correct the path; if the data have moved, give the new folder with "
            "--data"
        ) from None
    return root


# ---------------------------------------------------------------------------------------------- to train, to score


def open_data(data: Data) -> Parts:
    """The data set (see `find_parts`) to train on.

    An `imbalance_factor` above 1 cuts a long tail of that shape out of the training part; then, where there is no
    validation part, the share `holdout` of the training images becomes one. Raises UserError for what cannot be a
    training set: nothing there, an empty class, one class only, images that are missing, parts that overlap.
    """
    found = find_parts(data)
    if found.absent:
        raise UserError(next(iter(found.absent.values())))
    if "train" not in found.parts:
        raise UserError(f"{data.path} has no training part; name it train/ (folders) or train-*.parquet")
    train, validation = found.parts["train"], found.parts.get("validation")
    if problem := training_problem(train) or next(iter(disagreements(found)), None):
        raise UserError(problem)
    if data.imbalance_factor > 1:
        train = long_tailed(train, data.imbalance_factor, data.imbalance)
    if validation is None and data.holdout > 0:
        train, validation = hold_out(train, data.holdout)
    return Parts(found.kind, train, validation, found.parts.get("test"), found.described, found.notes)


def open_part(data: Data, part: str, class_names: Sequence[str]) -> ImageList:
    """The images on which a model of these classes is to be scored: the part `part`, or all of them where they are not
    divided into parts. Labels go by the names of classes, or, where these are but numbers, by number. Raises UserError
    where they do not fit the classes."""
    found = find_parts(data)
    images = part_of(found, part, data.path)
    seen = np.unique(images.labels_N).tolist()
    if not found.named:
        if seen[-1] >= len(class_names):
            raise UserError(
                f"{images.origin} has label {seen[-1]}, but the model knows the classes 0 to {len(class_names) - 1}"
            )
        for label in seen:
            listed, known = images.class_names[label], class_names[label]
            if listed != known and not listed.isdigit() and not known.isdigit():
                raise UserError(
                    f"{images.origin} has the label {label} for images in {listed}, which is '{known}' to the model: "
                    "this is other data, or numbered otherwise"
                )
        return replace(images, class_names=tuple(class_names))
    of_model = {name: label for label, name in enumerate(class_names)}
    for label in seen:
        if images.class_names[label] not in of_model:
            raise UserError(
                f"{images.origin} has a class '{images.class_names[label]}' that the model does not know; score it "
                "without that class"
            )
    labels_N = np.array([of_model.get(name, 0) for name in images.class_names], np.int64)[images.labels_N]
    return replace(images, labels_N=labels_N, class_names=tuple(class_names))


def part_of(found: Found, part: str, path: str) -> ImageList:
    """The part `part` of what was found at `path`, or all of it where it is not divided. Raises UserError where there
    is no such part or its images are missing."""
    if said := found.absent.get(part):
        raise UserError(said)
    if part not in found.parts and found.divided:
        raise UserError(
            f"{path} has no {part} part; it has {', '.join(found.parts)}: score one of them with equipoise evaluate "
            f"CHECKPOINT --data {path} --split PART"
        )
    if said := _absence(found, part if found.divided else "train"):
        raise UserError(said)
    return found.parts[part if found.divided else "train"]


# ---------------------------------------------------------------------------------------------- list files, digits


def _open_list_files(root: Path, data: Data) -> Found:
    """Lists named one by one, or else those of a benchmark, wherever they are found."""
    files = {part: Path(os.path.expanduser(file)) for part, file in named_lists(data).items()}
    published = {} if files else BENCHMARKS[data.benchmark]
    absent: dict[str, str] = {}
    for part, known in published.items():
        if file := find_list(root, known):
            files[part] = file
        elif known.blob:  # one without a known fingerprint is not to be had everywhere: go without
            absent[part] = list_files.absent_list(root, part, known)
    if not files:
        raise UserError(next(iter(absent.values())))
    read = {part: list_files.read_list(file, data.allow_outside) for part, file in files.items()}
    parts, notes = list_files.image_lists(read, root)
    bounds = None if data.allow_outside else root
    for part, file in read.items():
        notes += list_files.departures(file, published.get(part))
    return Found(
        f"list files of {data.benchmark}" if published else "list files",
        parts,
        divided=True,
        named=False,  # labels are numbers, the same in all lists of a benchmark: names of folders are for people
        notes=tuple(notes),
        missing={part: missing_files(images, bounds) for part, images in parts.items()},
        absent=absent,
        described=tuple(map(list_files.identity, read.values())),
        benchmark=data.benchmark if published else "",
    )


def _open_digits() -> Found:
    from sklearn.datasets import load_digits  # over a second of import, needed here alone

    bunch: Any = load_digits()
    gray = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    labels = bunch.target.astype(np.int64)
    pixels = PixelArrays("scikit-learn's digits", np.repeat(gray[..., None], 3, axis=3))
    everything = ImageList(DIGITS, pixels, labels, tuple(map(str, range(10))))
    test = np.concatenate([np.flatnonzero(labels == digit)[-_DIGITS_TEST_PER_CLASS:] for digit in range(10)])
    rest = np.setdiff1d(np.arange(len(labels)), test)
    parts = {"train": everything.take(rest), "test": everything.take(np.sort(test))}
    return Found("embedded digits", parts, divided=True)
