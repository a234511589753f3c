"""What is in a table's file: columns of text, by their names. CSV, TSV and Parquet; and two tables joined."""

import csv
import io
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from equipoise.base.errors import UserError, reason, several
from equipoise.data.images import PART_NAMES, import_pyarrow

TABLES = frozenset({".csv", ".tsv", ".parquet"})
# Names of columns as people have them, in small letters, without _, - and blanks; the first that is there is taken.
# CIFAR-100 as published has "fine_label" and "coarse_label": its classes are the fine ones.
LABELS = ("label", "labels", "class", "classname", "classlabel", "species", "scientificname", "category",
           "categoryname", "taxon", "diagnosis", "dx", "target", "y", "classid", "categoryid",
           "finelabel")  # fmt: skip
_NAME = "scientificName"  # the column of labels of joined tables
_UNNAMED = ("", "animal", "unknown", "unclassified")  # of what nobody said what it is

Columns = Mapping[str, Sequence[str]]


class NoTableError(UserError):
    """A file that does not say which image has which label."""


def part_named(name: str) -> str:
    """The part that the first word of a name says (train_images, test-2); '' for none."""
    return PART_NAMES.get(re.split("[^a-z]", name.lower())[0], "")


def named_column(columns: Iterable[str], names: Sequence[str]) -> str:
    """The first column that has one of these names; '' for none."""
    known = {re.sub(r"[\s_-]", "", name.lower()): name for name in columns}
    return next((known[name] for name in names if name in known), "")


def read_table(file: Path) -> Columns:
    """The columns that have a name, their cells as text, '' where there is nothing. Raises UserError for a file that
    cannot be read, or without rows."""
    try:
        if file.suffix.lower() == ".parquet":
            table = import_pyarrow(file).parquet.read_table(file).to_pydict()
            columns = {name: ["" if cell is None else str(cell).strip() for cell in table[name]] for name in table}
        else:
            columns = _read_text(file)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise NoTableError(f"{file} is not in UTF-8: save it as 'CSV UTF-8'") from None
    except Exception as error:  # pyarrow has many
        raise NoTableError(f"the table {file} cannot be read ({reason(error, library=True)})") from None
    if not any(columns.values()):
        raise NoTableError(f"{file} has no rows below its heading")
    return columns


def _read_text(file: Path) -> dict[str, list[str]]:
    """CSV as programs write it: divided by commas, semicolons or tabs, in UTF-8 or Excel's UTF-16."""
    content = file.read_bytes()
    text = content.decode("utf-16" if content[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    quoting = csv.QUOTE_NONE if file.suffix == ".txt" else csv.QUOTE_MINIMAL  # Darwin Core archives quote nothing
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting))
    names = [name.strip() for name in rows[0]] if rows else []
    for number, row in enumerate(rows, 1):
        if row and len(row) != len(names):
            cells, columns = several(len(row), "cell"), several(len(names), "column")
            raise NoTableError(f"{file}, row {number} has {cells}, but its heading names {columns}")
    if again := [name for name in names if name and names.count(name) > 1]:
        raise NoTableError(f"{file} has two columns called '{again[0]}': give one another name")
    cells = [row for row in rows[1:] if any(row)]
    return {name: [row[place].strip() for row in cells] for place, name in enumerate(names) if name}


def read_joined(root: Path) -> tuple[Path, Columns] | None:
    """The table of the images and the columns of both tables, of a camera-trap package (Camtrap DP) or a Darwin Core
    archive in the folder; None where there is none. An image has a row for each of its labels."""
    kinds = ("media.csv", "observations.csv", _of_observations), ("multimedia.txt", "occurrence.txt", _of_occurrences)
    for media, others, labels_of in kinds:
        if (root / media).is_file() and (root / others).is_file():
            images = read_table(root / media)
            labels = labels_of(images, read_table(root / others))
            rows = [(number, label) for number, names in enumerate(labels) for label in sorted(names) or [""]]
            columns = {name: [cells[number] for number, _ in rows] for name, cells in images.items()}
            return root / media, {**columns, _NAME: [label for _, label in rows]}
    return None


def _of_observations(media: Columns, told: Columns) -> list[set[str]]:
    """What was observed on each image (https://camtrap-dp.tdwg.org/data): by its mediaID, or else by the event of the
    same deployment in whose time it was taken. Where there is no species it is the type, as 'blank' or 'human'."""
    of_media: dict[str, set[str]] = defaultdict(set)
    of_deployment: dict[str, list[tuple[datetime, datetime, str]]] = defaultdict(list)
    found: list[set[str]] = []
    try:
        for row in _as_rows(told):
            name = row.get(_NAME) or row.get("observationType", "")
            if name not in _UNNAMED and row.get("mediaID"):
                of_media[row["mediaID"]].add(name)
            elif name not in _UNNAMED:
                start, end = (datetime.fromisoformat(row[side]) for side in ("eventStart", "eventEnd"))
                of_deployment[row["deploymentID"]].append((start, end, name))
        for row in _as_rows(media):
            names = of_media.get(row["mediaID"], set())
            if not names and (events := of_deployment.get(row["deploymentID"])):
                taken = datetime.fromisoformat(row["timestamp"])
                names = {name for start, end, name in events if start <= taken <= end}
            found.append(names)
    except (KeyError, ValueError, TypeError) as error:
        why = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise NoTableError(f"media.csv and observations.csv are not as Camtrap DP has them ({why})") from None
    return found


def _of_occurrences(media: Columns, told: Columns) -> list[set[str]]:
    """The scientific name of each image's occurrence (https://dwc.tdwg.org/text): the first column joins them."""
    names = dict(zip(next(iter(told.values())), told.get(_NAME, ()), strict=False))
    return [{names.get(key, "")} - {""} for key in next(iter(media.values()))]


def _as_rows(columns: Columns) -> list[dict[str, str]]:
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
