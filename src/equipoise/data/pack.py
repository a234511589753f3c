"""Image lists become packed images: each part one file, in which large images are made smaller, once and for all."""

import multiprocessing
import zlib
from collections.abc import Generator
from contextlib import closing, nullcontext
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from rich.progress import track

from equipoise.base.errors import UserError, out_of_memory, reason
from equipoise.base.files import UNFINISHED, atomic_file
from equipoise.data.decode import BadImageError, bad_images, content_of, decode
from equipoise.data.images import EncodedImages, Found, ImageFiles, ImageList, Paths
from equipoise.data.packed import SUFFIX, read_about, write_packed
from equipoise.data.sources import disagreements

_LONGEST_JPEG = 65_500  # pixels: libjpeg writes no longer side. Such a strip stays as it is
_QUALITY = 90  # of JPEG: short sides of 256 pixels take 30 kB


def pack(found: Found, benchmark: str, out: Path, short_side: int, workers: int) -> list[str]:
    """Write the parts of what was found into the folder `out`; one line about each.

    An image whose short side is longer than `short_side` pixels is resized (Pillow's antialiased bilinear filter) and
    becomes JPEG; others stay as they are, byte for byte. `benchmark`: the published data set that it is, if any. A part
    that is there already, of the same images, is kept: what was interrupted goes on with the next part.

    Raises UserError for images that cannot be read or need no packing, or where other files are in the way. A file
    appears only when it is complete.
    """
    for problem in [*map(str, found.absent.values()), *disagreements(found)]:
        raise UserError(problem)
    for part in found.parts.values():
        if not isinstance(part.images, ImageFiles | EncodedImages):
            raise UserError(f"{part.origin} needs no packing: its images are in one file already")
        for error in filter(None, bad_images(part)):
            raise _unpackable(error)
    _claim(out, [f"{name}{SUFFIX}" for name in found.parts])
    told: list[str] = []
    for name, images in found.parts.items():
        file = out / f"{name}{SUFFIX}"
        about = {
            "part": name,
            "kind": found.kind,
            "benchmark": benchmark,
            "divided": found.divided,
            "named": found.named,
            "class_names": list(images.class_names),
            "images": len(images),
            "short_side": short_side,
            "fingerprint": images.fingerprint(),  # of what was packed
        }
        if file.exists():
            if read_about(file) != about:
                raise UserError(f"{file} is there already, of other images or another size; remove it")
            told.append(f"there already: {file}")
            continue
        try:
            with atomic_file(file) as opened, closing(_encoded(images, short_side, workers)) as contents:
                shown = track(contents, f"packing {name}", total=len(images), transient=True)
                write_packed(opened, shown, _names(images), images.labels_N, about)
        except OSError as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"{file} could not be written ({reason(error)}); make room there and start again: parts that are "
                "complete are kept"
            ) from None
        told.append(f"written: {file} ({len(images):,} images, {file.stat().st_size / 1e6:,.1f} MB)")
    return told


def _claim(out: Path, files: list[str]) -> None:
    """Make the folder, or take it where it holds these files alone, and what a killed process left of them."""
    there = list(out.iterdir()) if out.is_dir() else []
    unfinished = [path for path in there if path.name.endswith(UNFINISHED) and path.is_file()]
    if out.is_file() or not {path.name for path in there if path not in unfinished}.issubset(files):
        raise UserError(f"{out} holds other files; name a folder of its own with --out")
    for path in unfinished:
        path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _names(images: ImageList) -> Paths:
    """What messages call the images: paths within their folder, or rows."""
    source = images.images
    return source.paths if isinstance(source, ImageFiles) else Paths.of(map(source.name, range(len(images))))


def _encoded(images: ImageList, short_side: int, workers: int) -> Generator[tuple[bytes, int]]:
    """Every image's new bytes with their checksum, in order, made by `workers` processes (0: this one)."""
    if workers == 0:
        _start(images, short_side)
    with multiprocessing.Pool(workers, _start, (images, short_side)) if workers else nullcontext() as pool:
        indices = range(len(images))
        for content in pool.imap(_encode, indices, chunksize=16) if pool else map(_encode, indices):
            if isinstance(content, UserError):
                raise content
            yield content, zlib.crc32(content)


def _unpackable(error: BadImageError) -> UserError:
    return UserError(f"{error.fault}; repair or remove it (equipoise data DATA --check lists all such images)")


_work: tuple[ImageList, int]  # of this process


def _start(images: ImageList, short_side: int) -> None:
    global _work
    _work = images, short_side


def _encode(index: int) -> bytes | UserError:
    """The image as it is to be stored. An error is returned, not raised: it would lose its line on the way."""
    images, short_side = _work
    try:
        pixels = decode(images, index)  # of small ones too: what is broken must not be packed
    except BadImageError as error:
        return _unpackable(error)
    height, width = pixels.shape[:2]
    if min(height, width) <= short_side:
        return content_of(images, index)
    # The long side is truncated, as torchvision's Resize does it, and evaluation views here.
    scale = short_side / min(height, width)
    size = (short_side, int(scale * height)) if width <= height else (int(scale * width), short_side)
    if max(size) > _LONGEST_JPEG:
        return content_of(images, index)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(resized, cv2.COLOR_RGB2BGR), options)
    return encoded.tobytes()
