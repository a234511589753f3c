"""Tables of labels beside a folder of images (a row an image) become image lists. Columns are found by their names,
images by their paths or file names anywhere below the folder."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from equipoise.base.errors import UserError, several, shown
from equipoise.config.recipe import Data
from equipoise.data.decode import NO_IMAGE
from equipoise.data.folders import images_below
from equipoise.data.images import PART_NAMES, Found, ImageFiles, ImageList
from equipoise.data.names import in_order, look_alikes, normal, numbered
from equipoise.data.rows import LABELS, TABLES, Columns, NoTableError, named_column, part_named, read_joined, read_table

_SPLITS = ("split", "subset", "partition", "set", "dataset")
_GROUPS = ("group", "groupid")
_ONE_HOT = frozenset({"0", "1", "0.0", "1.0"})
_SAMPLE = 200  # rows by which the column of images is found


class _Table(NamedTuple):
    """A table of labels. `part`: the one that its name says, or ''. A row: image, label ('' where it has none or
    several), part, group. `label`: the column of labels, '' for one-hot ones. `said`: which columns these are."""

    part: str
    file: Path
    label: str
    rows: list[tuple[str, str, str, str]]
    said: str


_Found = dict[str, tuple[str, str]]  # path -> label, group
_Missing = list[tuple[str, str]]  # cell, label


def find_tables(root: Path) -> list[tuple[str, Path, Columns | None]]:
    """The tables in a folder: the part that the name of each says, its file, and its columns where it is two joined."""
    if joined := read_joined(root):
        return [("", *joined)]
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in TABLES and file.name[0] != ".")
    # The labels of a competition's sample of a submission are made up.
    return [(part_named(file.stem), file, None) for file in files if "submission" not in file.stem.lower()]


def open_tables(root: Path, named: Mapping[str, Path], data: Data, guess: bool = True) -> Found:
    """The images below `root`, as the tables `named` by part (or '') say, or else those in `root`. With `guess`, a
    column of labels may be called anything. Raises UserError for tables without such columns, or of other images."""
    tables = [(part, file, None) for part, file in named.items()] or find_tables(root)
    tables.sort(key=lambda table: table[0] != "train")
    index = _Index(images_below(root))
    opened: list[_Table] = []
    notes: list[str] = []
    for part, file, columns in tables:
        try:
            opened.append(_read(part, file, columns or read_table(file), index, data, guess))
            data = replace(data, label_column=opened[0].label or data.label_column)  # the others have the same
        except NoTableError as error:
            if named or len(tables) == 1:
                raise
            notes.append(f"passed over: {error}")
    if any(table.part == "train" for table in opened):
        others = [table.file for table in opened if not table.part]
        notes += [f"{file} was passed over: another table is named as the training part" for file in others]
        opened = [table for table in opened if table.part]
    if not opened:
        raise NoTableError("; ".join(notes))
    if len(opened) > 1 and not all(table.part for table in opened):
        names = ", ".join(table.file.name for table in opened)
        raise UserError(f"{root} has several tables with labels ({names}): name the one meant, as {opened[0].file}")
    return _assemble(root, opened, index, data, notes)


class _Index:
    """Finds the images below a folder by what a table calls them."""

    def __init__(self, below: Mapping[str, str]) -> None:
        self.paths = [path for path, why in below.items() if not why]
        self.others = {_key(path): why for path, why in below.items() if why and not why.endswith(NO_IMAGE)}
        self._named: dict[str, list[str]] = defaultdict(list)  # by the file's name, also without its ending
        for path in self.paths:
            for name in {_key(path), _key(path).rpartition(".")[0]} - {""}:
                self._named[name].append(path)

    def find(self, cell: str, *folders: str) -> list[str]:
        """The images that a cell may mean: a path below any folder, a URL, a file's name, with or without its ending.
        Of several, those whose names and folders are most like the cell, or else are named as `folders`."""
        if "://" in cell:
            cell = unquote(urlsplit(cell).path)
        parts = normal(cell.replace("\\", "/")).split("/")
        found = self._named.get(_key(parts[-1]), [])
        if len(found) < 2:
            return found

        def likeness(path: str) -> tuple[bool, bool, int, bool]:
            *above, name = normal(path).split("/")
            pairs = zip(map(_key, reversed(above)), map(_key, parts[-2::-1]), strict=False)
            alike = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            hints = {*map(_key, above), *map(part_named, above)} & {_key(folder) for folder in folders}
            return [*above, name] == parts, name == parts[-1], alike, bool(hints)

        most = max(map(likeness, found))
        return [path for path in found if likeness(path) == most]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _key(path: str) -> str:
    """The name of a file or folder, in small letters."""
    return normal(path.rpartition("/")[2]).casefold()


def _read(part: str, file: Path, columns: Columns, index: _Index, data: Data, guess: bool) -> _Table:
    """A table whose columns of images and labels have been found. Raises UserError where these cannot be."""
    label = data.label_column or named_column(columns, LABELS)
    if not label and any(map(index.find, columns)):
        raise UserError(f"{file} has no heading: write one above its first row, as filename,label")
    for key in ("image_column", "label_column"):
        if (column := getattr(data, key)) and column not in columns:
            raise NoTableError(f"{file} has no column '{column}' (data.{key}); it has {_listed(columns)}")
    split = named_column(columns, _SPLITS)
    if not any(cell.lower() in PART_NAMES for cell in columns.get(split, ())):
        split = ""  # it divides something else
    group = data.group_by or named_column(columns, _GROUPS)
    group = group if group in columns else ""  # it is a regular expression
    image = data.image_column or _column_of_images(file, columns, index, {label, split, group})
    left = [name for name in columns if name not in (image, split, group)]
    others = [name for name in left if guess and len(set(columns[name])) < max(5, len(columns[name]))]  # no ids
    labels = columns.get(label)
    if labels is None and len(others) == 1:
        label, labels = others[0], columns[others[0]]
    elif labels is None and others and all(_ONE_HOT.issuperset(columns[name]) for name in others):
        label = f"{others[0]} … {others[-1]}"
        marked = [[name for name in others if columns[name][row][0] == "1"] for row in range(len(columns[image]))]
        labels = [found[0] if len(found) == 1 else "" for found in marked]
    if labels is None:
        how = "name it with --set 'data.label_column=NAME'"
        raise NoTableError(f"{file}: which column has the labels? {how}; there are {_listed(left)}")
    said = {"images": image, "labels": label, "parts": split, "groups": group}
    described = ", ".join(f"{what} by '{column}'" for what, column in said.items() if column)
    nothing = [""] * len(labels)
    cells = columns[image], map(normal, labels), columns.get(split, nothing), columns.get(group, nothing)
    rows = list(zip(*cells, strict=True))
    if split:
        if wrong := [of_split for *_, of_split, _ in rows if of_split and of_split.lower() not in PART_NAMES]:
            how = "write train, val or test, or give the column another name"
            raise UserError(f"{file}: column '{split}' says {shown(wrong[0])}, which is no part: {how}")
        rows = [(cell, name if of_split else "", of_split, of_group) for cell, name, of_split, of_group in rows]
    return _Table(part, file, label if label in columns else "", rows, f"{file}: {described}")


def _column_of_images(file: Path, columns: Columns, index: _Index, others: set[str]) -> str:
    """The column most of whose cells are images below the folder; of several, one with endings or unlike cells."""
    samples = {name: cells[:: max(1, len(cells) // _SAMPLE)] for name, cells in columns.items() if name not in others}
    found = {name: [index.find(cell) for cell in cells] for name, cells in samples.items()}

    def rank(name: str) -> tuple[int, int, int]:
        cells = samples[name]
        return sum(map(bool, found[name])), sum("." in cell for cell in cells), len(set(cells))

    most = max(map(rank, samples), default=(0, 0, 0))
    if most[0] == 0:
        cell, image = next(iter(columns.values()))[0], next(iter(index.paths), "not there")
        what = f"columns: {_listed(columns)}; the first row begins with '{cell}', an image is {image}"
        how = "put the images there, or name their folder with --data and this table with --train-list"
        raise NoTableError(f"{file}: no column names images below its folder ({what}); {how}")
    best = [name for name in samples if rank(name) == most]
    if any(found[name] != found[best[0]] for name in best[1:]):
        what, how = " or ".join(best), "say it with --set data.image_column=NAME"
        raise NoTableError(f"{file}: which column names the images, {what}? {how}")
    return best[0]


def _assemble(root: Path, opened: Sequence[_Table], index: _Index, data: Data, notes: list[str]) -> Found:
    """The lists of the parts that the tables make. An image without a group is one of its own."""
    parts: dict[str, tuple[_Found, _Missing]] = defaultdict(lambda: ({}, []))
    for table in opened:
        notes += _sort_into_parts(table, index, parts)
    if not any(found for found, _ in parts.values()):
        raise NoTableError("; ".join([f"{opened[0].file}: no row is left that has one label and an image", *notes]))
    leading, _ = parts["train"] if "train" in parts else next(iter(parts.values()))
    classes = in_order(label for label, _ in leading.values())
    notes += look_alikes(classes)
    lists: dict[str, ImageList] = {}
    faults: dict[str, str] = {}
    for name, (found, missing) in parts.items():
        origin = ", ".join(str(table.file) for table in opened) + (f", {name} part" if len(parts) > 1 else "")
        labels_N = numbered([label for label, _ in found.values()], classes, origin)
        grouped = any(group for _, group in found.values())
        groups_N = np.array([group or path for path, (_, group) in found.items()]) if grouped else None
        lists[name] = ImageList(origin, ImageFiles.of(root, found), labels_N, classes, groups_N)
        if missing:
            cell, lost = missing[0][0], sorted({label for _, label in missing} - {label for label, _ in found.values()})
            why = index.others.get(_key(cell.replace("\\", "/")), "")
            absent = f"{origin}: {several(len(missing), 'image')} not found below {root} (first: {shown(cell)}"
            absent += f"{f', {why}' if why else ''})"
            absent += f", and with them all of {several(len(lost), 'class')}, as '{lost[0]}'" if lost else ""
            if data.on_bad_image == "skip":
                notes.append(f"{absent}, left out")
            else:
                faults[name] = f"{absent}; put them there, or leave them out with --on-bad-image skip"
    used = set[str]().union(*(found for found, _ in parts.values()))
    if unused := [path for path in index.paths if path not in used]:
        count = several(len(unused), "image")
        notes.append(f"{count} below {root} named by no row, or by one that was left out (first: {unused[0]})")
    if index.others:
        name, why = next(iter(index.others.items()))
        notes.append(f"{several(len(index.others), 'file')} below {root} passed over (first: {name}: {why})")
    described = [table.said for table in opened]
    divided = [*parts] != ["train"] or bool(opened[0].part)
    return Found("a table of labels", lists, divided, notes=notes, faults=faults, described=described)


def _sort_into_parts(table: _Table, index: _Index, parts: dict[str, tuple[_Found, _Missing]]) -> list[str]:
    """Add a table's rows to the parts; notes on those that are left out. Raises UserError for a row that may mean
    several images. Rows are counted as a spreadsheet does: the heading is the first."""
    nameless: list[int] = []
    torn: dict[str, str] = {}
    known = {label for _, label, _, _ in table.rows}
    for number, (cell, label, split, group) in enumerate(table.rows, 2):
        part = table.part or PART_NAMES.get(split.lower(), "train")
        paths = index.find(cell, part, label) if label else []
        if len(paths) > 1:
            what = f"'{cell}' may be {paths[0]} or {paths[1]}: write the path of the one meant"
            raise UserError(f"{table.file}, row {number}: {what}")
        if not label:
            nameless.append(number)
        elif len(words := re.split(r"\s*[|;]\s*", label)) > 1 and not known.isdisjoint(words):
            torn[paths[0] if paths else cell] = part  # 'cat|dog'
        elif not paths:
            parts[part][1].append((cell, label))
        elif parts[part][0].setdefault(paths[0], (label, group))[0] != label:
            torn[paths[0]] = part
    for path, part in torn.items():
        parts[part][0].pop(path, None)
    left_out = (nameless, "row", "without one label or part", "row "), ([*torn], "image", "with several labels", "")
    return [
        f"{table.file}: left out: {several(len(which), kind)} {what} (first: {prefix}{which[0]})"
        for which, kind, what, prefix in left_out
        if which
    ]
