"""What lies at a path is recognised and becomes image lists, divided into the parts that a run needs.

Six sources: a folder of class folders (`folders.py`), list files (`listfiles.py`), Parquet (`parquet.py`), the CIFAR
archives (`cifar.py`), packed images (`packed.py`), and scikit-learn's digits inside its wheel.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.base.progress import counted
from equipoise.config.recipe import Recipe, field_value, find_field
from equipoise.data.cifar import find_cifar, open_cifar
from equipoise.data.decode import BadImageError, bad_images
from equipoise.data.folders import open_class_folders, subfolders
from equipoise.data.images import (
    DIGITS,
    Found,
    ImageList,
    Parts,
    PixelArrays,
    hold_out,
    long_tailed,
    refuse_outside,
    training_problems,
)
from equipoise.data.lists import (
    BENCHMARKS,
    absence,
    absent_images,
    absent_list,
    departures,
    find_list,
    identity,
    image_lists,
    links,
    overlap,
    read_list,
)
from equipoise.data.packed import open_packed, packed_files, read_about
from equipoise.data.parquet import open_parquet, parquet_files

_DIGITS_TEST_PER_CLASS = 50
_WORDNET_ID = re.compile(r"n\d{8}")
_IMAGENET_FOLDERS = 500  # ImageNet-2012 has 1,000; the subsets of it that are shared as class folders have 10 to 200


@dataclass(frozen=True)
class Source:
    """Where data lies and how it is to be read. `benchmark`: one of `listfiles.BENCHMARKS`, whose lists say which
    images are meant; `lists`: list files by part, instead of those. The columns are those of Parquet ('' finds them).
    `allow_outside`: what lies there may be links, and paths of lists, to images elsewhere."""

    path: str
    benchmark: str = ""
    lists: Mapping[str, str] = field(default_factory=dict[str, str])
    image_column: str = ""
    label_column: str = ""
    allow_outside: bool = False


def recognise(path: str) -> str:
    """Which published data set lies at `path`, by its names alone: 'digits', 'imagenet-lt', 'inat2018', 'places-lt',
    'cifar10', 'cifar100'; '' for anything else."""
    if path in (DIGITS, ""):
        return path
    root = _existing(path)
    packed = packed_files(root)
    if packed:
        return read_about(packed[0])["benchmark"]
    archive = find_cifar(root)
    if archive is not None:
        return f"cifar{archive.classes}"
    if not root.is_dir():
        return ""
    if (root / "train_val2018").is_dir():
        return "inat2018"
    for name, benchmark in BENCHMARKS.items():
        for known in benchmark.lists.values():
            if (root / known.name).is_file() or (root / benchmark.folder / known.name).is_file():
                return name
    for part in ("train", "val"):
        folders = subfolders(root / part) if (root / part).is_dir() else []
        if len([folder for folder in folders if _WORDNET_ID.fullmatch(folder.name)]) >= _IMAGENET_FOLDERS:
            return "imagenet-lt"
    return ""


def _existing(path: str) -> Path:
    if not path:
        raise UserError("this recipe needs data: name a folder with --data FOLDER")
    root = Path(os.path.expanduser(path))
    try:
        root.stat()
    except (OSError, ValueError):  # not there, no permission, too long, a zero byte in it
        raise UserError(
            f"there is no file or folder at {root}; correct the path, or of data that have moved, name it with --data"
        ) from None
    return root


def find_parts(source: Source | str) -> Found:
    """What lies at a source, before anything is asked of it.

    Above class folders there may be `train/`, `val/` and `test/`; Parquet files belong to the part that their name
    begins with; a list file may be the path itself. Raises UserError for what cannot be read.
    """
    source = Source(source) if isinstance(source, str) else source
    if source.path == DIGITS:
        return _open_digits()
    root = _existing(source.path)
    packed = packed_files(root)
    if packed and source.lists:
        raise UserError(f"{root} is packed: its parts are in its files, and no list can divide it otherwise")
    if packed:
        return open_packed(packed)
    if source.benchmark or source.lists:
        return _open_list_files(root, source)
    archive = find_cifar(root)
    tables = parquet_files(root) if archive is None else []
    if root.is_dir() and not source.allow_outside:
        refuse_outside(root, [*tables, *(archive.files() if archive else [])])
    if archive is not None:
        return Found(f"CIFAR-{archive.classes} archive ({archive.form})", open_cifar(archive), divided=True)
    if tables:
        return open_parquet(tables, source.image_column, source.label_column)
    return open_class_folders(root, source.allow_outside)


def open_parts(
    source: Source | str, *, imbalance: str = "exponential", imbalance_factor: float = 1.0, holdout: float = 0.0
) -> Parts:
    """The data set at `source` (see `find_parts`) to train on.

    An `imbalance_factor` above 1 cuts a long tail of that shape out of the training part; then, where there is no
    validation part, the share `holdout` of the training images becomes one. Raises UserError for what cannot be a
    training set: nothing there, an empty class, one class only, images that are not there, parts that overlap.
    """
    found = find_parts(source)
    for absent in found.absent.values():
        raise absent
    if "train" not in found.parts:
        path = source if isinstance(source, str) else source.path
        raise UserError(f"{path} has no training part; name it train/ (folders) or train-*.parquet")
    train, validation = found.parts["train"], found.parts.get("validation")
    for problem in [*training_problems(train), *disagreements(found)]:
        raise UserError(problem)
    if imbalance_factor > 1:
        train = long_tailed(train, imbalance_factor, imbalance)
    if validation is None and holdout > 0:
        train, validation = hold_out(train, holdout)
    return Parts(found.kind, train, validation, found.parts.get("test"), found.described, found.notes)


def open_part(source: Source | str, part: str, class_names: Sequence[str]) -> ImageList:
    """The images at `source` on which a model of these classes is to be scored: its part `part`, or all of them where
    it is not divided into parts. Raises UserError where they do not fit the classes."""
    found = find_parts(source)
    images = part_of(found, part, source if isinstance(source, str) else source.path)
    if not found.named:
        beyond = images.labels_N[images.labels_N >= len(class_names)]
        if len(beyond):
            raise UserError(
                f"{images.origin} has label {beyond[0]}, but the model knows the classes 0 to {len(class_names) - 1}"
            )
        _refuse_other_classes(images, class_names)
        return replace(images, class_names=tuple(class_names))
    seen = [name for name, count in zip(images.class_names, images.class_counts, strict=True) if count]
    unknown = [name for name in seen if name not in class_names]
    if unknown:
        raise UserError(
            f"{images.origin} has a class '{unknown[0]}' that the model does not know; score it without that class"
        )
    of_model = {name: label for label, name in enumerate(class_names)}
    labels_N = np.array([of_model.get(name, 0) for name in images.class_names], np.int64)[images.labels_N]
    return replace(images, labels_N=labels_N, class_names=tuple(class_names))


def _refuse_other_classes(images: ImageList, class_names: Sequence[str]) -> None:
    """Raise UserError where a list's folders call a label otherwise than the model does. Numbers are no names."""
    for label in map(int, np.unique(images.labels_N)):
        listed, known = images.class_names[label], class_names[label]
        if listed != known and not listed.isdigit() and not known.isdigit():
            raise UserError(
                f"{images.origin} has the label {label} for images in {listed}, which is '{known}' to the model: "
                "this is other data, or numbered otherwise"
            )


def part_of(found: Found, part: str, path: str) -> ImageList:
    """The part `part` of what was found at `path`, or all of it where it is not divided. Raises UserError where there
    is no such part or its images are not there."""
    if part in found.absent:
        raise found.absent[part]
    if part not in found.parts and found.divided:
        raise UserError(
            f"{path} has no {part} part; it has {', '.join(found.parts)}: score one of them with equipoise evaluate "
            f"CHECKPOINT --data {path} --split PART"
        )
    images = found.parts[part if found.divided else "train"]
    if found.of_lists and (absent := absent_images(images)):
        raise UserError(absence(images, absent))
    return images


def as_it_lies(source: Source) -> tuple[Source, list[str]]:
    """The source with the benchmark that it is recognised as, where nothing says what it is, or none if its lists are
    not there: then the folders are looked at as they are. And what is wrong then."""
    if source.lists or source.path == DIGITS:
        return source, []
    root, benchmark = _existing(source.path), source.benchmark or recognise(source.path)
    if benchmark not in BENCHMARKS or packed_files(root):
        return replace(source, benchmark=""), []
    parts = BENCHMARKS[benchmark].lists
    if any(find_list(root, benchmark, part) for part in parts):
        return replace(source, benchmark=benchmark), []
    return replace(source, benchmark=""), [str(absent_list(root, benchmark, part)) for part in parts]


def survey(source: Source, check: bool = False) -> tuple[Found, list[str], list[BadImageError]]:
    """What lies at a source, recognised where nothing says what it is; every problem with it as a whole; and its bad
    images: those whose header is none, or with `check` all that cannot be decoded, with a line of progress.

    Raises UserError for what cannot be read at all."""
    source, problems = as_it_lies(source)
    found = find_parts(source)
    problems += [*found.notes, *map(str, found.absent.values()), *disagreements(found)]
    if "train" in found.parts and not found.of_lists:
        problems += training_problems(found.parts["train"])
    bad: list[BadImageError] = []
    for name, part in found.parts.items():
        absent = absent_images(part) if found.of_lists else []
        there = part.take(np.setdiff1d(np.arange(len(part)), absent)) if absent else part
        looked_at = bad_images(there, decoded=check)
        if check:
            looked_at = counted(looked_at, len(there), f"decoding {name}")
        bad += [error for error in looked_at if error is not None]
    return found, problems, bad


def disagreements(found: Found) -> list[str]:
    """What is wrong between list files and the images they name, and between the lists: images that are not there,
    and images that are trained or chosen on and scored on."""
    if not found.of_lists:
        return []
    problems = [absence(part, absent) for part in found.parts.values() if (absent := absent_images(part))]
    ordered = [found.parts[name] for name in ("train", "validation", "test") if name in found.parts]
    return problems + [said for pair in itertools.combinations(ordered, 2) if (said := overlap(*pair))]


# ---------------------------------------------------------------------------------------------- list files


def _open_list_files(root: Path, source: Source) -> Found:
    """Lists named one by one, or else those of a benchmark, wherever they are found."""
    files = {part: Path(os.path.expanduser(file)) for part, file in source.lists.items()}
    absent: dict[str, UserError] = {}
    if not files:
        for part, known in BENCHMARKS[source.benchmark].lists.items():
            file = find_list(root, source.benchmark, part)
            if file is not None:
                files[part] = file
            elif known.blob:  # one without a known fingerprint is not to be had everywhere: go without
                absent[part] = absent_list(root, source.benchmark, part)
    if not files:
        raise next(iter(absent.values()))
    read = {part: read_list(file, source.allow_outside) for part, file in files.items()}
    parts, notes = image_lists(read, root)
    if not source.allow_outside:
        for part in parts.values():
            refuse_outside(root, links(part))
    classes = len(next(iter(parts.values())).class_names)
    published = BENCHMARKS[source.benchmark].lists if source.benchmark and not source.lists else {}
    for part, file in read.items():
        notes += departures(file, classes, part == "train", published.get(part))
    kind = f"list files of {source.benchmark}" if published else "list files"
    # Labels are numbers, the same in every list of a benchmark: names, where folders give some, are for people.
    return Found(
        kind,
        parts,
        divided=True,
        named=False,
        notes=tuple(notes),
        of_lists=True,
        absent=absent,
        described=tuple(identity(file) for file in read.values()),
    )


def write_lists(source: Source, folder: Path) -> list[str]:
    """Write the lists that iNaturalist's official JSON files stand for into `folder`; one line about each.

    Raises UserError where there is no such JSON, or something else lies at the place already.
    """
    root = _existing(source.path)
    told: list[str] = []
    named = source.lists or {"train": "train2018.json", "test": "val2018.json"}
    for part, known in BENCHMARKS["inat2018"].lists.items():
        file = root / named.get(part, known.name) if part in named else None
        if file is None or file.suffix != ".json" or not file.is_file():
            continue
        read = read_list(file)
        written = folder / known.name
        if written.exists() and (not written.is_file() or written.read_bytes() != read.content):
            raise UserError(f"{written} is there already and differs; remove it or name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(written) as opened:
            opened.write(read.content)
        told.append(f"written: {identity(replace(read, file=written))}")
    if not told:
        raise UserError(f"{root} has neither train2018.json nor val2018.json, the official files of iNaturalist 2018")
    return told


# ---------------------------------------------------------------------------------------------- digits


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


LISTS = {"train": "data.train_list", "validation": "data.val_list", "test": "data.test_list"}  # part -> recipe field
PARTS = tuple(LISTS)


def source_of(recipe: Recipe) -> Source:
    """Where `recipe` has its data."""
    data = recipe.data
    named = {part: file for part, key in LISTS.items() if (file := field_value(recipe, find_field(key)))}
    return Source(data.path, data.benchmark, named, data.image_column, data.label_column, data.allow_outside)


def open_data(recipe: Recipe) -> Parts:
    """The data that `recipe` trains on. Raises UserError, see `sources.open_parts`."""
    data = recipe.data
    return open_parts(
        source_of(recipe),
        imbalance=data.imbalance,
        imbalance_factor=data.imbalance_factor,
        holdout=data.holdout,
    )
