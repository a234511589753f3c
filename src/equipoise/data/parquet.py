"""Parquet files as the `datasets` library publishes them become image lists."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from equipoise.base.errors import UserError, reason
from equipoise.data.images import PART_NAMES, EncodedImages, Found, ImageList, import_pyarrow


def open_parquet(files: list[Path], image_column: str, label_column: str) -> Found:
    """The images of the files, by part where their names begin with that of one. An empty name of a column finds it.
    Raises UserError for what cannot be read, and for labels that do not fit."""
    by_part: dict[str, list[Path]] = {}
    for file in files:
        part = PART_NAMES.get(file.stem.replace("_", "-").split("-")[0].lower(), "")
        by_part.setdefault(part, []).append(file)
    others = by_part.pop("", [])
    notes = [f"{file}: no part's name (train, val, test) begins its own, passed over" for file in others if by_part]
    divided = by_part or {"train": others}
    parts = {part: _read(of_part, image_column, label_column) for part, of_part in divided.items()}
    leading = parts.get("train", next(iter(parts.values())))
    names, largest = leading.class_names, int(leading.labels_N.max())
    if not names and largest >= len(leading):
        raise UserError(f"{leading.origin}: label {largest} is out of range: there are {len(leading)} rows only")
    all_names = names or tuple(map(str, range(largest + 1)))
    for part, images in parts.items():
        if images.class_names != names:
            raise UserError(f"{images.origin} names its classes differently from the training part; make them agree")
        wrong = np.flatnonzero((images.labels_N < 0) | (images.labels_N >= len(all_names)))
        if len(wrong):
            raise UserError(
                f"{images.origin}: row {wrong[0]} has label {images.labels_N[wrong[0]]}, which is out of range: the "
                f"classes are 0 to {len(all_names) - 1}"
            )
        parts[part] = ImageList(images.origin, images.images, images.labels_N, all_names)
    return Found("Parquet", parts, divided=bool(by_part), named=bool(names), notes=notes)


def _read(files: Sequence[Path], image_column: str, label_column: str) -> ImageList:
    """The images of one part, with the class names that the file gives, if any."""
    file, pa = files[0], import_pyarrow(files[0])
    try:
        schema = pa.parquet.read_schema(file)
        holding = [field.name for field in schema if _holds_bytes(pa, field.type)]
        image_column = _chosen(image_column, holding, file, "image_column")
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        if sorted(integers) == ["coarse_label", "fine_label"]:  # CIFAR-100 as published: its classes are the fine ones
            label_column = label_column or "fine_label"
        label_column = _chosen(label_column, integers, file, "label_column")
        table = pa.concat_tables(pa.parquet.read_table(one, columns=[image_column, label_column]) for one in files)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        why = reason(error, library=True)
        raise UserError(f"{file} cannot be read as Parquet ({why}); take the file anew") from None
    if table.num_rows == 0:
        raise UserError(f"{file} has no rows")
    encoded, labels = table[image_column], table[label_column]
    if pa.types.is_struct(encoded.type):
        encoded = pa.chunked_array([chunk.field("bytes") for chunk in encoded.chunks])
    if labels.null_count:
        raise UserError(f"{file}: column '{label_column}' must hold a whole number in every row")
    origin = ", ".join(map(str, files))
    images = EncodedImages(origin, pa.table({"image": encoded}), np.arange(table.num_rows))
    names = _class_names(schema.metadata or {}, label_column)
    return ImageList(origin, images, labels.to_numpy().astype(np.int64), names)


def _holds_bytes(pa: Any, kind: Any) -> bool:
    """Image files as bytes, or as the `datasets` library stores them: bytes with a path."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(pa, kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _chosen(name: str, fitting: list[str], file: Path, field: str) -> str:
    """The column `name`, or without a name the only one that fits. Raises UserError where that is none."""
    if not name and len(fitting) == 1:
        return fitting[0]
    if name not in fitting:
        raise UserError(
            f"{file}: which column is data.{field}? name it with --set data.{field}=NAME; of its type there is "
            f"{', '.join(fitting) or 'none'}"
        )
    return name


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...]:
    """The names that the `datasets` library keeps in the schema's metadata, if it wrote the file."""
    try:
        column = msgspec.json.decode(metadata[b"huggingface"])["info"]["features"][label_column]
        names = msgspec.convert(column["names"], tuple[str, ...])
    except (LookupError, TypeError, ValueError, RecursionError):
        return ()
    return names if len(set(names)) == len(names) else ()
