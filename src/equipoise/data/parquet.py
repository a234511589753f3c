"""Parquet files as the `datasets` library publishes them become image lists."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from equipoise.base.errors import UserError, reason
from equipoise.data.images import PART_NAMES, EncodedImages, Found, ImageList, Indices, import_pyarrow


def parquet_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix == ".parquet" else []
    return sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])


def open_parquet(files: list[Path], image_column: str, label_column: str) -> Found:
    """The images of the files, by part where their names begin with that of one. An empty name of a column finds it.
    Raises UserError for what cannot be read, and for labels that do not fit."""
    by_part: dict[str, list[Path]] = {}
    for file in files:
        part = PART_NAMES.get(file.stem.replace("_", "-").split("-")[0].lower(), "")
        by_part.setdefault(part, []).append(file)
    others = by_part.pop("", [])
    notes = [f"{file}: no part's name (train, val, test) begins its own, passed over" for file in others if by_part]
    columns = {
        part: _read(part_files, image_column, label_column)
        for part, part_files in (by_part or {"train": others}).items()
    }
    _, labels_N, named = columns.get("train", next(iter(columns.values())))
    if not named and labels_N.max() >= len(labels_N):
        raise UserError(f"{files[0]}: label {labels_N.max()} is out of range: there are {len(labels_N)} rows only")
    names = named or tuple(map(str, range(int(labels_N.max()) + 1)))
    parts: dict[str, ImageList] = {}
    for part, (column, labels_N, own_names) in columns.items():
        origin = ", ".join(map(str, by_part.get(part, others)))
        wrong = np.flatnonzero((labels_N < 0) | (labels_N >= len(names)))
        if len(wrong):
            raise UserError(
                f"{origin}: row {wrong[0]} has label {labels_N[wrong[0]]}, which is out of range: the classes are "
                f"0 to {len(names) - 1}"
            )
        if own_names != named:
            raise UserError(f"{origin} names its classes differently from the training part; make them agree")
        images = EncodedImages(origin, column, np.arange(len(labels_N)))
        parts[part] = ImageList(origin, images, labels_N, names)
    return Found("Parquet", parts, bool(by_part), bool(named), tuple(notes))


def _read(files: Sequence[Path], image_column: str, label_column: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """The column of encoded images, the labels, and the class names (empty where the file gives none)."""
    file, pa = files[0], import_pyarrow(files[0])
    try:
        schema = pa.parquet.read_schema(file)
        image_column = image_column or _only(
            [field.name for field in schema if _holds_bytes(pa, field.type)], file, "images (bytes)", "image_column"
        )
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        # CIFAR-100 as published: its classes are the fine ones.
        integers = ["fine_label"] if sorted(integers) == ["coarse_label", "fine_label"] else integers
        label_column = label_column or _only(integers, file, "labels (integers)", "label_column")
        for column in (image_column, label_column):
            if column not in schema.names:
                raise UserError(f"{file} has no column '{column}'; it has {', '.join(schema.names)}")
        table = pa.concat_tables(pa.parquet.read_table(one, columns=[image_column, label_column]) for one in files)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        why = reason(error, library=True)
        raise UserError(f"{file} cannot be read as Parquet ({why}); take the file anew") from None
    if table.num_rows == 0:
        raise UserError(f"{file} has no rows")
    images, labels = table[image_column], table[label_column]
    if not _holds_bytes(pa, images.type):
        raise UserError(f"{file}: column '{image_column}' holds {images.type}, not image bytes")
    if pa.types.is_struct(images.type):
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise UserError(f"{file}: column '{label_column}' must hold a whole number in every row")
    return images, labels.to_numpy().astype(np.int64), _class_names(schema.metadata or {}, label_column)


def _holds_bytes(pa: Any, kind: Any) -> bool:
    """Image files as bytes, or as the `datasets` library stores them: bytes with a path."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(pa, kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _only(columns: list[str], file: Path, what: str, field: str) -> str:
    if len(columns) == 1:
        return columns[0]
    found = f"several columns that could be {what}: {', '.join(columns)}" if columns else f"no column of {what}"
    raise UserError(f"{file} has {found}; name it with --set data.{field}=NAME")


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...]:
    """The names that the `datasets` library keeps in the schema's metadata, if it wrote the file."""
    try:
        column = msgspec.json.decode(metadata[b"huggingface"])["info"]["features"][label_column]
        names = msgspec.convert(column["names"], tuple[str, ...])
    except (LookupError, TypeError, ValueError, RecursionError):
        return ()
    return names if len(set(names)) == len(names) else ()
