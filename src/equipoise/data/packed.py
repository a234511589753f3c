"""Packed images: an Arrow IPC file for each part, mapped into memory, in which large images were made smaller once. A
row is an image: `name` and `image` (bytes), `crc32` of the image, `label`. The schema's metadata say what it all is."""

import json
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import cv2
import msgspec
import numpy as np
from PIL import Image

from equipoise.base.errors import UserError, reason
from equipoise.base.files import UNFINISHED, atomic_file
from equipoise.base.progress import counted
from equipoise.data.decode import BadImageError, bad_images, decode, in_order
from equipoise.data.images import Found, ImageFiles, ImageList, PackedImages, PixelArrays, import_pyarrow, map_packed

SUFFIX = ".pack"
_KEY = b"equipoise"  # of the metadata
_LONGEST_JPEG = 65_500  # pixels: libjpeg writes no longer side. Such a strip stays as it is
_QUALITY = 90  # of JPEG: short sides of 256 pixels take 30 kB
_ROWS = 256  # written at a time


@dataclass(frozen=True)
class _About:
    """What a packed file says of itself. `fingerprint`: of the list that was packed; the rest is `Found`'s."""

    part: str
    kind: str
    benchmark: str
    divided: bool
    named: bool
    class_names: tuple[str, ...]
    short_side: int
    fingerprint: str


def _read(path: Path) -> tuple[_About, ImageList]:
    """What a packed file says of itself, and its images. Raises UserError where it is none, or damaged."""
    import_pyarrow(path)
    try:
        images = map_packed(str(path))
        # Not msgspec's own decoder: the name of a class is that of a folder, which need not be UTF-8.
        about = msgspec.convert(json.loads(images.table.schema.metadata[_KEY]), _About)
        labels_N = images.table["label"].to_numpy()
    except Exception as error:  # pyarrow has many
        what, how = f"no whole file of packed images ({reason(error)})", "copy it again, or pack the images again"
        raise UserError(f"{path} is {what}; {how}") from None
    return about, ImageList(str(path), images, labels_N, about.class_names)


def open_packed(files: list[Path]) -> Found:
    """The images of packed files, a part each. Raises UserError for a file that is damaged or of other images."""
    opened = [_read(path) for path in files]
    of = opened[0][0]
    for about, images in opened:
        if (about.class_names, about.kind) != (of.class_names, of.kind):
            raise UserError(f"{images.origin} and {files[0]} were not packed together; keep them in two folders")
    parts = {about.part: images for about, images in opened}
    described = [f"{images.origin}: short sides of at most {about.short_side} pixels" for about, images in opened]
    return Found(f"packed {of.kind}", parts, of.divided, of.named, described=described, benchmark=of.benchmark)


def pack(found: Found, out: Path, short_side: int, threads: int) -> list[str]:
    """Write the parts of what was found into the folder `out`; one line about each. An image whose short side is longer
    than `short_side` pixels is resized (Pillow's antialiased bilinear filter) and becomes JPEG; others stay as they
    are, byte for byte. A part that is there already, of the same images, is kept. Raises UserError for images that
    cannot be read or need no packing, or where other files are there; OSError for a full disk. A file appears only when
    it is complete."""
    import_pyarrow(out)
    if found.faults:
        raise UserError(next(iter(found.faults.values())))
    for part in found.parts.values():
        if isinstance(part.images, PixelArrays | PackedImages):
            raise UserError(f"{part.origin} needs no packing: its images are in one file already")
        if isinstance(part.images, ImageFiles) and out.resolve().is_relative_to(part.images.root.resolve()):
            raise UserError(f"{out} lies inside the data, where it would be taken for a class; name another --out")
    files = {out / f"{name}{SUFFIX}" for name in found.parts}
    others = [path for path in out.glob("*") if path not in files and not path.name.endswith(UNFINISHED)]
    if others:  # a part of other images, or the class folders themselves, which packed files would hide
        raise UserError(f"{out} holds other files, as {others[0].name}; name a folder of its own with --out")
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(f".*{UNFINISHED}"):  # of a killed process
        path.unlink()
    said: list[str] = []
    for name, images in found.parts.items():
        file = out / f"{name}{SUFFIX}"
        fields = (name, found.kind, found.benchmark, found.divided, found.named, images.class_names)
        about = _About(*fields, short_side, images.fingerprint())
        if file.exists():
            if _read(file)[0] != about:
                raise UserError(f"{file} is there already, of other images or another size; name another --out")
            said.append(f"there already: {file}")
            continue
        try:
            for error in bad_images(images):
                raise error
            with atomic_file(file) as opened:
                _write(opened, images, about, threads)
        except BadImageError as error:
            raise UserError(f"{error.fault}; repair it (equipoise data FOLDER --check lists all such images)") from None
        said.append(f"written: {file} ({len(images):,} images, {file.stat().st_size / 1e6:,.1f} MB)")
    return said


def _write(file: IO[bytes], images: ImageList, about: _About, threads: int) -> None:
    """Write all images as they are to be stored."""
    pa = import_pyarrow(file.name)
    kinds = [("name", pa.binary()), ("image", pa.large_binary()), ("crc32", pa.uint32()), ("label", pa.int64())]
    schema = pa.schema(kinds, {_KEY: json.dumps(asdict(about))})
    source = images.images
    encoded = in_order(partial(_encoded, images, about.short_side), range(len(images)), threads)
    with pa.ipc.new_file(file, schema) as writer:
        for first in counted(range(0, len(images), _ROWS), len(images), f"packing {about.part}", _ROWS):
            rows = range(first, min(first + _ROWS, len(images)))
            contents = list(islice(encoded, len(rows)))
            names = [source.paths_N[row] if isinstance(source, ImageFiles) else source.name(row) for row in rows]
            checksums = [zlib.crc32(content) for content in contents]
            writer.write(pa.record_batch([names, contents, checksums, images.labels_N[rows]], schema))


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
