"""Packed images become image lists: an Arrow IPC file for each part, mapped into memory. `pack.py` writes them.

A row is an image: `name` and `image` (bytes), `crc32` of the image, `label`. The schema's metadata say what it all is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason
from equipoise.data.images import Found, ImageList, PackedImages, import_pyarrow

SUFFIX = ".pack"
KEY = b"equipoise"  # of the metadata
_OLD = b"equipoise packed images"  # how files of the first format begin


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


def packed_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix == SUFFIX else []
    return sorted(root.glob(f"*{SUFFIX}"))


def read_about(path: Path) -> About:
    """What a packed file says of itself. Raises UserError where it is none, or damaged."""
    return _open(path)[1]


def _open(path: Path) -> tuple[PackedImages, About]:
    pa = import_pyarrow(path)
    try:
        with path.open("rb") as file:
            if file.read(len(_OLD)) == _OLD:
                raise UserError(f"{path} was packed by an older version, in a format of its own; pack the images again")
        images = PackedImages.of(path)
        # Not msgspec's own decoder: the name of a class is that of a folder, which need not be UTF-8.
        about = msgspec.convert(json.loads(images.table.schema.metadata[KEY]), About)
        labels_N = images.table["label"].to_numpy()
        if not 0 <= labels_N.min() <= labels_N.max() < len(about.class_names):
            raise ValueError
        if images.table.schema.remove_metadata() != columns(pa):
            raise ValueError
        return images, about
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is no whole file of packed images ({reason(error)}); copy it again, or pack the images again"
        ) from None


def open_packed(files: list[Path]) -> Found:
    """Raises UserError for a file that is damaged or does not belong to the others."""
    parts: dict[str, ImageList] = {}
    described: list[str] = []
    opened = [_open(path) for path in files]
    first = opened[0][1]
    for images, about in opened:
        if (about.class_names, about.kind) != (first.class_names, first.kind):
            raise UserError(f"{images.origin} and {files[0]} were not packed together; keep them in two folders")
        labels_N: npt.NDArray[np.int64] = images.table["label"].to_numpy()
        parts[about.part] = ImageList(images.origin, images, labels_N, about.class_names)
        described.append(f"{images.origin}: {len(images):,} images, short sides of at most {about.short_side} pixels")
    return Found(f"packed {first.kind}", parts, first.divided, first.named, described=tuple(described))
