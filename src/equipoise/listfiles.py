"""List files, a line `path label` an image, become image lists; the published ones are known by their fingerprint.

The fingerprint is git's blob id, by which the same file is the same in every repository that carries it
(`git hash-object FILE`). The lists are not part of this package: only their names and fingerprints are.
"""

import codecs
import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import UserError
from equipoise.lists import ImageFiles, ImageList, Indices, Paths

_MOST_CLASSES = 1_000_000  # a larger label is a mistake: a year, an image id


@dataclass(frozen=True)
class Published:
    """A list file that the literature shares. `blob`: its git blob id, where it is known."""

    name: str
    images: int
    classes: int
    blob: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A published data set whose parts are list files. `folder`: where the authors' code keeps them, below `dataset/`.
    `annotations`: the official JSON files that say the same as the lists."""

    folder: str
    lists: Mapping[str, Published]
    annotations: Mapping[str, str]


# fmt: off
BENCHMARKS: Mapping[str, Benchmark] = {
    "imagenet-lt": Benchmark("ImageNet_LT", {
        "train": Published("ImageNet_LT_train.txt", 115_846, 1000, "a063f095fcd475db4cf8b0658c4b73955535bbf9"),
        "validation": Published("ImageNet_LT_val.txt", 20_000, 1000, "3ed3188b2f44829ce2dec1cc27040d8d40984088"),
        "test": Published("ImageNet_LT_test.txt", 50_000, 1000, "76a2fb9749d6cd29e765cc4f8c270f2504131e2f"),
    }, {}),
    # The validation list is the literature's test set; there is no other with labels.
    "inat2018": Benchmark("iNaturalist18", {
        "train": Published("iNaturalist18_train.txt", 437_513, 8142, "4accdb7584d2f0a5106c40a33ed6afa392189bcc"),
        "test": Published("iNaturalist18_val.txt", 24_426, 8142, "4c23900857fd0f5adcd4cc0dffef345039eeb05f"),
    }, {"train": "train2018.json", "test": "val2018.json"}),
    "places-lt": Benchmark("Places_LT", {
        "train": Published("Places_LT_train.txt", 62_500, 365, "6392252f8ae867bc8a5e841cc1b29e5b8ef4b636"),
        "validation": Published("Places_LT_val.txt", 7_300, 365),
        "test": Published("Places_LT_test.txt", 36_500, 365, "e732e58b8aa718a2c1c11933375f5710652c2b93"),
    }, {}),
}
# fmt: on
PUBLISHED = {known.name: known for benchmark in BENCHMARKS.values() for known in benchmark.lists.values()}


@dataclass(frozen=True)
class ListFile:
    """A list file as it was read: `content` is what its fingerprint is of."""

    file: Path
    content: bytes
    paths: Paths
    labels_N: Indices

    @cached_property
    def blob(self) -> str:
        return git_blob(self.content)


def git_blob(content: bytes) -> str:
    """The id by which git knows a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# ---------------------------------------------------------------------------------------------- reading


def list_places(root: Path, benchmark: str, part: str) -> list[Path]:
    """Where the list of a benchmark's part is looked for, in this order; the last ones are official annotations that
    say the same."""
    known = BENCHMARKS[benchmark]
    name = known.lists[part].name
    places = [root / name, root / known.folder / name, Path("dataset") / known.folder / name]
    if part in known.annotations:
        places += [root / known.annotations[part], root / "annotations" / known.annotations[part]]
    return places


def find_list(root: Path, benchmark: str, part: str) -> Path | None:
    """The list of a benchmark's part, or None where it is in none of its places."""
    return next((place for place in list_places(root, benchmark, part) if place.is_file()), None)


def absent_list(root: Path, benchmark: str, part: str) -> UserError:
    """What to say where the list of a benchmark's part is in none of its places."""
    known = BENCHMARKS[benchmark].lists[part]
    folders = list(dict.fromkeys(str(place.parent) for place in list_places(root, benchmark, part)[:3]))
    fingerprint = f", git blob {known.blob}" if known.blob else ""
    annotations = BENCHMARKS[benchmark].annotations.get(part)
    official = f", put the official {annotations} into {root}" if annotations else ""
    as_folders = "; to train on all images of its class folders, name the recipe: train pictures --data FOLDER"
    otherwise = "" if official or part != "train" else as_folders
    flag = {"train": "train", "validation": "val", "test": "test"}[part]
    return UserError(
        f"the list {known.name} ({known.images:,} images of {known.classes:,} classes{fingerprint}) is not in "
        f"{', '.join(folders[:-1])} or {folders[-1]}; put it there{official}, or name it with "
        f"--{flag}-list FILE{otherwise}"
    )


def read_list(file: Path) -> ListFile:
    """A list file, or iNaturalist's official JSON as the list that it stands for.

    A line is a path, white space and a whole number; a path may have spaces. Empty lines are passed over. Raises
    UserError naming the file and the line.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"the list {file} cannot be read ({reason})") from None
    if file.suffix == ".json":
        content = _from_annotations(content, file)
    paths, labels_N = _all_at_once(content) or _line_by_line(content, file)
    return ListFile(file, content, paths, labels_N)


# What a line of `path label` that nobody wrote by hand has not got: other white space, paths to be made shorter or that
# may lead elsewhere. In a list that has, every line is looked at.
# fmt: off
_UNUSUAL = (
    b"\t", b"\r", b"\v", b"\f", b"\0", b"//", b"./", b"/.", b"/ ", b". ",
    b"  ", b" \n", b"\n ", b"\n\n", b"\n/", b"\n\\",
)
# fmt: on
_DIGITS = len(str(_MOST_CLASSES - 1))


def _all_at_once(content: bytes) -> tuple[Paths, Indices] | None:
    """Paths and labels of an ordinary list, a million lines a second; None for one that has to be read line by line."""
    start = (b" ", b"/", b"\\", b"\n", codecs.BOM_UTF8)
    if not content or content.startswith(start) or any(text in content for text in _UNUSUAL):
        return None
    characters = np.frombuffer(content, np.uint8)
    ends_N = np.flatnonzero(characters == ord("\n"))
    if content[-1:] != b"\n":
        ends_N = np.append(ends_N, len(content))
    starts_N = np.concatenate([[0], ends_N[:-1] + 1])
    blanks = np.flatnonzero(characters == ord(" "))
    last_N = np.searchsorted(blanks, ends_N) - 1
    if len(blanks) == 0 or last_N[0] < 0:
        return None
    blank_N = blanks[last_N]
    width_N = ends_N - blank_N - 1  # of the label
    if not ((blank_N > starts_N) & (width_N > 0) & (width_N <= _DIGITS)).all():
        return None
    labels_N = np.zeros(len(ends_N), np.int64)
    for place in range(_DIGITS):
        there_N = place < width_N
        digit_N = characters[ends_N - 1 - np.where(there_N, place, 0)].astype(np.int64) - ord("0")
        if ((digit_N < 0) | (digit_N > 9)).any():
            return None
        labels_N += np.where(there_N, digit_N * 10**place, 0)
    return Paths(content, starts_N, blank_N), labels_N


def _line_by_line(content: bytes, file: Path) -> tuple[Paths, Indices]:
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        words = line.rsplit(None, 1)
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            shown = line[:60].decode("utf-8", "replace").strip()
            raise UserError(f"{file}, line {number}: '{shown}' is not 'path label' with a label of 0 or more")
        path = os.fsdecode(words[0].strip())
        if len(words[1]) > 9 or int(words[1]) >= _MOST_CLASSES:
            raise UserError(f"{file}, line {number}: label {words[1].decode()[:20]} is out of range")
        if path.startswith(("/", "\\")) or ".." in path.split("/") or "\0" in path:
            raise UserError(f"{file}, line {number}: the path '{path}' leaves the data folder; write it relative to it")
        paths.append(posixpath.normpath(path))
        labels.append(int(words[1]))
    if not paths:
        raise UserError(f"the list {file} names no images")
    return Paths.of(paths), np.array(labels, np.int64)


def _from_annotations(content: bytes, file: Path) -> bytes:
    """iNaturalist's JSON as the canonical list: one line `file_name category_id` an image, in the order of `images`."""
    try:
        table: Any = json.loads(content)
        categories = {entry["image_id"]: entry["category_id"] for entry in table["annotations"]}
        lines = [f"{image['file_name']} {categories[image['id']]}\n" for image in table["images"]]
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not valid JSON; take the official file anew") from None
    except (KeyError, TypeError) as error:
        missing = f": {error} is missing; the test part has no labels" if isinstance(error, KeyError) else ""
        raise UserError(
            f"{file} is not iNaturalist's JSON (images and annotations with image_id and category_id){missing}"
        ) from None
    return "".join(lines).encode()


def image_lists(files: Mapping[str, ListFile], root: Path) -> tuple[dict[str, ImageList], list[str]]:
    """The lists of a data set's parts, with one set of classes, and what is odd about them.

    The classes are 0 to the largest label of the training list (of all, where there is none). They take the name of
    the folder that holds their images, where all agree. Raises UserError for a label that training does not know.
    """
    leading = files.get("train")
    classes = 1 + max(int(part.labels_N.max()) for part in ([leading] if leading else files.values()))
    if leading and classes > len(leading.paths):
        raise UserError(
            f"{leading.file}: label {classes - 1} is out of range: there are {len(leading.paths)} images only"
        )
    names, notes = _class_names(files.values(), classes)
    lists: dict[str, ImageList] = {}
    for part, read in files.items():
        wrong = read.labels_N[read.labels_N >= classes]
        if len(wrong):
            raise UserError(f"{read.file} has label {wrong[0]}, but the training list's classes are 0 to {classes - 1}")
        lists[part] = ImageList(str(read.file), ImageFiles(root, read.paths, read.blob), read.labels_N, names)
    return lists, notes


def _class_names(files: Iterable[ListFile], classes: int) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes by the folders of their images, or their numbers where the folders do not tell; and a note
    where one label stands for different folders in different lists."""
    numbers = tuple(str(label) for label in range(classes))
    names: dict[int, str] = {}
    notes: list[str] = []
    for read in files:
        labels, first, which_N = np.unique(read.labels_N, return_index=True, return_inverse=True)
        if (read.paths.folder_hashes != read.paths.folder_hashes[first][which_N]).any():
            return numbers, notes
        own = {label: read.paths[index].rpartition("/")[0] for label, index in zip(labels.tolist(), first, strict=True)}
        if len({folder.partition("/")[0] for folder in own.values()}) == 1:  # train/, val/, train_val2018/
            own = {label: folder.partition("/")[2] for label, folder in own.items()}
        if not all(own.values()):
            return numbers, notes
        differing = [label for label, name in own.items() if names.get(label, name) != name]
        if differing:
            label = min(differing)
            notes.append(
                f"{read.file}: label {label} is {own[label]}, but {names[label]} in another list; do they belong "
                "together?"
            )
            return numbers, notes
        names.update(own)
    if len(set(names.values())) < len(names):
        return numbers, notes
    return tuple(names.get(label, str(label)) for label in range(classes)), notes


# ---------------------------------------------------------------------------------------------- what is wrong


def absent_images(images: ImageList) -> list[int]:
    """Indices of images of files that are not there. Each folder is listed once; no image is opened."""
    assert isinstance(images.images, ImageFiles)
    root, paths = images.images.root, images.images.paths
    absent: list[int] = []
    listed, names = None, set[str]()
    for index in np.argsort(paths.folder_hashes, kind="stable").tolist():  # folder by folder: the names of one are kept
        folder, _, name = paths[index].rpartition("/")
        if folder != listed:
            listed = folder
            try:
                names = set(os.listdir(root / folder))
            except OSError:
                names = set()
        if name not in names:
            absent.append(index)
    return sorted(absent)


def absence(images: ImageList, absent: list[int]) -> str:
    """One line about the images of a list that are not there."""
    assert isinstance(images.images, ImageFiles)
    return (
        f"{images.images.name(absent[0])} is not there, and {len(absent):,} of the {len(images):,} images of "
        f"{images.origin} (git blob {images.images.blob}) are missing; its paths are looked for below the folder given "
        "as data"
    )


def overlap(one: ImageList, other: ImageList) -> str | None:
    """One line about images that are in both lists; None where there are none."""
    assert isinstance(one.images, ImageFiles)
    assert isinstance(other.images, ImageFiles)
    mine, theirs = one.images.paths, other.images.paths
    seen = set(mine.take(np.flatnonzero(np.isin(mine.hashes, theirs.hashes))))
    both = [path for path in theirs.take(np.flatnonzero(np.isin(theirs.hashes, mine.hashes))) if path in seen]
    if not both:
        return None
    return (
        f"{len(set(both)):,} images of {other.origin} are in {one.origin} too (first: {both[0]}): figures on them "
        "would be too good"
    )


def identity(read: ListFile) -> str:
    """Which published list this is, by its fingerprint."""
    known = next((known for known in PUBLISHED.values() if known.blob == read.blob), None)
    if known is None:
        return f"{read.file}: git blob {read.blob}, no published list that is known here"
    return f"{read.file}: the published {known.name} (git blob {known.blob})"


def _departure(read: ListFile, expected: Published) -> str:
    """What sets a list apart from the published one that it stands for."""
    told = f"{read.file} is not the published {expected.name} (git blob {expected.blob}): "
    if git_blob(b"\n".join(line.strip() for line in read.content.split(b"\n"))) == expected.blob:
        return f"{told}it differs in white space alone (line ends)"
    return (
        f"{told}that has {expected.images:,} images of {expected.classes:,} classes, this one {len(read.paths):,} of "
        f"{len(np.unique(read.labels_N)):,}"
    )


def departures(read: ListFile, classes: int, of_training: bool, expected: Published | None = None) -> list[str]:
    """What is odd about a list: that it is another one than the published list that is expected, or than that of its
    name; classes without images; the same image more than once."""
    expected = expected or PUBLISHED.get(read.file.name)
    found = [_departure(read, expected)] if expected and expected.blob not in ("", read.blob) else []
    gaps = np.setdiff1d(np.arange(classes), read.labels_N) if of_training else np.array([])
    if len(gaps):
        found.append(
            f"{read.file}: the labels are not contiguous: {len(gaps):,} of 0 to {classes - 1} have no image "
            f"(first: {gaps[0]})"
        )
    if len(np.unique(read.paths.hashes)) < len(read.paths):
        labels_of: dict[str, list[int]] = {}
        for path, label in zip(read.paths, read.labels_N.tolist(), strict=True):
            labels_of.setdefault(path, []).append(label)
        repeated = {path: labels for path, labels in labels_of.items() if len(labels) > 1}
        if not repeated:
            return found
        contradictory = [path for path, labels in repeated.items() if len(set(labels)) > 1]
        first = next(iter(repeated))
        said = f"{read.file}: {len(repeated):,} images are in it more than once (first: {first})"
        if contradictory:
            labels = ", ".join(map(str, sorted(set(repeated[contradictory[0]]))))
            said += f", {len(contradictory):,} of them with different labels (first: {contradictory[0]}: {labels})"
        found.append(said)
    return found
