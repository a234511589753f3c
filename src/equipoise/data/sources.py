"""The data at a path is recognised and becomes image lists, divided into the parts that a run needs.

Six sources: a folder of class folders (`folders.py`), list files (`lists.py`), Parquet (`parquet.py`), the CIFAR
archives (`cifar.py`), packed images (`packed.py`), and scikit-learn's digits inside its wheel.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.base.progress import counted
from equipoise.config.recipe import Recipe, field_value, find_field
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
    refuse_outside,
    training_problems,
)
from equipoise.data.lists import BENCHMARKS, image_lists, read_list
from equipoise.data.packed import open_packed, packed_files, read_about
from equipoise.data.parquet import open_parquet, parquet_files

LISTS = {"train": "data.train_list", "validation": "data.val_list", "test": "data.test_list"}  # part -> recipe field
PARTS = tuple(LISTS)
_DIGITS_TEST_PER_CLASS = 50
# The first and the last classes of ImageNet-2012. Subsets that are shared as class folders lack some of them.
_IMAGENET_CLASSES = tuple(
    f"n{wordnet_id:08}" for wordnet_id in (1440764, 1443537, 1484850, 1491361, 13052670, 13054560, 13133613, 15075141)
)


@dataclass(frozen=True)
class Source:
    """Where data is and how it is to be read. `benchmark`: one of `lists.BENCHMARKS`, whose lists say which images are
    meant; `lists`: list files by part, instead of those. The columns are those of Parquet ('' finds them).
    `allow_outside`: there may be links, and paths of lists, to images outside the folder."""

    path: str
    benchmark: str = ""
    lists: Mapping[str, str] = field(default_factory=dict[str, str])
    image_column: str = ""
    label_column: str = ""
    allow_outside: bool = False


def source_of(recipe: Recipe) -> Source:
    """Where `recipe` has its data."""
    data = recipe.data
    named = {part: file for part, key in LISTS.items() if (file := field_value(recipe, find_field(key)))}
    return Source(data.path, data.benchmark, named, data.image_column, data.label_column, data.allow_outside)


# ---------------------------------------------------------------------------------------------- what a path holds


def recognise(path: str) -> str:
    """Which published data set is at `path`, by the names of its own files and folders: 'digits', 'imagenet-lt',
    'inat2018', 'places-lt', 'cifar10', 'cifar100'; '' for anything else. A packed file says itself what it was."""
    if path in (DIGITS, ""):
        return path
    root = _existing(path)
    if packed := packed_files(root):
        return read_about(packed[0]).benchmark
    if archive := find_cifar(root):
        return f"cifar{archive.classes}"
    for name, benchmark in BENCHMARKS.items():
        places = (place for part in benchmark.lists for place in list_files.list_places(root, name, part))
        if any(place.is_file() for place in places):
            return name
    if (root / "train_val2018").is_dir():
        return "inat2018"
    if any(all((root / part / name).is_dir() for name in _IMAGENET_CLASSES) for part in ("train", "val")):
        return "imagenet-lt"
    return ""


def as_recognised(source: Source) -> tuple[Source, list[str]]:
    """The source with the benchmark that it is recognised as, where nothing says what it is, or none if its lists are
    missing: then the folders are looked at as they are. And what is wrong then."""
    if source.lists or source.path == DIGITS:
        return source, []
    root, benchmark = _existing(source.path), source.benchmark or recognise(source.path)
    if benchmark not in BENCHMARKS or packed_files(root):
        return replace(source, benchmark=""), []
    parts = BENCHMARKS[benchmark].lists
    if any(list_files.find_list(root, benchmark, part) for part in parts):
        return replace(source, benchmark=benchmark), []
    return replace(source, benchmark=""), [list_files.absent_list(root, benchmark, part) for part in parts]


def find_parts(source: Source | str) -> Found:
    """The data at a source, before anything is asked of it.

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
        refuse_outside(root, [*tables, *([archive.path, *archive.path.glob("*")] if archive else [])])
    if archive is not None:
        return Found(f"CIFAR-{archive.classes} archive ({archive.form})", open_cifar(archive), divided=True)
    if tables:
        return open_parquet(tables, source.image_column, source.label_column)
    return open_class_folders(root, source.allow_outside)


def survey(source: Source, check: bool = False) -> tuple[Found, list[str], list[BadImageError]]:
    """The data at a source, recognised where nothing says what it is; every problem with it as a whole; and its bad
    images: those whose header is none, or with `check` all that cannot be decoded, with a line of progress.

    Raises UserError for what cannot be read at all."""
    source, problems = as_recognised(source)
    found = find_parts(source)
    problems += [*found.notes, *found.absent.values(), *disagreements(found)]
    if "train" in found.parts:
        problems += training_problems(found.parts["train"])
    bad: list[BadImageError] = []
    for name, part in found.parts.items():
        absent = list_files.absent_images(part) if found.of_lists else []
        there = part.take(np.setdiff1d(np.arange(len(part)), absent)) if absent else part
        looked_at = bad_images(there, decoded=check)
        if check:
            looked_at = counted(looked_at, len(there), f"decoding {name}")
        bad += [error for error in looked_at if error is not None]
    return found, problems, bad


def disagreements(found: Found) -> list[str]:
    """What is wrong between list files and the images they name, and between the lists: images that are missing, and
    images that are trained or chosen on and scored on."""
    if not found.of_lists:
        return []
    ordered = [found.parts[name] for name in PARTS if name in found.parts]
    overlaps = (list_files.overlap(*pair) for pair in itertools.combinations(ordered, 2))
    return [said for said in (*map(list_files.absence, ordered), *overlaps) if said]


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


def open_data(recipe: Recipe) -> Parts:
    """The data that `recipe` trains on. Raises UserError, see `open_parts`."""
    data = recipe.data
    return open_parts(
        source_of(recipe), imbalance=data.imbalance, imbalance_factor=data.imbalance_factor, holdout=data.holdout
    )


def open_parts(
    source: Source | str, *, imbalance: str = "exponential", imbalance_factor: float = 1.0, holdout: float = 0.0
) -> Parts:
    """The data set at `source` (see `find_parts`) to train on.

    An `imbalance_factor` above 1 cuts a long tail of that shape out of the training part; then, where there is no
    validation part, the share `holdout` of the training images becomes one. Raises UserError for what cannot be a
    training set: nothing there, an empty class, one class only, images that are missing, parts that overlap.
    """
    found = find_parts(source)
    if found.absent:
        raise UserError(next(iter(found.absent.values())))
    if "train" not in found.parts:
        path = source if isinstance(source, str) else source.path
        raise UserError(f"{path} has no training part; name it train/ (folders) or train-*.parquet")
    train, validation = found.parts["train"], found.parts.get("validation")
    if problems := [*training_problems(train), *disagreements(found)]:
        raise UserError(problems[0])
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
    seen = {label: images.class_names[label] for label in np.unique(images.labels_N).tolist()}
    if not found.named:
        _refuse_other_labels(images.origin, seen, class_names)
        return replace(images, class_names=tuple(class_names))
    unknown = [name for name in seen.values() if name not in class_names]
    if unknown:
        raise UserError(
            f"{images.origin} has a class '{unknown[0]}' that the model does not know; score it without that class"
        )
    of_model = {name: label for label, name in enumerate(class_names)}
    labels_N = np.array([of_model.get(name, 0) for name in images.class_names], np.int64)[images.labels_N]
    return replace(images, labels_N=labels_N, class_names=tuple(class_names))


def _refuse_other_labels(origin: str, seen: Mapping[int, str], class_names: Sequence[str]) -> None:
    """Raise UserError where the model has no such label, or calls it otherwise than the folders of a list do. (Numbers
    are no names.)"""
    for label, listed in seen.items():
        if label >= len(class_names):
            raise UserError(f"{origin} has label {label}, but the model knows the classes 0 to {len(class_names) - 1}")
        known = class_names[label]
        if listed != known and not listed.isdigit() and not known.isdigit():
            raise UserError(
                f"{origin} has the label {label} for images in {listed}, which is '{known}' to the model: this is "
                "other data, or numbered otherwise"
            )


def part_of(found: Found, part: str, path: str) -> ImageList:
    """The part `part` of what was found at `path`, or all of it where it is not divided. Raises UserError where there
    is no such part or its images are missing."""
    if part in found.absent:
        raise UserError(found.absent[part])
    if part not in found.parts and found.divided:
        raise UserError(
            f"{path} has no {part} part; it has {', '.join(found.parts)}: score one of them with equipoise evaluate "
            f"CHECKPOINT --data {path} --split PART"
        )
    images = found.parts[part if found.divided else "train"]
    if found.of_lists and (said := list_files.absence(images)):
        raise UserError(said)
    return images


# ---------------------------------------------------------------------------------------------- list files, digits


def _open_list_files(root: Path, source: Source) -> Found:
    """Lists named one by one, or else those of a benchmark, wherever they are found."""
    files = {part: Path(os.path.expanduser(file)) for part, file in source.lists.items()}
    published = {} if files else BENCHMARKS[source.benchmark].lists
    absent: dict[str, str] = {}
    for part, known in published.items():
        file = list_files.find_list(root, source.benchmark, part)
        if file is not None:
            files[part] = file
        elif known.blob:  # one without a known fingerprint is not to be had everywhere: go without
            absent[part] = list_files.absent_list(root, source.benchmark, part)
    if not files:
        raise UserError(next(iter(absent.values())))
    read = {part: read_list(file, source.allow_outside) for part, file in files.items()}
    parts, notes = image_lists(read, root)
    if not source.allow_outside:
        for part in parts.values():
            refuse_outside(root, list_files.links(part))
    for part, file in read.items():
        notes += list_files.departures(file, published.get(part))
    return Found(
        f"list files of {source.benchmark}" if published else "list files",
        parts,
        divided=True,
        named=False,  # labels are numbers, the same in all lists of a benchmark: names of folders are for people
        notes=tuple(notes),
        of_lists=True,
        absent=absent,
        described=tuple(map(list_files.identity, read.values())),
    )


def write_lists(source: Source, folder: Path) -> list[str]:
    """Write the lists that iNaturalist's official JSON files stand for into `folder`; one line about each.

    Raises UserError where there is no such JSON, or another file is in the way.
    """
    root, said = _existing(source.path), list[str]()
    named = source.lists or {"train": "train2018.json", "test": "val2018.json"}
    for part, known in BENCHMARKS["inat2018"].lists.items():
        file = root / named.get(part, known.name)
        if file.suffix != ".json" or not file.is_file():
            continue
        read, written = read_list(file), folder / known.name
        if written.exists() and (not written.is_file() or written.read_bytes() != read.content):
            raise UserError(f"{written} is there already and differs; remove it or name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(written) as opened:
            opened.write(read.content)
        said.append(f"written: {list_files.identity(replace(read, file=written))}")
    if not said:
        raise UserError(f"{root} has neither train2018.json nor val2018.json, the official files of iNaturalist 2018")
    return said


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
