"""List files, a line `path label` an image, become image lists; the published ones are known by their fingerprint.

The fingerprint is git's blob id, by which the same file is the same in every repository that carries it
(`git hash-object FILE`). The lists are not part of this package: only their names and fingerprints are.
"""

import codecs
import contextlib
import hashlib
import io
import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
    """A list file as it was read. `blob`: the git blob id of `content`."""

    file: Path
    content: bytes
    blob: str
    paths_N: npt.NDArray[np.bytes_]
    labels_N: Indices


def git_blob(content: bytes) -> str:
    """The id by which git knows a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# ---------------------------------------------------------------------------------------------- reading


def list_places(root: Path, benchmark: str, part: str) -> list[Path]:
    """Where the list of a benchmark's part is looked for below `root`, in this order: the list, or the official
    annotations that say the same."""
    known = BENCHMARKS[benchmark]
    name, official = known.lists[part].name, known.annotations.get(part)
    annotations = [root / official, root / "annotations" / official] if official else []
    return [root / name, root / known.folder / name, *annotations]


def find_list(root: Path, benchmark: str, part: str) -> Path | None:
    """The list of a benchmark's part, below `root` or where the authors' code has it; None where it is missing."""
    known = BENCHMARKS[benchmark]
    of_authors = Path("dataset") / known.folder / known.lists[part].name
    return next((place for place in [*list_places(root, benchmark, part), of_authors] if place.is_file()), None)


def absent_list(root: Path, benchmark: str, part: str) -> str:
    """What to say where `find_list` finds none."""
    known, folder = BENCHMARKS[benchmark].lists[part], BENCHMARKS[benchmark].folder
    official = BENCHMARKS[benchmark].annotations.get(part)
    fingerprint = f", git blob {known.blob}" if known.blob else ""
    instead = f", put the official {official} into {root}" if official else ""
    as_folders = "; to train on all images of its class folders, name the recipe: train pictures --data FOLDER"
    return (
        f"the list {known.name} ({known.images:,} images of {known.classes:,} classes{fingerprint}) is not in {root}, "
        f"{root / folder} or dataset/{folder}; put it there{instead}, or name it with "
        f"--{part.replace('validation', 'val')}-list FILE{as_folders if part == 'train' and not official else ''}"
    )


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
    if b"\0" in content:
        raise UserError(f"the list {file} is no text: it has zero bytes in it; name another")
    paths: list[bytes] = []
    labels: list[int] = []
    for number, line in enumerate(io.BytesIO(content.removeprefix(codecs.BOM_UTF8)), 1):
        words = line.strip().rsplit(None, 1)
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            shown = line[:60].decode("utf-8", "replace").strip()
            raise UserError(f"{file}, line {number}: '{shown}' is not 'path label' with a label of 0 or more")
        path, label = words
        if len(label) > _MOST_DIGITS:
            raise UserError(f"{file}, line {number}: label {label[:20].decode()} is out of range")
        if path[0] in b"./\\" or b"/." in path or b"//" in path:  # to be made shorter, or leads elsewhere
            if not allow_outside and (path[0] in b"/\\" or b".." in path.split(b"/")):
                raise UserError(
                    f"{file}, line {number}: the path '{os.fsdecode(path[:200])}' leaves the data folder; write it "
                    "relative to it, or allow it with --allow-outside"
                )
            path = posixpath.normpath(path)
        paths.append(path)
        labels.append(int(label))
    if not paths:
        raise UserError(f"the list {file} names no images")
    return ListFile(file, content, git_blob(content), np.array(paths, np.bytes_), np.array(labels, np.int64))


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
    except KeyError as error:
        raise UserError(f"{file} has no annotation of the image {error}: the test part has no labels") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not iNaturalist's JSON with images and annotations ({reason(error, library=True)}); take the "
            "official file anew (that of the test part has no labels)"
        ) from None


def image_lists(files: Mapping[str, ListFile], root: Path) -> tuple[dict[str, ImageList], list[str]]:
    """The lists of a data set's parts, with one set of classes, and what is odd about them.

    The classes are 0 to the largest label of the training list (of all, where there is none). They take the name of
    the folder that holds their images, where all agree. Raises UserError for a label that training does not know.
    """
    leading = files.get("train")
    classes = 1 + max(int(part.labels_N.max()) for part in ([leading] if leading else files.values()))
    if leading and classes > len(leading.paths_N):
        raise UserError(
            f"{leading.file}: label {classes - 1} is out of range: there are {len(leading.paths_N)} images only"
        )
    names, notes = _class_names(files.values(), classes)
    lists: dict[str, ImageList] = {}
    for part, read in files.items():
        if (largest := int(read.labels_N.max())) >= classes:
            raise UserError(f"{read.file} has label {largest}, but the training list's classes are 0 to {classes - 1}")
        lists[part] = ImageList(str(read.file), ImageFiles(root, read.paths_N, read.blob), read.labels_N, names)
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


def absent_images(images: ImageList) -> list[int]:
    """Indices of images whose files are missing. Each folder is listed once; no image is opened."""
    assert isinstance(images.images, ImageFiles)
    listed = _listings(images.images)
    split = (path.rpartition(b"/") for path in images.images.paths_N.tolist())
    return [index for index, (folder, _, name) in enumerate(split) if name not in listed[folder]]


def links(images: ImageList) -> Iterator[Path]:
    """What may lead out of the data folder: the folders of the images, and the images that are links."""
    assert isinstance(images.images, ImageFiles)
    listed = _listings(images.images)
    with_links = {folder for folder, names in listed.items() if any(names.values())}
    split = (path.rpartition(b"/") for path in (images.images.paths_N.tolist() if with_links else ()))
    linked = (folder + slash + name for folder, slash, name in split if listed[folder].get(name))
    for path in itertools.chain(listed, linked):
        yield images.images.root / os.fsdecode(path)


def _listings(files: ImageFiles) -> dict[bytes, dict[bytes, bool]]:
    """Folder of images -> name of each file in it -> whether that is a link. A missing folder has no files."""
    listed: dict[bytes, dict[bytes, bool]] = {}
    for folder in dict.fromkeys(path.rpartition(b"/")[0] for path in files.paths_N.tolist()):
        listed[folder] = {}
        with contextlib.suppress(OSError), os.scandir(os.path.join(os.fsencode(files.root), folder)) as entries:
            listed[folder] = {entry.name: entry.is_symlink() for entry in entries}
    return listed


def absence(images: ImageList) -> str | None:
    """One line about the images of a list that are missing; None where none are."""
    assert isinstance(images.images, ImageFiles)
    absent = absent_images(images)
    if not absent:
        return None
    return (
        f"{images.images.name(absent[0])} is not there, and {len(absent):,} of the {len(images):,} images of "
        f"{images.origin} (git blob {images.images.blob}) are missing; its paths are looked for below the folder given "
        "as data"
    )


def overlap(one: ImageList, other: ImageList) -> str | None:
    """One line about images that are in both lists; None where there are none."""
    assert isinstance(one.images, ImageFiles)
    assert isinstance(other.images, ImageFiles)
    paths = other.images.paths_N.tolist()
    shared = set(paths).intersection(one.images.paths_N.tolist())
    if not shared:
        return None
    first = os.fsdecode(next(path for path in paths if path in shared))
    return (
        f"{len(shared):,} images of {other.origin} are in {one.origin} too (first: {first}): figures on them would be "
        "too good"
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
        other = f"{read.file} is not the published {expected.name} (git blob {expected.blob}): "
        stripped = b"\n".join(line.strip() for line in read.content.split(b"\n"))
        if git_blob(stripped) == expected.blob:
            found.append(f"{other}it differs in white space alone (line ends)")
        else:
            found.append(
                f"{other}that has {expected.images:,} images of {expected.classes:,} classes, this one "
                f"{len(read.paths_N):,} of {len(np.unique(read.labels_N)):,}"
            )
    paths = read.paths_N.tolist()
    if len(set(paths)) < len(paths):
        repeated = [path for path, count in Counter(paths).items() if count > 1]
        first = os.fsdecode(repeated[0])
        labels = ", ".join(map(str, np.unique(read.labels_N[read.paths_N == repeated[0]])))
        found.append(
            f"{read.file}: {len(repeated):,} images are in it more than once (first: {first}, labelled {labels})"
        )
    return found
