"""Parquet files as the `datasets` library publishes them become image lists."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from equipoise.base.errors import UserError, reason
from equipoise.config.recipe import Data
from equipoise.data.images import EncodedImages, Found, ImageList, import_pyarrow
from equipoise.data.names import in_order, look_alikes, normal, numbered
from equipoise.data.rows import LABELS, named_column, part_named


def open_parquet(root: Path, files: list[Path], data: Data) -> Found:
    """The images of the files. Columns that `data` does not name are found. Raises UserError for what cannot be read,
    and for labels that do not fit."""
    return open_by_part("Parquet", root, files, partial(_read, data))


def open_by_part(kind: str, root: Path, files: list[Path], read: Callable[[list[Path]], ImageList]) -> Found:
    """The images of files at `root`, by part where their names, or those of their folders, begin with that of one.
    `read` makes the list of a part; without class names, its classes are numbers."""
    by_part: dict[str, list[Path]] = {}
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix().removeprefix("data/")
        by_part.setdefault(part_named(name), []).append(file)
    others = by_part.pop("", [])
    notes = [f"{file}: no part's name (train, val, test) begins its own, passed over" for file in others if by_part]
    parts = {part: read(of_part) for part, of_part in (by_part or {"train": others}).items()}
    leading = parts.get("train", next(iter(parts.values())))
    names, largest = leading.class_names, int(leading.labels_N.max())
    if not names and largest >= len(leading):
        raise UserError(f"{leading.origin}: label {largest} is out of range: there are {len(leading)} rows only")
    all_names = names or tuple(map(str, range(largest + 1)))
    for part, images in parts.items():
        labels_N, origin = images.labels_N, images.origin
        wrong = np.flatnonzero((labels_N < 0) | (labels_N >= len(images.class_names or all_names)))
        if len(wrong):
            what = f"row {wrong[0]} has label {labels_N[wrong[0]]}, which is out of range"
            raise UserError(f"{origin}: {what}: the classes are 0 to {len(all_names) - 1}")
        if images.class_names not in ((), all_names):
            labels_N = numbered(images.class_names, all_names, origin)[labels_N]
        parts[part] = replace(images, labels_N=labels_N, class_names=all_names)
    return Found(kind, parts, divided=bool(by_part), named=bool(names), notes=[*notes, *look_alikes(names)])


def _read(data: Data, files: Sequence[Path]) -> ImageList:
    """The images of one part, with the class names that the file gives, if any."""
    file, pa = files[0], import_pyarrow(files[0])
    try:
        schema = pa.parquet.read_schema(file)
        holding = [field.name for field in schema if _holds_bytes(pa, field.type)]
        image_column = _chosen(data.image_column, holding, file, "image_column")
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        texts = [field.name for field in schema if _is_text(pa, field.type)]
        label_column = data.label_column or named_column([*integers, *texts], LABELS)
        fitting = [*integers, *texts] if label_column else integers or texts
        label_column = _chosen(label_column, fitting, file, "label_column")
        groups = [data.group_by] if data.group_by in schema.names else []
        columns = list(dict.fromkeys([image_column, label_column, *groups]))
        table = pa.concat_tables(pa.parquet.read_table(one, columns=columns) for one in files)
    except UserError:
        raise
    except Exception as error:  # pyarrow has many
        why = reason(error, library=True)
        raise UserError(f"{file} cannot be read as Parquet ({why}); take the file anew") from None
    if table.num_rows == 0:
        raise UserError(f"{file} has no rows")
    encoded, labels = table[image_column], table[label_column]
    if pa.types.is_struct(encoded.type):
        encoded = pa.chunked_array([chunk.field("bytes") for chunk in encoded.chunks])
    if labels.null_count:
        raise UserError(f"{file}: column '{label_column}' must hold a label in every row")
    origin = ", ".join(map(str, files))
    images = EncodedImages(origin, pa.table({"image": encoded}), np.arange(table.num_rows))
    groups_N = np.array(list(map(str, table[data.group_by].to_pylist()))) if groups else None
    if label_column in texts:
        words = list(map(normal, labels.to_pylist()))
        names = in_order(words)
        return ImageList(origin, images, numbered(words, names, origin), names, groups_N)
    names = _class_names(schema.metadata or {}, label_column)
    return ImageList(origin, images, labels.to_numpy().astype(np.int64), names, groups_N)


def holds_images(file: Path) -> bool:
    """Whether a file has a column of images; else it is a table of their names. A damaged one is for `open_parquet`."""
    pa = import_pyarrow(file)
    try:
        return any(_holds_bytes(pa, field.type) for field in pa.parquet.read_schema(file))
    except Exception:
        return True


def _is_text(pa: Any, kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _holds_bytes(pa: Any, kind: Any) -> bool:
    """Image files as bytes, or as the `datasets` library stores them: bytes with a path."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(pa, kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _chosen(name: str, fitting: list[str], file: Path, field: str) -> str:
    """The column `name`, or without a name the only one that fits. Raises UserError where that is none."""
    name = name or (fitting[0] if len(fitting) == 1 else "")
    if name not in fitting:
        what = f"name it with --set data.{field}=NAME; of its type there is {', '.join(fitting) or 'none'}"
        raise UserError(f"{file}: which column is data.{field}? {what}")
    return name


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...]:
    """The names that the `datasets` library keeps in the schema's metadata, if it wrote the file."""
    try:
        column = msgspec.json.decode(metadata[b"huggingface"])["info"]["features"][label_column]
        names = msgspec.convert(column["names"], tuple[str, ...])
    except (LookupError, TypeError, ValueError, RecursionError):
        return ()
    return names if len(set(names)) == len(names) else ()
