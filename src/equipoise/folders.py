"""Folders of class folders become image lists."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from equipoise.errors import UserError
from equipoise.lists import PART_NAMES, Found, ImageFiles, ImageList, Paths

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def open_class_folders(root: Path) -> Found:
    if not root.is_dir():
        raise UserError(f"{root} is a file, but no Parquet file; name a folder of class folders")
    folders = subfolders(root)
    if not folders:
        raise UserError(f"{root} has no sub-folders; put the images of each class in a folder of its own there")
    notes: list[str] = []
    part_folders = _part_folders(root, folders, notes)
    divided = bool(part_folders)
    first = part_folders.get("train", next(iter(part_folders.values()))) if divided else root
    names = tuple(folder.name for folder in subfolders(first))
    lists = {part: _class_folders(folder, names, notes) for part, folder in (part_folders or {"train": root}).items()}
    return Found("class folders", lists, divided, notes=tuple(notes))


def _part_folders(root: Path, folders: list[Path], notes: list[str]) -> dict[str, Path]:
    """The folders that are parts; none where all are classes. `train` may be a class: then it holds pictures, not
    folders."""
    candidates = [folder for folder in folders if folder.name.lower() in PART_NAMES and subfolders(folder)]
    others = [folder.name for folder in folders if folder not in candidates]
    parts: dict[str, Path] = {}
    for folder in candidates:
        part = PART_NAMES[folder.name.lower()]
        if part in parts:
            raise UserError(f"{root} has two {part} parts, {parts[part].name}/ and {folder.name}/; keep one of them")
        parts[part] = folder
    if others and "train" not in parts:
        return {}
    if others:
        notes.append(f"{root}: beside train/, these folders are no part and were passed over: {', '.join(others)}")
    return parts


def _files(folder: str, path: str) -> Iterator[str]:
    """Paths of the files below a folder that is itself at `path`, as a class may be sorted into further folders. In an
    order that is the same on every machine; a million of them in seconds, as none is asked for more than its kind."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        # Hidden folders hold thumbnails and notebook checkpoints: copies of images that are there already.
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path, f"{path}/{entry.name}")
        elif entry.is_file():
            yield f"{path}/{entry.name}"


def _class_folders(root: Path, names: tuple[str, ...], notes: list[str]) -> ImageList:
    unknown = [folder.name for folder in subfolders(root) if folder.name not in names]
    if unknown:
        raise UserError(f"{root / unknown[0]} is no class of the training part ({len(names)} classes); remove it")
    paths: list[str] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(names):
        files = list(_files(str(root / name), name)) if (root / name).is_dir() else []
        images = [path for path in files if os.path.splitext(path)[1].lower() in SUFFIXES]
        others += len(files) - len(images)
        paths += images
        labels += [label] * len(images)
    if others:
        notes.append(f"{root}: {others} files that are not images by their ending were passed over")
    if not paths:
        raise UserError(f"{root} holds no images in its class folders (known endings: {' '.join(sorted(SUFFIXES))})")
    return ImageList(str(root), ImageFiles(root, Paths.of(paths)), np.array(labels, dtype=np.int64), names)
