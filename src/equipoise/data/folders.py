"""Folders of class folders become image lists."""

import os
import posixpath
from pathlib import Path

import numpy as np

from equipoise.base.errors import UserError, reason, several
from equipoise.data.images import PART_NAMES, Found, ImageFiles, ImageList, missing_files

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def open_class_folders(root: Path, allow_outside: bool = False) -> Found:
    """The images of `root`, by part where it has parts. Raises UserError where that is no folder of class folders."""
    if not root.is_dir():
        raise UserError(f"{root} is a file, but no Parquet file; name a folder of class folders")
    folders = _subfolders(root)
    if not folders:
        raise UserError(f"{root} has no sub-folders; put the images of each class in a folder of its own there")
    notes: list[str] = []
    part_folders = _part_folders(root, folders, notes)
    first = part_folders.get("train", next(iter(part_folders.values()))) if part_folders else root
    names = tuple(folder.name for folder in _subfolders(first))
    lists: dict[str, ImageList] = {}
    for part, folder in (part_folders or {"train": root}).items():
        lists[part] = _class_folders(folder, names, notes)
        if not allow_outside:
            missing_files(lists[part], bounds=root)
    return Found("class folders", lists, divided=bool(part_folders), notes=tuple(notes))


def _part_folders(root: Path, folders: list[Path], notes: list[str]) -> dict[str, Path]:
    """The folders that are parts; none where all are classes. `train` may be a class: then it holds pictures, not
    folders."""
    candidates = [folder for folder in folders if folder.name.lower() in PART_NAMES and _subfolders(folder)]
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


def _class_folders(root: Path, names: tuple[str, ...], notes: list[str]) -> ImageList:
    """The images below `root`, in the order of their paths."""
    unknown = [folder.name for folder in _subfolders(root) if folder.name not in names]
    if unknown:
        raise UserError(f"{root / unknown[0]} is no class of the training part ({len(names)} classes); remove it")
    paths: list[str] = []
    labels: list[int] = []
    others = [entry.name for entry in _entries(root) if not entry.is_dir() and _is_image(entry.name)]
    for label, name in enumerate(names):
        for path in _files_below(root, name) if (root / name).is_dir() else ():
            if _is_image(path):
                paths.append(path)
                labels.append(label)
            else:
                others.append(path)
    if others:
        passed_over = f"{several(len(others), 'file')} passed over (first: {others[0]})"
        notes.append(f"{root}: {passed_over}: beside the folders of the classes, or no image by its ending")
    if not paths:
        raise UserError(f"{root} holds no images in its class folders (known endings: {' '.join(sorted(SUFFIXES))})")
    return ImageList(str(root), ImageFiles.of(root, paths), np.array(labels, np.int64), names)


def _is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in SUFFIXES


def _files_below(root: Path, name: str) -> list[str]:
    """The files in the folder `name` and its sub-folders, by paths relative to `root` and in their order. Links to
    folders below it are not followed, and what is hidden is passed over: thumbnails and notebook checkpoints are copies
    of images that are there already."""
    files: list[str] = []
    waiting = [name]
    while waiting:
        folder = waiting.pop()
        for entry in _entries(root / folder):
            path = f"{folder}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif not entry.is_dir():
                files.append(path)
    return sorted(files, key=lambda path: path.split("/"))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(folder / entry.name for entry in _entries(folder) if entry.is_dir())


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden. Raises UserError where that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({reason(error)})") from None
