"""Tables of labels beside a folder of images (a row an image) become image lists.

Columns are found by their names, images by their paths or file names anywhere below the folder.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from equipoise.base.errors import UserError, several, shown
from equipoise.config.recipe import Data
from equipoise.data.folders import images_below
from equipoise.data.images import PART_NAMES, Found, ImageFiles, ImageList, missing_files
from equipoise.data.names import in_order, look_alikes, normal, unknown_classes
from equipoise.data.rows import LABELS, TABLES, Columns, named_column, part_named, read_joined, read_table

_SPLITS = ("split", "subset", "partition", "set")
_GROUPS = ("group", "groupid")
_ONE_HOT = frozenset({"0", "1", "0.0", "1.0"})
_SAMPLE = 200  # rows by which the column of images is found


class NoTableError(UserError):
    """A table that does not say which image has which label."""


@dataclass
class _Rows:
    """A table of labels. `part`: the one that its name says, or ''. `labels`: '' where a row has none."""

    part: str
    file: Path
    images: Sequence[str]
    labels: Sequence[str]
    splits: Sequence[str]
    groups: Sequence[str]
    said: str


@dataclass
class _Part:
    """Images of a part: path -> (label, group)."""

    rows: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    missing: list[str] = field(default_factory=list[str])


def find_tables(root: Path) -> list[tuple[str, Path, Columns | None]]:
    """The tables in a folder: the part that the name of each says, its file, and its columns where it is two joined."""
    if joined := read_joined(root):
        return [("", *joined)]
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in TABLES and file.name[0] != ".")
    files = [file for file in files if "submission" not in file.stem.lower()]  # a competition's: its labels are made up
    return [(part_named(file.stem), file, None) for file in files]


def open_tables(root: Path, named: Mapping[str, Path], data: Data) -> Found:
    """The images below `root`, as the tables `named` by part say, or '' by none; or else the tables in `root`. Raises
    UserError where these have no such columns, or do not fit the images."""
    tables = [(part, file, None) for part, file in named.items()] or find_tables(root)
    index = _Index(images_below(root).images)
    opened: list[_Rows] = []
    notes: list[str] = []
    for part, file, columns in tables:
        try:
            opened.append(_read(part, file, columns or read_table(file), index, data))
        except NoTableError as error:
            if named or len(tables) == 1:
                raise
            notes.append(f"passed over: {error}")
    if any(rows.part == "train" for rows in opened):
        others = [rows.file for rows in opened if not rows.part]
        notes += [f"{file} was passed over: another table is named as the training part" for file in others]
        opened = [rows for rows in opened if rows.part]
    if not opened:
        raise NoTableError("; ".join(notes))
    if len(opened) > 1 and not all(rows.part for rows in opened):
        names = ", ".join(rows.file.name for rows in opened)
        raise UserError(f"{root} has several tables with labels ({names}): name the one that is meant as --data FILE")
    return _assemble(root, opened, index, data, notes)


class _Index:
    """Finds the images below a folder by what a table calls them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.named: dict[str, list[str]] = defaultdict(list)  # by the file's name, also without its ending
        for path in paths:
            name = _key(path.rpartition("/")[2])
            self.named[name].append(path)
            self.named[name.rpartition(".")[0]].append(path)

    def find(self, cell: str, *folders: str) -> list[str]:
        """The images that a cell may mean: a path below any folder, a URL, a file's name, with or without its ending.
        Of several, those whose folders are named as in the cell, or as `folders`."""
        if "://" in cell:
            cell = unquote(urlsplit(cell).path)
        parts = _key(cell.replace("\\", "/")).split("/")
        found = self.named.get(parts[-1], [])
        if len(found) > 1:
            exact = [path for path in found if _key(path) == "/".join(parts)]
            alike = [_in_common(_key(path).split("/")[-2::-1], parts[-2::-1]) for path in found]
            found = exact or [path for path, same in zip(found, alike, strict=True) if same == max(alike)]
        if len(found) > 1:
            within = [path for path in found if {_key(one) for one in folders} & {*_folders(path)}]
            found = within or found
        return found


def _folders(path: str) -> Iterable[str]:
    """The names of the folders that an image is in, and the parts that these say."""
    for folder in path.split("/")[:-1]:
        yield from (_key(folder), part_named(folder))


def _in_common(one: Sequence[str], other: Sequence[str]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def _key(name: str) -> str:
    return normal(name).casefold()


def _read(part: str, file: Path, columns: Columns, index: _Index, data: Data) -> _Rows:
    """A table whose columns of images and labels have been found. Raises UserError where these cannot be."""
    if any("." in name and index.find(name) for name in columns):
        raise UserError(f"{file} has no heading: write one above its first row, as filename,label")
    for key, column in (("image_column", data.image_column), ("label_column", data.label_column)):
        if column and column not in columns:
            raise UserError(f"{file} has no column '{column}' (data.{key}); it has {', '.join(columns)}")
    label = data.label_column or named_column(columns, LABELS)
    split = named_column(columns, _SPLITS)
    if any(cell.lower() not in PART_NAMES for cell in columns.get(split, ())):
        split = ""  # it divides something else
    group = data.group_by if data.group_by in columns else "" if data.group_by else named_column(columns, _GROUPS)
    image = data.image_column or _column_of_images(file, columns, index, {label, split, group})
    others = [name for name in columns if name not in (image, split, group)]
    labels = columns.get(label)
    if labels is None and len(others) == 1:
        label, labels = others[0], columns[others[0]]
    elif labels is None and others and all(_ONE_HOT.issuperset(columns[name]) for name in others):
        label, labels = f"{others[0]} … {others[-1]}", _one_hot(columns, others)
    if labels is None:
        raise NoTableError(
            f"{file}: which column has the labels? name it with --set data.label_column=NAME; there are "
            f"{', '.join(others)}"
        )
    said = {"images": image, "labels": label, "parts": split, "groups": group}
    described = ", ".join(f"{what} by '{column}'" for what, column in said.items() if column)
    nothing = [""] * len(labels)
    return _Rows(part, file, columns[image], list(map(normal, labels)), columns.get(split, nothing),
                 columns.get(group, nothing), f"{file}: {described}")  # fmt: skip


def _column_of_images(file: Path, columns: Columns, index: _Index, others: set[str]) -> str:
    """The column most of whose cells are images below the folder."""
    found = {
        name: sum(bool(cell and index.find(cell)) for cell in cells[:: max(1, len(cells) // _SAMPLE)])
        for name, cells in columns.items()
        if name not in others
    }
    best = max(found, key=lambda name: found[name], default="")
    if best and found[best]:
        return best
    raise NoTableError(
        f"{file}: no column names images below its folder (columns: {', '.join(columns)}); put the images there, or "
        "name their folder: --data FOLDER --train-list TABLE"
    )


def _one_hot(columns: Columns, names: Sequence[str]) -> list[str]:
    """For each row the one column that has 1; '' where none or several have."""
    rows = zip(*(columns[name] for name in names), strict=True)
    marked = [[name for name, cell in zip(names, row, strict=True) if cell[0] == "1"] for row in rows]
    return [found[0] if len(found) == 1 else "" for found in marked]


def _assemble(root: Path, opened: Sequence[_Rows], index: _Index, data: Data, notes: list[str]) -> Found:
    """The lists of the parts that the tables make."""
    parts: dict[str, _Part] = defaultdict(_Part)
    for rows in opened:
        notes += _sort_into_parts(rows, index, parts)
    leading = parts.get("train") or next(iter(parts.values()))
    classes = in_order(label for label, _ in leading.rows.values())
    notes += look_alikes(classes)
    origin = ", ".join(str(rows.file) for rows in opened)
    lists: dict[str, ImageList] = {}
    faults: dict[str, str] = {}
    for name, part in parts.items():
        lists[name] = _as_list(root, f"{origin}, {name} part" if len(parts) > 1 else origin, part, classes)
        if not data.allow_outside:
            missing_files(lists[name], bounds=root)
        if part.missing:
            absent = f"{lists[name].origin}: {several(len(part.missing), 'image')} not found below {root}"
            absent += f" (first: {shown(part.missing[0])})"
            if data.on_bad_image == "skip":
                notes.append(f"{absent}, left out")
            else:
                faults[name] = f"{absent}; put them there, or leave them out with --on-bad-image skip"
        others = [parts[other].rows for other in [*parts][: [*parts].index(name)]]
        if again := [path for path in part.rows if any(path in other for other in others)]:
            also = f"{several(len(again), 'image')} of the {name} part are in another part too (first: {again[0]})"
            faults[name] = f"{also}: figures on them would be too good"
    used = set[str]().union(*(part.rows for part in parts.values()))
    if unused := [path for path in index.paths if path not in used]:
        notes.append(f"{several(len(unused), 'image')} below {root} in no row that is used (first: {unused[0]})")
    described = [rows.said for rows in opened]
    divided = [*parts] != ["train"] or bool(opened[0].part)
    return Found("a table of labels", lists, divided, notes=notes, faults=faults, described=described)


def _sort_into_parts(rows: _Rows, index: _Index, parts: dict[str, _Part]) -> list[str]:
    """Add a table's rows to the parts; notes on those that are left out. Raises UserError for a row that may mean
    several images."""
    nameless: list[int] = []
    torn: dict[str, str] = {}
    known = set(rows.labels)
    cells = zip(rows.images, rows.labels, rows.splits, rows.groups, strict=True)
    for number, (cell, label, split, group) in enumerate(cells, 1):
        part = rows.part or PART_NAMES.get(split.lower(), "train")
        found = index.find(cell, part, label) if label else []
        if len(found) > 1:
            raise UserError(
                f"{rows.file}, row {number}: '{cell}' may be {found[0]} or {found[1]}: write the path of the one meant"
            )
        if not label:
            nameless.append(number)
        elif len(parted := set(re.split(r"\s*[|;,]\s*", label))) > 1 and parted <= known:
            torn[cell] = part  # 'cat|dog'
        elif not found:
            parts[part].missing.append(cell)
        elif parts[part].rows.setdefault(found[0], (label, group))[0] != label:
            torn[found[0]] = part
    for path, part in torn.items():
        parts[part].rows.pop(path, None)
    left_out = [f"{several(len(nameless), 'row')} without one label (first: row {nameless[0]})"] if nameless else []
    left_out += [f"{several(len(torn), 'image')} with several labels (first: {next(iter(torn))})"] if torn else []
    return [f"{rows.file}: left out: {said}" for said in left_out]


def _as_list(root: Path, origin: str, part: _Part, classes: tuple[str, ...]) -> ImageList:
    """Raises UserError for a label that is none of `classes`."""
    numbers = {name: label for label, name in enumerate(classes)}
    labels = [label for label, _ in part.rows.values()]
    if unknown := [label for label in dict.fromkeys(labels) if label not in numbers]:
        raise UserError(f"{origin}: {unknown_classes(unknown, classes, 'train part')}")
    if not labels:
        raise UserError(f"{origin}: none of its images was found below {root}")
    labels_N = np.array([numbers[label] for label in labels], np.int64)
    groups_N = np.array([group for _, group in part.rows.values()])
    images = ImageFiles.of(root, part.rows)
    return ImageList(origin, images, labels_N, classes, groups_N if groups_N[0] else None)
