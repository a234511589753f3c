"""List files, a line `path label` an image, become image lists; the published ones are known by their fingerprint.

The fingerprint is git's blob id, by which the same file is the same in every repository that carries it
(`git hash-object FILE`). The lists are not part of this package: only their names and fingerprints are.
"""

import codecs
import hashlib
import io
import os
import posixpath
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.base.errors import UserError, reason
from equipoise.base.files import parsed_json, regular_file
from equipoise.data.images import ImageFiles, ImageList, Indices, Paths

# There are not as many paths of two letters as a list longer than _LONG bytes would have lines shorter than this.
_LONG, _SHORTEST_LINE = 2**23, 7
_LARGEST_LIST = 2**32  # bytes
_MOST_NAMED = 100_000  # classes; of more nobody reads the names
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


def read_list(file: Path, allow_outside: bool = False) -> ListFile:
    """A list file, or iNaturalist's official JSON as the list that it stands for.

    A line is a path, white space and a whole number; a path may have spaces. Empty lines are passed over. Raises
    UserError naming the file and the line, for a path that leaves the data folder too, unless `allow_outside`.
    """
    try:
        size = regular_file(file).stat().st_size
        if size > _LARGEST_LIST:
            raise UserError(f"the list {file} has {size:,} bytes, more than any list of images; name another")
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"the list {file} cannot be read ({reason(error)}); name another, or mend that") from None
    if file.suffix == ".json":
        content = _from_annotations(content, file)
    text = content.removeprefix(codecs.BOM_UTF8)
    paths, labels_N = _all_at_once(text) or _line_by_line(text, file, allow_outside)
    return ListFile(file, content, paths, labels_N)


# What a line of `path label` that nobody wrote by hand has not got: other white space, paths to be made shorter or that
# may lead elsewhere. In a list that has, every line is looked at.
# fmt: off
_UNUSUAL = (
    b"\t", b"\r", b"\v", b"\f", b"\0", b"//", b"./", b"/.", b"/ ", b". ",
    b"  ", b" \n", b"\n ", b"\n\n", b"\n/", b"\n\\",
)
# fmt: on
_USUAL_LINE = 16  # bytes; what is kept for each line at once would be many times as long as shorter ones are
_DIGITS = len(str(_MOST_CLASSES - 1))


def _all_at_once(content: bytes) -> tuple[Paths, Indices] | None:
    """Paths and labels of an ordinary list, a million lines a second; None for one that has to be read line by line."""
    if not content or content[0] in b" /\\\n" or any(text in content for text in _UNUSUAL):
        return None
    if len(content) < _USUAL_LINE * content.count(b"\n"):
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


def _line_by_line(content: bytes, file: Path, allow_outside: bool) -> tuple[Paths, Indices]:
    lines = content.count(b"\n")
    if len(content) > _LONG and len(content) < _SHORTEST_LINE * lines:
        raise UserError(f"the list {file} has {lines:,} lines too short to be as many images; is it a list of images?")
    labels = array("q")  # of whole numbers: objects would be many times as long as short lines are
    paths = Paths.of(_lines(content, file, allow_outside, labels))
    if not len(paths):
        raise UserError(f"the list {file} names no images")
    return paths, np.frombuffer(labels, np.int64)


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
    try:
        table: Any = parsed_json(content, object_hook=_needed)  # of an object only what is needed is kept
        categories = dict(table["annotations"])
        return "".join(f"{name} {categories[image]}\n" for image, name in table["images"]).encode()
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON ({reason(error, library=True)}); take the official file anew"
        ) from None
    except (KeyError, TypeError) as error:
        missing = f": {error} is missing; the test part has no labels" if isinstance(error, KeyError) else ""
        raise UserError(
            f"{file} is not iNaturalist's JSON (images and annotations with image_id and category_id){missing}"
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
    for read in files if classes <= _MOST_NAMED else ():
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


def links(images: ImageList) -> Iterator[Path]:
    """The folders of the images, and those of the images that are links: what may lead out of the data folder. Each
    folder is listed once."""
    assert isinstance(images.images, ImageFiles)
    root, paths = images.images.root, images.images.paths
    linked: dict[str, set[str]] = {}
    for index in np.unique(paths.folder_hashes, return_index=True)[1].tolist():
        folder = paths[index].rpartition("/")[0]
        yield root / folder
        try:
            with os.scandir(root / folder) as entries:
                names = {entry.name for entry in entries if entry.is_symlink()}
        except OSError:  # not there: see `absent_images`
            continue
        if names:
            linked[folder] = names
    for path in paths if linked else ():
        folder, _, name = path.rpartition("/")
        if name in linked.get(folder, ()):
            yield root / path


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
    hashes_N = other.images.paths.hashes
    both_N = np.isin(hashes_N, one.images.paths.hashes)
    if not both_N.any():
        return None
    return (
        f"{len(np.unique(hashes_N[both_N])):,} images of {other.origin} are in {one.origin} too (first: "
        f"{other.images.paths[int(both_N.argmax())]}): figures on them would be too good"
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
    bare = bytearray()
    for line in io.BytesIO(read.content):
        bare += line.strip() + (b"\n" if line.endswith(b"\n") else b"")
    if git_blob(bytes(bare)) == expected.blob:
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
    return found + _repetitions(read)


def _repetitions(read: ListFile) -> list[str]:
    hashes_N, labels_N = read.paths.hashes, read.labels_N
    order = np.lexsort((labels_N, hashes_N))
    hashes, labels = hashes_N[order], labels_N[order]
    again = hashes[1:] == hashes[:-1]
    if not again.any():
        return []
    repeated = np.unique(hashes[1:][again])
    first = int(np.isin(hashes_N, repeated).argmax())
    said = f"{read.file}: {len(repeated):,} images are in it more than once (first: {read.paths[first]})"
    contradictory = np.unique(hashes[1:][again & (labels[1:] != labels[:-1])])
    if len(contradictory):
        first = int(np.isin(hashes_N, contradictory).argmax())
        told = ", ".join(map(str, np.unique(labels_N[hashes_N == hashes_N[first]])))
        said += f", {len(contradictory):,} of them with different labels (first: {read.paths[first]}: {told})"
    return [said]
