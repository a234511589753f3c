"""Which files below a folder are images, and class folders as image lists. What is hidden is passed over, as `ls` does:
thumbnails and notebook checkpoints are copies of images that are there."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from equipoise.base.errors import UserError, several
from equipoise.base.files import real_path
from equipoise.data.decode import NO_IMAGE, why_no_image
from equipoise.data.images import PART_NAMES, Found, ImageFiles, ImageList
from equipoise.data.names import look_alikes, normal, numbered

# What systems and programs leave in folders that are shared or unpacked.
_LEFTOVERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
_CLASSES_NAMED = 5  # in a note
# What folders in data for other tasks are called.
_NO_CLASSES = frozenset({"images", "labels", "annotations", "mask", "masks", "ground_truth", "segmentation"})


def images_below(root: Path) -> dict[str, str]:
    """The files in a folder and its sub-folders, by their relative paths, in the order of the paths' parts: '' for
    an image, for others what they are. Links to folders are followed. Raises UserError for a link that leads back to a
    folder that it is in, OSError for a folder that cannot be read."""
    return {path: why_no_image(root / path) for path in sorted(_walk(root), key=lambda path: path.split("/"))}


def find_images(paths: Sequence[str | Path]) -> tuple[list[str], list[UserError]]:
    """Each file of `paths`, and in folders and their sub-folders those that are images. An error for each other file
    there but hidden ones, and for each folder without images. Raises OSError for a folder that cannot be read."""
    files, errors = list[str](), list[UserError]()
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(str(path))
            continue
        found = images_below(path)
        files += [str(path / name) for name, why in found.items() if not why]
        others = [(path / name, why) for name, why in found.items() if why]
        errors += [UserError(f"{file} is no image that can be read ({why})") for file, why in others]
        if all(found.values()):
            errors.append(UserError(f"{path} holds no images"))
    return files, errors


def unlabelled(files: Sequence[str]) -> ImageList:
    """Files without labels, as one class."""
    return ImageList("", ImageFiles.of(Path(), files), np.zeros(len(files), np.int64), ("",))


def _walk(root: Path, folder: str = "") -> Iterator[str]:
    for entry in _entries(root / folder):
        path = f"{folder}/{entry.name}".lstrip("/")
        if not entry.is_dir():
            if (entry.is_file() or entry.is_symlink()) and entry.name.lower() not in _SYSTEM_FILES:  # no pipe
                yield path
            continue
        if entry.is_symlink():
            link, real = root / path, real_path(root / path)
            if any(real_path(outer).is_relative_to(real) for outer in link.parents):
                raise UserError(f"{link} is a link to {real}, which it lies in: name a folder without it")
        yield from _walk(root, path)


def open_class_folders(root: Path, level: int = 1) -> Found:
    """The images of `root`, by part where it has parts. The classes are its folders, or with `level` 2 the folders in
    these. Raises UserError where it holds no class folders with images."""
    if not root.is_dir():
        how = "a table (.csv, .tsv, .parquet), or the folder of the images together with --train-list FILE"
        raise UserError(f"{root} is a file ({why_no_image(root) or 'an image'}); name a folder of class folders, {how}")
    left = sorted(_LEFTOVERS.intersection(os.listdir(root)))
    notes = [f"{root}: {name}/ is left by a program and is no class" for name in left]
    divided = _part_folders(root, notes)
    places = divided or {"train": root}
    leading = "train" if "train" in places else next(iter(places))
    opened = {part: _open_part(places[part], level, notes) for part in sorted(places, key=lambda part: part != leading)}
    classes = tuple(dict.fromkeys(map(normal, opened[leading])))
    notes += look_alikes(classes)
    others = [name for name in classes if name.lower() in _NO_CLASSES]
    notes += [f"'{name}' is taken for a class: keep it elsewhere if it is none" for name in others]
    if "train" in divided and len(classes) == 1:
        raise UserError(f"{divided['train']} has one class only ('{classes[0]}'); a classifier needs two or more")
    parts: dict[str, ImageList] = {}
    for part, images in opened.items():
        place, paths = places[part], [path for of_class in images.values() for path in of_class]
        labels_C = numbered(list(images), classes, str(place), f"{leading} part")
        labels_N = np.repeat(labels_C, [len(of_class) for of_class in images.values()])
        unsorted = ImageList(str(place), ImageFiles.of(place, paths), labels_N, classes)
        parts[part] = unsorted.take(np.argsort(labels_N, kind="stable"))
    return Found("class folders", parts, divided=bool(divided), notes=notes)


def _refuse_structure(root: Path, folders: list[str]) -> None:
    """Raise UserError for a folder whose sub-folders are no classes."""
    flat = [name for name in folders if name.lower() in PART_NAMES and not _subfolders(root / name)]
    if not folders:
        kinds = {why_no_image(Path(entry.path)) for entry in _entries(root)} - {""}
        what = f"has no sub-folders{''.join(f'; it holds {why}' for why in sorted(kinds)[:1])}"
    elif {"images", "labels"} <= set(folders):
        what = "has images/ and labels/, as data for detection do"
    elif len(flat) == len(folders) > 1:
        what = f"has {' and '.join(flat)} without class folders"
    else:
        return
    how = "put the images of each class in a folder of its own there, or a table of labels beside them"
    raise UserError(f"{root} {what}; {how}")


def _part_folders(root: Path, notes: list[str]) -> dict[str, Path]:
    """The folders that are parts; none where all are classes, as one named train with pictures in it, not folders."""
    folders = _subfolders(root)
    parts: dict[str, Path] = {}
    for name in [name for name in folders if name.lower() in PART_NAMES and _subfolders(root / name)]:
        part = PART_NAMES[name.lower()]
        if part in parts:
            raise UserError(f"{root} has two {part} parts, {parts[part].name}/ and {name}/; keep one of them here")
        parts[part] = root / name
    others = ", ".join(name for name in folders if root / name not in parts.values())
    if others and "train" not in parts:
        return {}
    if others:
        what = "no part (train, val and test hold class folders)"
        notes.append(f"{root}: beside train/, these folders are {what} and were passed over: {others}")
    return parts


def _open_part(root: Path, level: int, notes: list[str]) -> dict[str, list[str]]:
    """The images in each class folder of a part. A note for all that is passed over."""
    _refuse_structure(root, _subfolders(root))
    names = [""]
    for _ in range(level):
        names = [f"{name}/{within}".lstrip("/") for name in names for within in _subfolders(root / name)]
    images = {name: list[str]() for name in names}
    others: dict[str, Counter[str]] = defaultdict(Counter)  # by what they are: how many of each class
    strays: list[str] = []
    for path, why in images_below(root).items():
        name = "/".join(path.split("/")[:-1][:level])
        if name in images and why:
            others[why][name] += 1
        elif name in images:
            images[name].append(path)
        elif not why.endswith(NO_IMAGE):
            strays.append(f"{root / path}, {why}".removesuffix(", "))
    filled = {name for name in names if images[name]}.union(*others.values())
    notes += [f"{root / name} is empty and was passed over" for name in names if name not in filled]
    if strays:
        notes.append(f"{several(len(strays), 'image')} in no class folder passed over (first: {strays[0]})")
    for why, counts in others.items():
        named = [f"'{name}' {count:,}" for name, count in counts.most_common(_CLASSES_NAMED)]
        named += [f"{len(counts) - len(named):,} more classes"] if len(counts) > len(named) else []
        notes.append(f"{root}: {several(counts.total(), 'file')} passed over: {why} (of {', '.join(named)})")
    if not any(images.values()):
        raise UserError("; ".join([f"{root} holds no images in its class folders", *notes]))
    if all(path.count("/") > level for of_class in images.values() for path in of_class):
        notes.append(_nested(root, [name for name in names if name in filled], level))
    return {name: images[name] for name in names if name in filled}


def _nested(root: Path, names: list[str], level: int) -> str:
    """A note on class folders that hold images in sub-folders alone: these may be the classes."""
    inner = [_subfolders(root / name) for name in names]
    way, place = f"--class-level {level + 1}", root / names[0]
    if all(within == inner[0] for within in inner):  # one folder around them, or several versions of the same
        while len(within := _subfolders(place)) == 1 and within[0].lower() not in PART_NAMES:
            place /= within[0]
        way = f"name {place} as data"
    what = f"{several(len(names), 'class')} with images in sub-folders alone, as {names[0]}/ with"
    return f"{root}: {what} {', '.join(inner[0][:3])}; if those are the classes: {way}"


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder but hidden things and leftovers."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name[0] != "." and entry.name not in _LEFTOVERS]
