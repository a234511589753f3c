"""Image lists become packed images: each part one file, in which large images are made smaller, once and for all."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import Image
from rich.progress import track

from equipoise.base.errors import UserError, reason
from equipoise.base.files import UNFINISHED, atomic_file
from equipoise.data.decode import BadImageError, bad_images, decode
from equipoise.data.images import EncodedImages, Found, ImageFiles, ImageList, PixelArrays, import_pyarrow
from equipoise.data.packed import KEY, SUFFIX, About, columns, read_packed

_LONGEST_JPEG = 65_500  # pixels: libjpeg writes no longer side. Such a strip stays as it is
_QUALITY = 90  # of JPEG: short sides of 256 pixels take 30 kB
_ROWS = 256  # written at a time


def pack(found: Found, out: Path, short_side: int, threads: int) -> list[str]:
    """Write the parts of what was found into the folder `out`; one line about each.

    An image whose short side is longer than `short_side` pixels is resized (Pillow's antialiased bilinear filter) and
    becomes JPEG; others stay as they are, byte for byte. A part that is there already, of the same images, is kept:
    what was interrupted goes on with the next part.

    Raises UserError for images that cannot be read or need no packing, or where other files are in the way. A file
    appears only when it is complete.
    """
    import_pyarrow(out)
    if found.faults:
        raise UserError(next(iter(found.faults.values())))
    for part in found.parts.values():
        if isinstance(part.images, PixelArrays) or (isinstance(part.images, EncodedImages) and part.images.packed):
            raise UserError(f"{part.origin} needs no packing: its images are in one file already")
        for error in filter(None, bad_images(part)):
            raise _unpackable(error)
    _claim(out, [f"{name}{SUFFIX}" for name in found.parts])
    said: list[str] = []
    for name, images in found.parts.items():
        file = out / f"{name}{SUFFIX}"
        fields = (name, found.kind, found.benchmark, found.divided, found.named, images.class_names)
        about = About(*fields, short_side, images.fingerprint())
        if file.exists():
            if read_packed(file)[0] != about:
                raise UserError(f"{file} is there already, of other images or another size; remove it")
            said.append(f"there already: {file}")
            continue
        try:
            with atomic_file(file) as opened:
                _write(opened, images, about, threads)
        except OSError as error:
            raise UserError(
                f"{file} could not be written ({reason(error)}); make room there and start again: parts that are "
                "complete are kept"
            ) from None
        said.append(f"written: {file} ({len(images):,} images, {file.stat().st_size / 1e6:,.1f} MB)")
    return said


def _claim(out: Path, files: list[str]) -> None:
    """Make the folder, or take it where it holds these files alone, and what a killed process left of them."""
    there = list(out.iterdir()) if out.is_dir() else []
    unfinished = [path for path in there if path.name.endswith(UNFINISHED)]
    if out.is_file() or not {path.name for path in there if path not in unfinished}.issubset(files):
        raise UserError(f"{out} holds other files; name a folder of its own with --out")
    for path in unfinished:
        path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _write(file: IO[bytes], images: ImageList, about: About, threads: int) -> None:
    """Write all images as they are to be stored, as `packed.py` describes the file."""
    pa = import_pyarrow(file.name)
    schema = columns(pa).with_metadata({KEY: json.dumps(asdict(about))})
    source = images.images
    with ThreadPoolExecutor(max(1, threads)) as pool, pa.ipc.new_file(file, schema) as writer:
        for first in track(range(0, len(images), _ROWS), f"packing {about.part}", transient=True):
            rows = range(first, min(first + _ROWS, len(images)))
            encoded = list(pool.map(_encoded, repeat(images), rows, repeat(about.short_side)))
            names = [source.paths_N[row] if isinstance(source, ImageFiles) else source.name(row) for row in rows]
            checksums = [zlib.crc32(content) for content in encoded]
            writer.write(pa.record_batch([names, encoded, checksums, images.labels_N[rows]], schema))


def _encoded(images: ImageList, index: int, short_side: int) -> bytes:
    """The image as it is to be stored."""
    assert not isinstance(images.images, PixelArrays)
    try:
        pixels = decode(images, index)  # of small ones too: what is broken must not be packed
    except BadImageError as error:
        raise _unpackable(error) from None
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


def _unpackable(error: BadImageError) -> UserError:
    return UserError(f"{error.fault}; repair or remove it (equipoise data FOLDER --check lists all such images)")
