"""Packed images become image lists: a file for each part, that is mapped into memory and shared by all processes.

A file `PART.pack` holds, one after the other: a mark, the image files, the index (arrays), a description (JSON) and a
tail that says where the last two begin and what their SHA-256 is. Each image has a checksum. `pack.py` writes them.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason
from equipoise.base.files import fits, is_count, is_text, parsed_json, regular_file
from equipoise.data.images import Found, ImageList, MappedFile, PackedImages, Paths

SUFFIX = ".pack"
_MARK = b"equipoise packed images 1\n"
_TAIL = struct.Struct("<QQ32s8s")  # where the index and the description begin, SHA-256 from the index to the tail
_END = b"packed.\n"
_ABOUT = {
    **dict.fromkeys(("part", "kind", "benchmark", "fingerprint"), is_text),
    **dict.fromkeys(("divided", "named"), bool),
    **dict.fromkeys(("images", "short_side"), is_count),
    "class_names": [is_text],
}
_ARRAYS = {"ends": np.uint64, "checksums": np.uint32, "labels": np.int64, "name_ends": np.uint64}


def packed_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix == SUFFIX else []
    return sorted(root.glob(f"*{SUFFIX}"))


def write_packed(
    file: IO[bytes], contents: Iterable[tuple[bytes, int]], names: Paths, labels_N: npt.NDArray[np.int64], about: Any
) -> None:
    """Write images, each with its checksum, and what is known of them."""
    file.write(_MARK)
    end, ends, checksums = len(_MARK), [len(_MARK)], list[int]()
    for content, checksum in contents:
        file.write(content)
        end += len(content)
        ends.append(end)
        checksums.append(checksum)
    encoded = list(names.encoded())
    name_ends = np.cumsum([0, *map(len, encoded)])
    arrays = {"ends": ends, "checksums": checksums, "labels": labels_N, "name_ends": name_ends}
    start = -(-end // 64) * 64  # aligned, whatever the length of the images
    index = [
        bytes(start - end),
        *(np.asarray(arrays[name], kind).tobytes() for name, kind in _ARRAYS.items()),
        *encoded,
    ]
    hasher = hashlib.sha256()
    described = start + sum(map(len, index[1:]))
    for part in [*index, json.dumps(about).encode()]:
        file.write(part)
        hasher.update(part)
    file.write(_TAIL.pack(end, described, hasher.digest(), _END))


def read_about(path: Path) -> dict[str, Any]:
    """What a packed file says of itself. Raises UserError where it is none, or not whole."""
    return _open(path)[1]


def _open(path: Path) -> tuple[MappedFile, dict[str, Any], int, bytes]:
    """The file, its description, where its arrays begin, the SHA-256 of its index."""
    try:
        size = regular_file(path).stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from None
    mapped = MappedFile(path) if size > len(_MARK) + _TAIL.size else None
    if mapped is None or mapped.content[: len(_MARK)].tobytes() != _MARK:
        raise UserError(f"{path} is not a file of packed images that this version of equipoise can read")
    index, described, digest, end = _TAIL.unpack(mapped.content[-_TAIL.size :].tobytes())
    last = size - _TAIL.size
    whole = end == _END and index <= described <= last
    if not whole or hashlib.sha256(mapped.content[index:last].data).digest() != digest:
        raise UserError(f"{path} is damaged or was not copied whole; copy it again, or pack the images anew")
    return mapped, _description(mapped.content[described:last].tobytes(), path), -(-index // 64) * 64, digest


def _description(content: bytes, path: Path) -> dict[str, Any]:
    """What a file says of itself, if that is of its kind: a checksum may be put right by whoever changes a file."""
    try:
        about: Any = parsed_json(content)
    except ValueError:
        raise _inconsistent(path) from None
    if not fits(about, _ABOUT) or len(set(about["class_names"])) < len(about["class_names"]):
        raise _inconsistent(path)
    return about


def _inconsistent(path: Path) -> UserError:
    return UserError(f"{path} is no file that equipoise pack wrote: its index contradicts itself; pack the images anew")


def open_packed(files: list[Path]) -> Found:
    """Raises UserError for a file that is damaged or does not belong to the others."""
    parts: dict[str, ImageList] = {}
    described: list[str] = []
    first: Mapping[str, Any] = {}
    for path in files:
        mapped, about, start, digest = _open(path)
        first = first or about
        if about["class_names"] != first["class_names"] or about["kind"] != first["kind"]:
            raise UserError(f"{path} and {files[0]} were not packed together; keep them in folders of their own")
        images, labels_N = _images(mapped, about["images"], start, digest, path)
        if labels_N.min() < 0 or labels_N.max() >= len(about["class_names"]):
            raise _inconsistent(path)
        parts[about["part"]] = ImageList(str(path), images, labels_N, tuple(about["class_names"]))
        described.append(f"{path}: {len(images):,} images, short sides of at most {about['short_side']} pixels")
    kind = f"packed {first['kind']}"
    return Found(kind, parts, divided=first["divided"], named=first["named"], described=tuple(described))


def _images(
    mapped: MappedFile, count: int, start: int, digest: bytes, path: Path
) -> tuple[PackedImages, npt.NDArray[np.int64]]:
    """The images and their labels, by the index that begins at `start`. Raises UserError where it is no index."""
    size = len(mapped.content)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, kind in _ARRAYS.items():
        entries = count + 1 if name in ("ends", "name_ends") else count
        length = entries * np.dtype(kind).itemsize
        if count < 1 or start + length > size:
            raise _inconsistent(path)
        arrays[name] = mapped.content[start : start + length].view(kind)
        start += length
    ends, name_ends = arrays["ends"], arrays["name_ends"]
    if ends[-1] > size or start + int(name_ends[-1]) > size or (ends[1:] < ends[:-1]).any():
        raise _inconsistent(path)
    if (name_ends[1:] < name_ends[:-1]).any():
        raise _inconsistent(path)
    ends, name_ends = ends.astype(np.int64), name_ends.astype(np.int64)
    names = Paths(mapped.content[start : start + name_ends[-1]].tobytes(), name_ends[:-1], name_ends[1:])
    return PackedImages(mapped, digest.hex(), names, ends[:-1], ends[1:], arrays["checksums"]), arrays["labels"]
