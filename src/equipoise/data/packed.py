"""Packed images: tars as WebDataset has them, in which KEY.jpg (or another kind) is an image and KEY.cls its label.
Those that `pack` writes, with large images made smaller once, begin with a table of what is where. Other readers pass
it over, since its name has no ending."""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import cv2
import msgspec
import numpy as np
from PIL import Image

from equipoise.base.errors import UserError, reason, several, shown
from equipoise.base.files import UNFINISHED, atomic_file
from equipoise.base.progress import counted
from equipoise.data import names
from equipoise.data.decode import BadImageError, decode, in_order
from equipoise.data.images import PART_NAMES, Found, ImageFiles, ImageList, Indices, PixelArrays, TarImages
from equipoise.data.parquet import open_by_part

FOLDERS = ("", "data", *PART_NAMES)  # in a folder of images: where tars and Parquet files may be
_TABLE = "__equipoise__"
_KINDS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"))
_LABELS = ("cls", "json", "txt")  # the first that says something counts
_LONGEST_LABEL = 255, 18  # letters of a name, as of a folder; digits of a number
_LONGEST_JPEG = 65_500  # pixels: libjpeg writes no longer side. Such a strip stays as it is
_QUALITY = 90  # of JPEG: short sides of 256 pixels take 30 kB
_IMAGES = 4096  # in a tar, at most: 120 MB


@dataclass(frozen=True)
class _Table:
    """What is in a tar of `size` bytes: of each image name, label, first byte, bytes and CRC-32 (-1: not known). The
    rest is of the whole set: fields of its `Found`, and the fingerprint of what was packed."""

    fingerprint: str
    found: dict[str, Any]
    class_names: tuple[str, ...]
    size: int
    images: list[tuple[str, str, int, int, int]]


def holds_samples(root: Path, file: Path) -> bool:
    """Whether a tar of the data at `root` begins with our table, or a label lies beside an image among its first
    members; else it is an archive. One that cannot be opened is for `open_packed` if it is the data, or named so."""
    samples = defaultdict[str, set[str]](set)
    try:
        with tarfile.open(file, "r:") as tar:
            for member in islice(filter(tarfile.TarInfo.isfile, tar), 16):
                key, kind = _split(member.name)
                samples[key].add(kind)
                if member.name == _TABLE or (_KINDS & samples[key] and samples[key].intersection(_LABELS)):
                    return True
        return False
    except Exception:
        return file == root or file.match("*-of-*.tar")


def _split(name: str) -> tuple[str, str]:
    """The key that the members of one sample share, and the kind of this one: before and after the file's first dot."""
    kind = name.rpartition("/")[2].partition(".")[2]
    return name.removesuffix(f".{kind}"), kind.lower()


def benchmark_of(file: Path) -> str:
    """The published data set that is packed in a tar, if one is. Raises UserError for one that is damaged."""
    return _read(file, scan=False).found.get("benchmark", "")


def _read(file: Path, scan: bool = True) -> _Table:
    """What is in a tar; without `scan` nothing, where it has no table. Raises UserError for a file that is no whole tar
    of images with labels."""
    try:
        with tarfile.open(file, "r:") as tar:
            first, status = tar.next(), file.stat()
            if first is None or first.name != _TABLE or (member := tar.extractfile(first)) is None:
                return _scanned(file, tar) if scan else _Table("", {}, (), 0, [])
            # Not msgspec's own decoder: the name of a class is that of a folder, which need not be UTF-8.
            table = msgspec.convert(json.loads(member.read()), _Table)
        if table.size != status.st_size:
            raise ValueError
        return table
    except (UserError, OSError):
        raise
    except Exception as error:
        what, how = f"no whole tar of packed images ({reason(error)})", "copy it again, or pack the images again"
        raise UserError(f"{file} is {what}; {how}") from None


def _scanned(file: Path, tar: tarfile.TarFile) -> _Table:
    """What is in a tar that somebody else wrote, of which every member is looked at."""
    table, samples = _Table("", {}, (), 0, []), defaultdict[str, dict[str, tarfile.TarInfo]](dict)
    for member in filter(tarfile.TarInfo.isfile, tar):
        key, kind = _split(member.name)
        samples[key][kind] = member
    if tar.offset + tarfile.BLOCKSIZE > file.stat().st_size:  # the block that ends a tar
        raise UserError(f"{file} ends too early: copy it again")
    for sample in samples.values():
        for image in (sample[kind] for kind in sorted(_KINDS & sample.keys())):
            said = (_label(file, tar, sample[kind]) for kind in _LABELS if kind in sample)
            if not (label := next(filter(None, said), "")):
                raise UserError(f"{file}: {image.name} has no label: write KEY.cls, or 'label' into KEY.json")
            table.images.append((image.name, label, image.offset_data, image.size, -1))
    return table


def _label(file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The label that a member says, if any. Raises UserError where it is neither a name nor a number."""
    opened, is_json = tar.extractfile(member), member.name.lower().endswith(".json")
    try:
        text = opened.read().decode().strip() if opened else ""
        label = json.loads(text).get("label", "") if is_json else text
        name = str(label).strip()
        name.encode()  # JSON may escape halves of surrogates
    except (ValueError, AttributeError, RecursionError):
        what = "JSON object" if is_json else "text"
        raise UserError(f"{file}: {member.name} is no {what} in UTF-8: write the label into it anew") from None
    if not isinstance(label, str | int) or isinstance(label, bool) or len(name) > _LONGEST_LABEL[name.isdecimal()]:
        raise UserError(f"{file}: {member.name} has the label {shown(label)}: neither a class's name nor its number")
    return name


def open_packed(root: Path, files: list[Path]) -> Found:
    """The images in tars. Raises UserError for one that is damaged or of another set, and where tars are missing."""
    tables = {file: _read(file) for file in files}
    first = tables[files[0]]
    for file, table in tables.items():
        if table.fingerprint != first.fingerprint:
            raise UserError(f"{file} and {files[0]} were not packed together; keep them in two folders")
    numbered = re.findall(r"^(.*)-\d+-of-0*(\d+).tar$", "\n".join(map(str, files)), re.MULTILINE)
    for (path, of), number in Counter(numbered).items():
        if int(of) != number:
            how = "copy the others, or run equipoise pack again"
            raise UserError(f"{number} of the {of} files {path}-*.tar are there: {how}")
    found = open_by_part("WebDataset", root, files, lambda of_part: _listed({file: tables[file] for file in of_part}))
    return replace(found, **first.found)


def _listed(tables: dict[Path, _Table]) -> ImageList:
    """The images of one part, with the names of its classes where they are known."""
    first, *others = tables
    origin = f"{first} and {len(others):,} more" if others else str(first)
    images = [(number, *image) for number, table in enumerate(tables.values()) for image in table.images]
    numbers, paths, labels, *places = zip(*images, strict=True)
    beside = [folder / "classnames.txt" for folder in first.parents[:2]]  # the second: where parts have folders
    known = next((file.read_text("utf-8").splitlines() for file in beside if file.is_file()), ())
    class_names = tables[first].class_names or tuple(known)
    if all(map(str.isdecimal, labels)):
        labels_N = np.array(labels, np.int64)
    else:
        class_names = class_names or names.in_order(labels)
        labels_N = names.numbered(labels, class_names, origin)
    paths_N, places_N4 = np.array([*map(os.fsencode, paths)], np.bytes_), np.column_stack([numbers, *places])
    return ImageList(origin, TarImages([*tables], paths_N, places_N4), labels_N, class_names)


def pack(found: Found, out: Path, short_side: int, threads: int) -> str:
    """Write the parts of what was found into the folder `out`, and say what is there then. An image whose short side is
    longer than `short_side` pixels is resized (Pillow's antialiased bilinear filter) and becomes JPEG; others stay as
    they are, byte for byte. A tar that is there already, of the same images, is kept. Raises UserError for images that
    cannot be read or need no packing, or where other files are there; OSError for a full disk. A file appears only when
    it is complete."""
    if found.faults:
        raise UserError(next(iter(found.faults.values())))
    tars: dict[Path, tuple[ImageList, Indices]] = {}
    for name, part in found.parts.items():
        if isinstance(part.images, PixelArrays) or found.kind.startswith("packed "):
            raise UserError(f"{part.origin} needs no packing: its images are in a few files already")
        if isinstance(part.images, ImageFiles) and out.resolve().is_relative_to(part.images.root.resolve()):
            raise UserError(f"{out} lies inside the data, where it would be taken for a class; name another --out")
        pieces = np.array_split(np.arange(len(part)), -(-len(part) // _IMAGES))
        for number, rows_M in enumerate(pieces):
            tars[out / f"{name}-{number:05}-of-{len(pieces):05}.tar"] = part, rows_M
    others = [path for path in out.glob("*") if path not in tars and not path.name.endswith(UNFINISHED)]
    if others:  # a part of other images, or the class folders themselves, which packed files would hide
        raise UserError(f"{out} holds other files, as {others[0].name}; name a folder of its own with --out")
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(f".*{UNFINISHED}"):  # of a killed process
        path.unlink()
    of_set = {"kind": f"packed {found.kind}", "divided": found.divided, "named": found.named}
    of_set |= {"benchmark": found.benchmark, "described": [f"short sides of at most {short_side} pixels"]}
    parts = "".join(part.fingerprint() for part in found.parts.values())
    fingerprint = hashlib.sha256(f"{parts}{of_set}".encode()).hexdigest()
    before = {file for file in tars if file.exists()}
    for file, (part, rows_M) in tars.items():
        if file not in before:
            with atomic_file(file) as opened:
                table = _Table(fingerprint, of_set, part.class_names, 0, [])
                _write(opened, part, rows_M.tolist(), table, short_side, threads)
        elif _read(file).fingerprint != fingerprint:
            raise UserError(f"{file} is there already, of other images or another size; name another --out")
    size = sum(file.stat().st_size for file in tars) / 1e6
    images = f"{sum(map(len, found.parts.values())):,} images, {size:,.1f} MB"
    return f"{out}: {several(len(tars) - len(before), 'tar')} written, {len(before):,} there already ({images})"


def _write(file: IO[bytes], images: ImageList, rows: list[int], table: _Table, short_side: int, threads: int) -> None:
    """Write a tar of these images. Its table is the first member, and the last to be known."""
    source, labels = images.images, [str(images.labels_N[row]) for row in rows]
    paths_N = source.paths_N[rows].tolist() if isinstance(source, ImageFiles | TarImages) else map(source.name, rows)
    paths = [*map(os.fsdecode, paths_N)]
    room = len(json.dumps([asdict(table), paths, labels])) + 60 * (1 + len(rows))  # the numbers are shorter
    with tarfile.open(fileobj=file, mode="w") as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        add(_TABLE, bytes(room))
        made = in_order(partial(_encoded, images, short_side), rows, threads)
        shown = counted(made, len(rows), f"packing {os.path.basename(file.name)}")
        try:
            for row, path, label, content in zip(rows, paths, labels, shown, strict=True):
                kind = str(Image.open(io.BytesIO(content)).format).lower()
                place = tar.offset + tarfile.BLOCKSIZE, len(content), zlib.crc32(content)
                table.images.append((path, label, *place))
                add(f"{row:08}.{'jpg' if kind in ('jpeg', 'mpo') else kind}", content)
                add(f"{row:08}.cls", label.encode())
        except BadImageError as error:
            how = "repair it (equipoise data FOLDER --check lists all such images)"
            raise UserError(f"{error.fault}; {how}") from None
    written = json.dumps(asdict(replace(table, size=file.tell()))).encode()
    file.seek(tarfile.BLOCKSIZE)
    file.write(written.ljust(room))


def _encoded(images: ImageList, short_side: int, index: int) -> bytes:
    """The image as it is to be stored."""
    assert not isinstance(images.images, PixelArrays)
    pixels = decode(images, index)  # of small ones too: what is broken must not be packed
    height, width = pixels.shape[:2]
    # The long side is truncated, as torchvision's Resize does it, and evaluation views here.
    scale = short_side / min(height, width)
    size = (short_side, int(scale * height)) if width <= height else (int(scale * width), short_side)
    if scale >= 1 or max(size) > _LONGEST_JPEG:
        return images.images.content(index)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(resized, cv2.COLOR_RGB2BGR), options)
    return encoded.tobytes()
