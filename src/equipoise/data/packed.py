"""Packed images become image lists: an Arrow IPC file for each part, mapped into memory. `pack.py` writes them.

A row is an image: `name` and `image` (bytes), `crc32` of the image, `label`. The schema's metadata say what it all is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from equipoise.base.errors import UserError, reason
from equipoise.data.images import Found, ImageList, import_pyarrow, map_packed

SUFFIX = ".pack"
KEY = b"equipoise"  # of the metadata


@dataclass(frozen=True)
class About:
    """What a packed file says of itself. `fingerprint`: of the list that was packed; the rest is `Found`'s."""

    part: str
    kind: str
    benchmark: str
    divided: bool
    named: bool
    class_names: tuple[str, ...]
    short_side: int
    fingerprint: str


def columns(pa: Any) -> Any:
    """The schema of a packed file, without metadata. `pa`: the library pyarrow."""
    kinds = {"name": pa.binary(), "image": pa.large_binary(), "crc32": pa.uint32(), "label": pa.int64()}
    return pa.schema(list(kinds.items()))


def read_packed(path: Path) -> tuple[About, ImageList]:
    """What a packed file says of itself, and its images. Raises UserError where it is none, or damaged."""
    pa = import_pyarrow(path)
    try:
        images = map_packed(str(path))
        if images.table.schema.remove_metadata() != columns(pa):
            raise ValueError
        # Not msgspec's own decoder: the name of a class is that of a folder, which need not be UTF-8.
        about = msgspec.convert(json.loads(images.table.schema.metadata[KEY]), About)
        labels_N = images.table["label"].to_numpy()
        if not 0 <= labels_N.min() <= labels_N.max() < len(about.class_names):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is no whole file of packed images as this version writes it ({reason(error)}); copy it again, or "
            "pack the images again"
        ) from None
    return about, ImageList(str(path), images, labels_N, about.class_names)


def open_packed(files: list[Path]) -> Found:
    """Raises UserError for a file that is damaged or does not belong to the others."""
    opened = [read_packed(path) for path in files]
    first = opened[0][0]
    for about, images in opened:
        if (about.class_names, about.kind) != (first.class_names, first.kind):
            raise UserError(f"{images.origin} and {files[0]} were not packed together; keep them in two folders")
    return Found(
        f"packed {first.kind}",
        {about.part: images for about, images in opened},
        first.divided,
        first.named,
        described=tuple(
            f"{images.origin}: {len(images):,} images, short sides of at most {about.short_side} pixels"
            for about, images in opened
        ),
        benchmark=first.benchmark,
    )
