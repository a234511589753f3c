"""Parquet files as the `datasets` library publishes them become image lists."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.base.errors import UserError, reason
from equipoise.base.files import parsed_json, regular_file
from equipoise.data.images import PART_NAMES, EncodedImages, Found, ImageList, Indices

_MOST_UNPACKED = 5  # times the size of the file; encoded images hardly pack


def parquet_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix == ".parquet" else []
    return sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])


def open_parquet(files: list[Path], image_column: str, label_column: str) -> Found:
    by_part: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in files:
        part = PART_NAMES.get(file.stem.replace("_", "-").split("-")[0].lower())
        if part:
            by_part.setdefault(part, []).append(file)
        else:
            others.append(file)
    divided = bool(by_part)
    notes = [f"{file}: no part's name (train, val, test) begins its own, passed over" for file in others if divided]
    columns = {
        part: _read_parquet(part_files, image_column, label_column)
        for part, part_files in (by_part or {"train": others}).items()
    }
    _, labels, named = columns.get("train", next(iter(columns.values())))
    if not named and labels.max() >= len(labels):
        raise UserError(f"{files[0]}: label {labels.max()} is out of range: there are {len(labels)} rows only")
    names = named or tuple(str(label) for label in range(int(labels.max()) + 1))
    parts: dict[str, ImageList] = {}
    for part, (column, labels, own_names) in columns.items():
        origin = ", ".join(str(file) for file in by_part.get(part, others))
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(wrong):
            raise UserError(
                f"{origin}: row {wrong[0]} has label {labels[wrong[0]]}, which is out of range: the classes are "
                f"0 to {len(names) - 1}"
            )
        if own_names != named:
            raise UserError(f"{origin} names its classes differently from the training part; make them agree")
        images = EncodedImages(origin, column, np.arange(len(labels)))
        parts[part] = ImageList(origin, images, labels, names)
    return Found("Parquet", parts, divided, bool(named), tuple(notes))


def _read_parquet(files: list[Path], image_column: str, label_column: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """The column of encoded images, the labels, and the class names (empty where the file gives none)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"reading {files[0]} needs pyarrow: {shlex.quote(sys.executable)} -m pip install pyarrow"
        ) from None
    try:
        for file in files:
            regular_file(file)
        schema = pq.read_schema(files[0])
        image_column = image_column or _only(
            [
                field.name
                for field in schema
                if pa.types.is_binary(field.type)
                or pa.types.is_large_binary(field.type)
                or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
            ],
            files[0],
            "images (bytes)",
            "image_column",
        )
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        label_column = label_column or _only(
            # CIFAR-100 as published: its classes are the fine ones.
            ["fine_label"] if sorted(integers) == ["coarse_label", "fine_label"] else integers,
            files[0],
            "labels (integers)",
            "label_column",
        )
        for column in (image_column, label_column):
            if column not in schema.names:
                raise UserError(f"{files[0]} has no column '{column}'; it has {', '.join(schema.names)}")
        for file in files:
            _refuse_bomb(file, [image_column, label_column])
        table = pa.concat_tables(pq.read_table(file, columns=[image_column, label_column]) for file in files)
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        why = reason(error, library=True)
        raise UserError(f"{files[0]} cannot be read as Parquet ({why}); take the file anew") from None
    if table.num_rows == 0:
        raise UserError(f"{files[0]} has no rows")
    images = table.column(image_column)
    if pa.types.is_struct(images.type):
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise UserError(f"{files[0]}: column '{image_column}' holds {images.type}, not image bytes")
    labels = table.column(label_column)
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise UserError(f"{files[0]}: column '{label_column}' must hold a whole number in every row")
    return images, labels.to_numpy().astype(np.int64), _class_names(schema.metadata, label_column)


def _refuse_bomb(file: Path, columns: list[str]) -> None:
    """Raise UserError for a file that would become far larger in memory than it is: packed too well, or one image said
    once for many rows. To see that, it is read a few rows at a time; CIFAR-10's training part takes half a second."""
    import pyarrow.parquet as pq

    most = _MOST_UNPACKED * file.stat().st_size + 2**25
    with pq.ParquetFile(file) as parquet:
        metadata = parquet.metadata
        # Of all columns: what a damaged file says of one makes pyarrow end the process.
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        unpacked = max(sum(sizes), 8 * metadata.num_rows)
        if unpacked <= most:
            unpacked = 0
            # No value is larger than its group of rows, so no batch is larger than `most`.
            rows = max(1, min(1024, most // max([1, *sizes])))
            for batch in parquet.iter_batches(rows, columns=columns):
                unpacked += batch.nbytes
                if unpacked > most:
                    break
    if unpacked > most:
        raise UserError(
            f"{file} has {file.stat().st_size:,} bytes and would take {unpacked:,} or more in memory; write it anew "
            "with images as they are encoded, not packed further"
        )


def _only(columns: list[str], file: Path, what: str, field: str) -> str:
    if len(columns) == 1:
        return columns[0]
    found = f"several columns that could be {what}: {', '.join(columns)}" if columns else f"no column of {what}"
    raise UserError(f"{file} has {found}; name it with --set data.{field}=NAME")


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str) -> tuple[str, ...]:
    """The names that the `datasets` library keeps in the schema's metadata, if it wrote the file."""
    try:
        names = parsed_json((metadata or {})[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, ValueError, TypeError):
        return ()
    distinct = isinstance(names, list) and len(set(map(str, names))) == len(names)
    return tuple(map(str, names)) if distinct else ()
