"""List files (a line `path label` an image) become image lists. The published ones are no part of this package: only
their names and git's blob ids (`git hash-object FILE`) are, the same in every repository that carries them."""

import codecs
import hashlib
import io
import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason
from equipoise.data.images import Found, ImageFiles, ImageList, Indices

_MOST_DIGITS = 6  # of a label: a larger one is a mistake, as a year or the id of an image


@dataclass(frozen=True)
class Published:
    """A list file that the literature shares. `blob`: its git blob id, where it is known. `official`: the JSON file
    that says the same."""

    name: str
    blob: str = ""
    official: str = ""


BENCHMARKS: Mapping[str, Mapping[str, Published]] = {
    "imagenet-lt": {
        "train": Published("ImageNet_LT_train.txt", "a063f095fcd475db4cf8b0658c4b73955535bbf9"),
        "validation": Published("ImageNet_LT_val.txt", "3ed3188b2f44829ce2dec1cc27040d8d40984088"),
        "test": Published("ImageNet_LT_test.txt", "76a2fb9749d6cd29e765cc4f8c270f2504131e2f"),
    },
    # The validation list is the literature's test set; there is no other with labels.
    "inat2018": {
        "train": Published("iNaturalist18_train.txt", "4accdb7584d2f0a5106c40a33ed6afa392189bcc", "train2018.json"),
        "test": Published("iNaturalist18_val.txt", "4c23900857fd0f5adcd4cc0dffef345039eeb05f", "val2018.json"),
    },
    "places-lt": {
        "train": Published("Places_LT_train.txt", "6392252f8ae867bc8a5e841cc1b29e5b8ef4b636"),
        "validation": Published("Places_LT_val.txt"),
        "test": Published("Places_LT_test.txt", "e732e58b8aa718a2c1c11933375f5710652c2b93"),
    },
}
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


def text_lines(content: bytes) -> list[bytes]:
    """The lines of a text file, whatever its beginning says of how it is written."""
    text = content.removeprefix(codecs.BOM_UTF8)
    if text[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # PowerShell's
        text = text.decode("utf-16", "replace").encode()
    return io.BytesIO(text).readlines()


def read_list(file: Path, allow_outside: bool = False) -> ListFile:
    """A list file, or iNaturalist's official JSON as the list that it stands for. A line is a path, which may have
    spaces, white space and a whole number. Raises UserError naming the file and the line, for a path that leaves the
    data folder too, unless `allow_outside`."""
    content = file.read_bytes() if file.suffix != ".json" else _from_annotations(file)
    paths: list[bytes] = []
    labels: list[int] = []
    for number, line in enumerate(text_lines(content), 1):
        words = line.strip().rsplit(None, 1)
        if not words:
            continue
        # Backslashes are Windows' way to write it.
        path = posixpath.normpath(words[0] if b"/" in words[0] else words[0].replace(b"\\", b"/"))
        fault = ""
        if len(words) != 2 or not words[1].isdigit() or len(words[1]) > _MOST_DIGITS or b"\0" in line:
            fault = f"is not 'path label' with a label of at most {_MOST_DIGITS} digits"
        elif not allow_outside and path.partition(b"/")[0] in (b"", b".."):
            fault = "leaves the data folder; write its path relative to that, or allow it with --allow-outside"
        if fault:
            raise UserError(f"{file}, line {number}: '{os.fsdecode(line[:200]).strip()}' {fault}")
        paths.append(path)
        labels.append(int(words[1]))
    if not paths:
        raise UserError(f"the list {file} names no images")
    return ListFile(file, git_blob(content), np.array(paths, np.bytes_), np.array(labels, np.int64))


def _from_annotations(file: Path) -> bytes:
    """iNaturalist's JSON as the canonical list: one line `file_name category_id` an image, in the order of `images`."""
    try:
        table: Any = msgspec.json.decode(file.read_bytes())
        categories = {of["image_id"]: of["category_id"] for of in table["annotations"]}
        return "".join(f"{image['file_name']} {categories[image['id']]}\n" for image in table["images"]).encode()
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        what = f"not iNaturalist's JSON with images and an annotation of each ({reason(error, library=True)})"
        how = "take the official file anew (that of the test part has no labels)"
        raise UserError(f"{file} is {what}; {how}") from None


def open_lists(root: Path, named: Mapping[str, Path], benchmark: str, allow_outside: bool, url: str = "") -> Found:
    """The images below `root`, copied there from `url` when needed, of the lists `named` by part, or else of a
    benchmark's, wherever these are found. Classes are 0 to the largest label of the training list (of all, without
    one). Raises UserError for a larger label, and where no list is found."""
    benchmark, files = "" if named else benchmark, dict(named)
    published = BENCHMARKS.get(benchmark, {})
    faults: dict[str, str] = {}
    for part, known in published.items():
        if file := find_list(root, known):
            files[part] = file
        elif known.blob:  # one without a known fingerprint is not to be had everywhere: go without
            what = f"the list {known.name} (git blob {known.blob}) is not there"
            places, flag = ", ".join(map(str, _places(root, known))), part.replace("validation", "val")
            faults[part] = f"{what}: looked for {places}; put it there, or name it with --{flag}-list FILE"
    if not files:
        raise UserError(next(iter(faults.values())))
    lists = {part: read_list(file, allow_outside) for part, file in files.items()}
    leading = [lists["train"]] if "train" in lists else lists.values()
    classes = 1 + max(int(read.labels_N.max()) for read in leading)
    names = _class_names(lists.values(), classes)
    parts: dict[str, ImageList] = {}
    described: list[str] = []
    notes: list[str] = []
    for part, read in lists.items():
        if (largest := int(read.labels_N.max())) >= classes:
            raise UserError(f"{read.file} has label {largest}, but the training list's classes are 0 to {classes - 1}")
        parts[part] = ImageList(str(read.file), ImageFiles(root, read.paths_N, url), read.labels_N, names)
        identity, departs = identify(read, published.get(part))
        described.append(identity)
        notes += [departs] if departs else []
        if part == "train" and read.labels_N.min() > 0:
            notes.append(f"{read.file}: no image has the label 0: labels begin at 0")
        if repeated := len(read.paths_N) - len(np.unique(read.paths_N)):
            notes.append(f"{read.file}: {repeated:,} images are in it again: what is held out may be trained on")
    if names[0].isdigit() and not any(_class_names([read], classes)[0].isdigit() for read in lists.values()):
        notes.append("the lists have different folders for one label: do they belong together?")
    kind = f"list files of {benchmark}" if benchmark else "list files"
    # Labels are numbers, the same in all lists of a benchmark: names of folders are for people.
    return Found(kind, parts, True, named=False, notes=notes, faults=faults, described=described, benchmark=benchmark)


def _places(root: Path, known: Published) -> list[Path]:
    """Where a published list, or the official JSON, may be: below `root`, or where the authors' code has the list."""
    of_authors = Path(known.name.rpartition("_")[0], known.name)
    official = [root / known.official, root / "annotations" / known.official] if known.official else []
    return [root / known.name, root / of_authors, *official, "dataset" / of_authors]


def find_list(root: Path, known: Published) -> Path | None:
    """The first of these places that holds a file."""
    return next((place for place in _places(root, known) if place.is_file()), None)


def _class_names(files: Iterable[ListFile], classes: int) -> tuple[str, ...]:
    """Names of the classes by the folders of their images, or their numbers where these do not tell them apart."""
    pairs: set[tuple[int, bytes]] = set()
    for read in files:
        folders = [path.rpartition(b"/")[0] for path in read.paths_N.tolist()]
        if len({folder.partition(b"/")[0] for folder in folders}) == 1:  # train/, val/, train_val2018/
            folders = [folder.partition(b"/")[2] for folder in folders]
        pairs.update(zip(read.labels_N.tolist(), folders, strict=True))
    names, distinct = dict(pairs), {folder for _, folder in pairs}
    if b"" in distinct or not len(distinct) == len(names) == len(pairs):
        return tuple(map(str, range(classes)))
    return tuple(os.fsdecode(names.get(label, str(label).encode())) for label in range(classes))


def identify(read: ListFile, expected: Published | None = None) -> tuple[str, str]:
    """Which published list this is, by its fingerprint; and, or '', that it is not the published list that is expected
    or that its name says."""
    name = next((known.name for known in PUBLISHED.values() if known.blob == read.blob), "")
    own = f"the published {name} (git blob {read.blob})" if name else f"git blob {read.blob}, no published list"
    expected = expected or PUBLISHED.get(read.file.name)
    if expected is None or expected.blob in ("", read.blob):
        return f"{read.file}: {own}", ""
    return f"{read.file}: {own}", f"{read.file} is not the published {expected.name} (git blob {expected.blob}): {own}"
