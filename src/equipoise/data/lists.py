"""List files, a line `path label` an image, become image lists; the published ones are known by their fingerprint.

The fingerprint is git's blob id, by which the same file is the same in every repository that carries it
(`git hash-object FILE`). The lists are not part of this package: only their names and fingerprints are.
"""

import codecs
import hashlib
import io
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason
from equipoise.data.images import ImageFiles, ImageList, Indices

_MOST_DIGITS = 6  # of a label: a larger one is a mistake, as a year or the id of an image


@dataclass(frozen=True)
class Published:
    """A list file that the literature shares. `blob`: its git blob id, where it is known. `official`: the JSON file
    that says the same."""

    name: str
    images: int
    classes: int
    blob: str = ""
    official: str = ""

    @property
    def folder(self) -> str:
        """Where the authors' code keeps it, below `dataset/`."""
        return self.name.rpartition("_")[0]


# fmt: off
BENCHMARKS: Mapping[str, Mapping[str, Published]] = {
    "imagenet-lt": {
        "train": Published("ImageNet_LT_train.txt", 115_846, 1000, "a063f095fcd475db4cf8b0658c4b73955535bbf9"),
        "validation": Published("ImageNet_LT_val.txt", 20_000, 1000, "3ed3188b2f44829ce2dec1cc27040d8d40984088"),
        "test": Published("ImageNet_LT_test.txt", 50_000, 1000, "76a2fb9749d6cd29e765cc4f8c270f2504131e2f"),
    },
    # The validation list is the literature's test set; there is no other with labels.
    "inat2018": {
        "train": Published("iNaturalist18_train.txt", 437_513, 8142, "4accdb7584d2f0a5106c40a33ed6afa392189bcc",
                           "train2018.json"),
        "test": Published("iNaturalist18_val.txt", 24_426, 8142, "4c23900857fd0f5adcd4cc0dffef345039eeb05f",
                          "val2018.json"),
    },
    "places-lt": {
        "train": Published("Places_LT_train.txt", 62_500, 365, "6392252f8ae867bc8a5e841cc1b29e5b8ef4b636"),
        "validation": Published("Places_LT_val.txt", 7_300, 365),
        "test": Published("Places_LT_test.txt", 36_500, 365, "e732e58b8aa718a2c1c11933375f5710652c2b93"),
    },
}
# fmt: on
PUBLISHED = {known.name: known for lists in BENCHMARKS.values() for known in lists.values()}


@dataclass(frozen=True)
class ListFile:
    """A list file as it was read. `blob`: its git blob id."""

    file: Path
    blob: str
    paths_N: npt.NDArray[np.bytes_]
    labels_N: Indices


def git_blob(content: bytes) -> str:
    """The id by which git knows a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def find_list(root: Path, known: Published) -> Path | None:
    """The published list, or the official JSON, below `root`, or the list where the authors' code has it; None where
    there is neither."""
    official = [root / known.official, root / "annotations" / known.official] if known.official else []
    of_authors = Path("dataset") / known.folder / known.name
    places = [root / known.name, root / known.folder / known.name, *official, of_authors]
    return next((place for place in places if place.is_file()), None)


def absent_list(root: Path, part: str, known: Published) -> str:
    """What to say where `find_list` finds none."""
    fingerprint = f", git blob {known.blob}" if known.blob else ""
    official = f" (or {known.official})" if known.official else ""
    return (
        f"the list {known.name} ({known.images:,} images of {known.classes:,} classes{fingerprint}){official} is not "
        f"in {root}, {root / known.folder} or dataset/{known.folder}; put it there, or name it with "
        f"--{part.replace('validation', 'val')}-list FILE"
    )


# ---------------------------------------------------------------------------------------------- reading


def read_list(file: Path, allow_outside: bool = False) -> ListFile:
    """A list file, or iNaturalist's official JSON as the list that it stands for.

    A line is a path, white space and a whole number; a path may have spaces. Empty lines are passed over. Raises
    UserError naming the file and the line, for a path that leaves the data folder too, unless `allow_outside`.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"the list {file} cannot be read ({reason(error)}); name another, or mend that") from None
    if file.suffix == ".json":
        content = _from_annotations(content, file)
    paths: list[bytes] = []
    labels: list[int] = []
    for number, line in enumerate(io.BytesIO(content.removeprefix(codecs.BOM_UTF8)), 1):
        words = line.strip().rsplit(None, 1)
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit() or len(words[1]) > _MOST_DIGITS or b"\0" in line:
            shown = line[:60].decode("utf-8", "replace").strip()
            raise UserError(
                f"{file}, line {number}: '{shown}' is not 'path label' with a label of at most {_MOST_DIGITS} digits"
            )
        path = words[0]
        if path[0] in b"./\\" or b"/." in path or b"//" in path:  # to be made shorter, or leads elsewhere
            if not allow_outside and (path[0] in b"/\\" or b".." in path.split(b"/")):
                raise UserError(
                    f"{file}, line {number}: the path '{os.fsdecode(path[:200])}' leaves the data folder; write it "
                    "relative to it, or allow it with --allow-outside"
                )
            path = posixpath.normpath(path)
        paths.append(path)
        labels.append(int(words[1]))
    if not paths:
        raise UserError(f"the list {file} names no images")
    return ListFile(file, git_blob(content), np.array(paths, np.bytes_), np.array(labels, np.int64))


class _Image(msgspec.Struct):
    id: int
    file_name: str


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int


class _Annotations(msgspec.Struct):
    """What a list needs of iNaturalist's JSON; all else is passed over."""

    images: list[_Image]
    annotations: list[_Annotation]


def _from_annotations(content: bytes, file: Path) -> bytes:
    """iNaturalist's JSON as the canonical list: one line `file_name category_id` an image, in the order of `images`."""
    try:
        table = msgspec.json.decode(content, type=_Annotations)
        categories = {of.image_id: of.category_id for of in table.annotations}
        return "".join(f"{image.file_name} {categories[image.id]}\n" for image in table.images).encode()
    except (LookupError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not iNaturalist's JSON with images and an annotation of each "
            f"({reason(error, library=True)}); take the official file anew (that of the test part has no labels)"
        ) from None


def image_lists(files: Mapping[str, ListFile], root: Path) -> tuple[dict[str, ImageList], list[str]]:
    """The lists of a data set's parts, with one set of classes, and what is odd about them.

    The classes are 0 to the largest label of the training list (of all, where there is none). They take the name of
    the folder that holds their images, where all agree. Raises UserError for a label that training does not know.
    """
    leading = [files["train"]] if "train" in files else files.values()
    classes = 1 + max(int(read.labels_N.max()) for read in leading)
    names, notes = _class_names(files.values(), classes)
    lists: dict[str, ImageList] = {}
    for part, read in files.items():
        if (largest := int(read.labels_N.max())) >= classes:
            raise UserError(f"{read.file} has label {largest}, but the training list's classes are 0 to {classes - 1}")
        lists[part] = ImageList(str(read.file), ImageFiles(root, read.paths_N), read.labels_N, names)
    return lists, notes


def _class_names(files: Iterable[ListFile], classes: int) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes by the folders of their images, or their numbers where the folders do not tell; and a note
    where one label stands for different folders in different lists."""
    numbers = tuple(map(str, range(classes)))
    names: dict[int, str] = {}
    for read in files:
        folders = (path.rpartition(b"/")[0] for path in read.paths_N.tolist())
        pairs = set(zip(read.labels_N.tolist(), folders, strict=True))
        own = {label: os.fsdecode(folder) for label, folder in sorted(pairs)}
        if len({folder.partition("/")[0] for folder in own.values()}) == 1:  # train/, val/, train_val2018/
            own = {label: folder.partition("/")[2] for label, folder in own.items()}
        if len(own) < len(pairs) or not all(own.values()):
            return numbers, []
        for label, name in own.items():
            if (other := names.setdefault(label, name)) != name:
                note = f"{read.file}: label {label} is {name}, but {other} in another list; do they belong together?"
                return numbers, [note]
    if len(set(names.values())) < len(names):
        return numbers, []
    return tuple(names.get(label, str(label)) for label in range(classes)), []


# ---------------------------------------------------------------------------------------------- what is wrong


def overlap(one: ImageList, other: ImageList) -> str | None:
    """One line about images that are in both lists; None where there are none."""
    assert isinstance(one.images, ImageFiles)
    assert isinstance(other.images, ImageFiles)
    shared = set(one.images.paths_N.tolist()).intersection(other.images.paths_N.tolist())
    if not shared:
        return None
    return (
        f"{len(shared):,} images of {other.origin} are in {one.origin} too (first: {os.fsdecode(min(shared))}): "
        "figures on them would be too good"
    )


def identity(read: ListFile) -> str:
    """Which published list this is, by its fingerprint."""
    known = next((known for known in PUBLISHED.values() if known.blob == read.blob), None)
    if known is None:
        return f"{read.file}: git blob {read.blob}, no published list that is known here"
    return f"{read.file}: the published {known.name} (git blob {known.blob})"


def departures(read: ListFile, expected: Published | None = None) -> list[str]:
    """What is odd about a list: that it is another one than the published list that is expected, or than that of its
    name; the same image more than once."""
    found: list[str] = []
    expected = expected or PUBLISHED.get(read.file.name)
    if expected and expected.blob not in ("", read.blob):
        found.append(
            f"{read.file} is not the published {expected.name} (git blob {expected.blob}): that has "
            f"{expected.images:,} images of {expected.classes:,} classes, this one {len(read.paths_N):,} of "
            f"{len(np.unique(read.labels_N)):,}"
        )
    repeated = [path for path, count in Counter(read.paths_N.tolist()).items() if count > 1]
    if repeated:
        first = os.fsdecode(repeated[0])
        found.append(f"{read.file}: {len(repeated):,} images are in it more than once (first: {first})")
    return found
