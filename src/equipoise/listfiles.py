"""List files, a line `path label` an image, become image lists; the published ones are known by their fingerprint.

The fingerprint is git's blob id, by which the same file is the same in every repository that carries it
(`git hash-object FILE`). The lists are not part of this package: only their names and fingerprints are.
"""

import hashlib
import io
import json
import os
import posixpath
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import UserError
from equipoise.lists import ImageFiles, ImageList, Indices, Paths

# There are not as many paths of two letters as a list longer than _LONG bytes would have lines shorter than this.
_LONG, _SHORTEST_LINE = 2**23, 7
_MOST_NAMED = 100_000  # classes; of more nobody reads the names
_MOST_FOLDERS = 50_000  # listed at a time
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
    labels: "array[int]"

    @property
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
    flag = {"train": "train", "validation": "val", "test": "test"}[part]
    return UserError(
        f"the list {known.name} ({known.images:,} images of {known.classes:,} classes{fingerprint}) is not in "
        f"{', '.join(folders[:-1])} or {folders[-1]}; put it there{official}, or name it with --{flag}-list FILE"
    )


def read_list(file: Path, allow_outside: bool = False) -> ListFile:
    """A list file, or iNaturalist's official JSON as the list that it stands for.

    A line is a path, white space and a whole number; a path may have spaces. Empty lines are passed over. Raises
    UserError naming the file and the line, for a path that leaves the data folder too, unless `allow_outside`.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"the list {file} cannot be read ({reason})") from None
    if file.suffix == ".json":
        content = _from_annotations(content, file)
    lines = content.count(b"\n")
    if len(content) > _LONG and len(content) < _SHORTEST_LINE * lines:
        raise UserError(f"the list {file} has {lines:,} lines too short to be as many images; is it a list of images?")
    labels = array("i")
    paths = Paths(_lines(content, file, allow_outside, labels))
    if not paths:
        raise UserError(f"the list {file} names no images")
    return ListFile(file, content, paths, labels)


def _lines(content: bytes, file: Path, allow_outside: bool, labels: "array[int]") -> Iterator[str]:
    """The path of every line; its label is appended to `labels`."""
    for number, line in enumerate(io.BytesIO(content), 1):
        words = line.rsplit(None, 1)
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            shown = line[:60].decode("utf-8", "replace").strip()
            raise UserError(f"{file}, line {number}: '{shown}' is not 'path label' with a label of 0 or more")
        path = os.fsdecode(words[0].strip())
        if len(words[1]) > 9 or int(words[1]) >= _MOST_CLASSES:
            raise UserError(f"{file}, line {number}: label {words[1].decode()[:20]} is out of range")
        if "\0" in path:
            raise UserError(f"{file}, line {number}: the path has a zero byte in it")
        if not allow_outside and (path.startswith(("/", "\\")) or ".." in path.split("/")):
            raise UserError(
                f"{file}, line {number}: the path '{path[:200]}' leaves the data folder; write it relative to it, or "
                "allow it with --allow-outside"
            )
        labels.append(int(words[1]))
        yield posixpath.normpath(path)


def _from_annotations(content: bytes, file: Path) -> bytes:
    """iNaturalist's JSON as the canonical list: one line `file_name category_id` an image, in the order of `images`."""
    # What Python keeps for a value, a piece of text and a list, in bytes: a file of nothing but brackets would take
    # twenty times its size. The official files take five times.
    brackets = content.count(b"[") + content.count(b"{")
    needed = 36 * content.count(b",") + 12 * content.count(b'"') + 28 * brackets
    # Of an object only what is needed is kept, but not before all of it was read.
    if needed > 8 * len(content) + 2**24 or content.count(b":") > 50 * content.count(b"{") + 100_000:
        raise UserError(
            f"{file} is not iNaturalist's JSON: it is nearly all brackets or names; take the official file anew"
        )
    try:
        table: Any = json.loads(content, object_hook=_needed)
        categories = dict(table["annotations"])
        return "".join(f"{name} {categories[image]}\n" for image, name in table["images"]).encode()
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not valid JSON; take the official file anew") from None
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not iNaturalist's JSON (images and annotations with image_id and category_id): {error} is "
            "missing; the test part has no labels"
        ) from None


def _needed(entry: dict[str, Any]) -> object:
    """What a list needs of an object of iNaturalist's JSON; all the rest would fill the memory."""
    if "file_name" in entry:
        if not isinstance(entry["file_name"], str) or "\n" in entry["file_name"]:
            raise ValueError("a file's name is a line of text")
        return entry["id"], entry["file_name"]
    if "image_id" in entry:
        return entry["image_id"], entry["category_id"]
    return entry if "images" in entry or "annotations" in entry else None


def image_lists(files: Mapping[str, ListFile], root: Path) -> tuple[dict[str, ImageList], list[str]]:
    """The lists of a data set's parts, with one set of classes, and what is odd about them.

    The classes are 0 to the largest label of the training list (of all, where there is none). They take the name of
    the folder that holds their images, where all agree. Raises UserError for a label that training does not know.
    """
    leading = files.get("train")
    classes = 1 + max(max(part.labels) for part in ([leading] if leading else files.values()))
    if leading and classes > len(leading.labels):
        raise UserError(
            f"{leading.file}: label {classes - 1} is out of range: there are {len(leading.labels)} images only"
        )
    names, notes = _class_names(files.values(), classes)
    lists: dict[str, ImageList] = {}
    for part, read in files.items():
        wrong = next((label for label in read.labels if label >= classes), None)
        if wrong is not None:
            raise UserError(f"{read.file} has label {wrong}, but the training list's classes are 0 to {classes - 1}")
        labels_N = np.array(read.labels, np.int64)
        lists[part] = ImageList(str(read.file), ImageFiles(root, read.paths), labels_N, names)
    return lists, notes


def _class_names(files: Iterable[ListFile], classes: int) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes by the folders of their images, or their numbers where the folders do not tell; and a note
    where one label stands for different folders in different lists."""
    numbers = tuple(str(label) for label in range(classes))
    names: dict[int, str] = {}
    notes: list[str] = []
    for read in files if classes <= _MOST_NAMED else ():
        first = {path.partition("/")[0] if "/" in path else "" for path in read.paths}
        in_one = len(first) == 1  # train/, val/, train_val2018/
        own: dict[int, str] = {}
        for label, path in zip(read.labels, read.paths, strict=True):
            folder = posixpath.dirname(path)
            folder = folder.partition("/")[2] if in_one else folder
            if not folder or own.setdefault(label, folder) != folder:
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
    root, folders = images.images.root, dict[str, frozenset[str]]()
    absent: list[int] = []
    for index, path in enumerate(images.images.paths):
        folder, name = posixpath.split(path)
        if folder not in folders:
            if len(folders) == _MOST_FOLDERS:
                folders.clear()
            try:
                folders[folder] = frozenset(os.listdir(root / folder))
            except OSError:
                folders[folder] = frozenset()
        if name not in folders[folder]:
            absent.append(index)
    return absent


def links(images: ImageList) -> Iterator[Path]:
    """The folders of the images, and those of the images that are links: what may lead out of the data folder. Each
    folder is listed once."""
    assert isinstance(images.images, ImageFiles)
    root, linked = images.images.root, dict[str, frozenset[str]]()
    for path in images.images.paths:
        folder, name = posixpath.split(path)
        if folder not in linked:
            yield root / folder
            if len(linked) == _MOST_FOLDERS:
                linked.clear()
            try:
                with os.scandir(root / folder) as entries:
                    linked[folder] = frozenset(entry.name for entry in entries if entry.is_symlink())
            except OSError:  # not there: see `absent_images`
                linked[folder] = frozenset()
        if name in linked[folder]:
            yield root / path


def absence(images: ImageList, absent: list[int]) -> str:
    """One line about the images of a list that are not there."""
    blob = git_blob(Path(images.origin).read_bytes())
    return (
        f"{images.images.name(absent[0])} is not there, and {len(absent):,} of the {len(images):,} images of "
        f"{images.origin} (git blob {blob}) are missing; its paths are looked for below the folder given as data"
    )


def overlap(one: ImageList, other: ImageList) -> str | None:
    """One line about images that are in both lists; None where there are none."""
    assert isinstance(one.images, ImageFiles)
    assert isinstance(other.images, ImageFiles)
    keys_N = _keys(other.images.paths)
    both_N = np.isin(keys_N, _keys(one.images.paths))
    if not both_N.any():
        return None
    return (
        f"{len(np.unique(keys_N[both_N])):,} images of {other.origin} are in {one.origin} too (first: "
        f"{other.images.paths[int(both_N.argmax())]}): figures on them would be too good"
    )


def _keys(paths: Paths) -> Indices:
    """A number for each path, of 64 bits: two paths have the same one only if they are the same."""
    return np.fromiter(map(hash, paths), np.int64, len(paths))


def identity(read: ListFile) -> str:
    """Which published list this is, by its fingerprint, or what sets it apart from the one it is named after."""
    of_name = PUBLISHED.get(read.file.name)
    for known in PUBLISHED.values():
        if known.blob == read.blob:
            return f"{read.file}: the published {known.name} (git blob {known.blob})"
    told = f"{read.file}: git blob {read.blob}, no published list that is known here"
    if of_name is None or not of_name.blob:
        return told
    told += f"; the published {of_name.name} is {of_name.blob}"
    bare = bytearray()
    for line in io.BytesIO(read.content):
        bare += line.strip() + (b"\n" if line.endswith(b"\n") else b"")
    if git_blob(bytes(bare)) == of_name.blob:
        return f"{told}, and differs in white space alone (line ends)"
    told += f", with {of_name.images:,} images of {of_name.classes:,} classes; this one has {len(read.paths):,} of "
    return f"{told}{len(np.unique(read.labels)):,}"


def departures(read: ListFile, classes: int, of_training: bool) -> list[str]:
    """What is odd about a list by itself: classes without images, and the same image more than once."""
    found: list[str] = []
    labels_N = np.frombuffer(read.labels, np.int32)
    gaps = np.setdiff1d(np.arange(classes if of_training else 0), labels_N)
    if len(gaps):
        found.append(
            f"{read.file}: the labels are not contiguous: {len(gaps):,} of 0 to {classes - 1} have no image "
            f"(first: {gaps[0]})"
        )
    keys_N = _keys(read.paths)
    order = np.lexsort((labels_N, keys_N))
    in_order = keys_N[order]
    again = in_order[1:] == in_order[:-1]
    if again.any():
        repeated = np.unique(in_order[1:][again])
        one = int(np.isin(keys_N, repeated).argmax())
        said = f"{read.file}: {len(repeated):,} images are in it more than once (first: {read.paths[one]})"
        again &= np.diff(labels_N[order]) != 0
        contradictory = np.unique(in_order[1:][again])
        if len(contradictory):
            one = int(np.isin(keys_N, contradictory).argmax())
            labels = ", ".join(map(str, np.unique(labels_N[keys_N == keys_N[one]])))
            said += f", {len(contradictory):,} of them with different labels (first: {read.paths[one]}: {labels})"
        found.append(said)
    return found
