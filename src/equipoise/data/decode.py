"""One entry of a list becomes a decoded image, uint8 `[H, W, 3]`, RGB; or is named as a bad one. Pillow judges what is
broken and decodes everything but whole JPEGs, which OpenCV decodes, because it is the fastest."""

import io
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from equipoise.base.errors import UserError, one_line, reason
from equipoise.data.images import EncodedImages, ImageFiles, ImageList, PixelArrays, TarImages

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")
Made = TypeVar("Made")

_ENDINGS = Image.registered_extensions()
# Pillow knows more, and some of those run a program of the system's (EPS: Ghostscript). AVIF is not in every build.
_WANTED = "JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"
_KINDS = [kind for kind in _WANTED if kind in _ENDINGS.values()]
# Formats of cameras: Pillow would take the small preview in some of them for the picture.
_RAW = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"})
_AS_JPEG = "convert it to JPEG"
# How files begin that people take for images: what they are, and what to do.
_OTHERS = {
    rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)": f"HEIC, which Pillow cannot read: {_AS_JPEG} (macOS: sips -s "
    "format jpeg; elsewhere heif-convert)",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI": "a film: save its frames as images",
    rb"\s*(<!doctype html|<html)": "a web page, not the image behind it: fetch it again",
    rb"version https://git-lfs": "a pointer of Git LFS, not the image: run git lfs pull",
    rb"%PDF": f"PDF: {_AS_JPEG}",
    rb"PK\x03\x04|\x1f\x8b|Rar!|7z": "an archive: unpack it (a spreadsheet: save it as CSV)",
    rb".{128}DICM": f"DICOM: {_AS_JPEG} or PNG",
}
NO_IMAGE = ", no image"  # how `why_no_image` ends for what nobody takes for an image
_MOST_PIXELS = 2**28  # of the scanners of herbaria, with some to spare

# What `decode_bytes` does, for whoever does it without this package.
DECODING = (
    "upright (EXIF orientation applied); of an animation the first frame; alpha is dropped: what is transparent has "
    "the colour stored under it; 16-bit gray v becomes (v + 128) // 257, of 16-bit colour the high byte is taken; "
    "more bits and floating-point numbers are refused; all else is converted to RGB as Pillow's convert does it"
)

cv2.setNumThreads(0)  # as in views.operations
Image.MAX_IMAGE_PIXELS = _MOST_PIXELS // 2  # Pillow refuses what has more than twice as many
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata: an image is decoded, or it is an error


class BadImageError(UserError):
    """An image that cannot be read. `fault`: what is wrong, without what to do."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # `args`: it survives being pickled
        self.name, self.reason = name, reason
        self.fault = f"{name} cannot be read ({reason})"

    def __str__(self) -> str:
        return one_line(f"{self.fault}; repair it, or pass over such images with --on-bad-image skip")


def decode(images: ImageList, index: int) -> Pixels:
    """The image at `index`, upright (its EXIF orientation applied). Raises BadImageError naming the file."""
    source = images.images
    if isinstance(source, PixelArrays):
        return source.pixels_NHW3[index]
    try:
        return decode_bytes(source.content(index))
    except Exception as error:  # decoders raise what they like
        raise _named(source, index, error) from None


def decode_bytes(content: bytes) -> Pixels:
    """An image file's bytes as pixels, as `DECODING` says. Raises whatever a decoder raises for a broken file. JPEG
    that ends as JPEG should is read by OpenCV; all else by Pillow, which refuses what is broken where OpenCV would fill
    the missing half with gray."""
    with _opened(io.BytesIO(content)) as image:
        if image.mode in ("RGB", "L") and content[:3] == b"\xff\xd8\xff" and content[-2:] == b"\xff\xd9":
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is not None:
                return pixels.astype(np.uint8, copy=False)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(_as_rgb(image))  # a copy: torch wants to be able to write


def resized(pixels: Pixels, size: int) -> Pixels:
    """An image as `[size, size, 3]`, whatever its shape, by Pillow's antialiased bilinear filter."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def why_no_image(file: Path) -> str:
    """What a file is that is no image; '' for an image, by its ending or else by its content."""
    suffix = file.suffix.lower()
    if _ENDINGS.get(suffix) in (*_KINDS, "MPO"):
        return ""
    if suffix in _RAW:
        return f"{suffix}, a camera's raw format: {_AS_JPEG}"
    if not file.is_file():
        return "a link to nothing"
    try:
        _opened(file).close()
    except Exception as error:  # decoders raise what they like
        if isinstance(error, OSError) and error.strerror:
            return reason(error)
        with file.open("rb") as opened:
            return _what_it_is(opened.read(160)) or f"{suffix or 'no ending'}{NO_IMAGE}"
    return ""


def _what_it_is(head: bytes) -> str:
    """What a file is that begins so, and what to do; '' for what nobody takes for an image."""
    if not head:
        return "empty: 0 bytes"
    return next((said for start, said in _OTHERS.items() if re.match(start, head, re.DOTALL | re.IGNORECASE)), "")


def bad_images(images: ImageList) -> Iterator[BadImageError]:
    """The errors of the list's bad images, in its order. Headers are read: these tell of most bad files, in no time.
    None for images in memory, for packed ones, which were decoded when they were packed, and for those at a URL."""
    source = images.images
    if isinstance(source, PixelArrays | TarImages) or (isinstance(source, ImageFiles) and source.url):
        return

    def look(index: int) -> BadImageError | None:
        try:
            _opened(source.path(index) if isinstance(source, ImageFiles) else io.BytesIO(source.content(index))).close()
        except Exception as error:
            return _named(source, index, error)
        return None

    yield from filter(None, in_order(look, range(len(images)), threads=8))


def in_order(make: Callable[[T], Made], items: Iterable[T], threads: int) -> Generator[Made]:
    """What `make` makes of each item, in their order, by threads ahead of what is taken (0: by the caller's)."""
    if threads == 0:
        yield from map(make, items)
        return
    pool, ahead = ThreadPoolExecutor(threads), deque[Future[Made]]()
    try:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        # Each thread ends with the item that it is at. It is not waited for: what is left over is collected in any
        # thread, and one cannot wait for itself.
        pool.shutdown(wait=False, cancel_futures=True)


def stand_in(images: ImageList, index: int, make: Callable[[int], Made | None]) -> Made:
    """What `make` makes of the image that stands in for the bad one at `index`: the next one of its class, round to the
    beginning, of which that is not None. Raises UserError where there is none."""
    label = int(images.labels_N[index])
    of_class = np.flatnonzero(images.labels_N == label)
    for other in np.roll(of_class, -1 - int(np.searchsorted(of_class, index)))[:-1].tolist():
        if (made := make(other)) is not None:
            return made
    what = f"none of the {len(of_class):,} images of class '{images.class_names[label]}' can be read"
    raise UserError(f"{images.origin}: {what} (first: {images.images.name(int(of_class[0]))}); repair them")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _opened(file: io.BytesIO | Path) -> Image.Image:
    """The image, of which the header has been read. Raises ValueError for one that must not be decoded."""
    image = Image.open(file, formats=_KINDS)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range: convert it to 8 or 16 bits")
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip, not scale
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits: convert it to 8 or 16 bits")
        if image.mode == "I" and values.max() <= 255:
            raise ValueError("its pixels have 32 bits, of which 8 are used: convert it to 8 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _named(source: ImageFiles | EncodedImages | TarImages, index: int, error: Exception) -> BadImageError:
    """The error that names an image of which a decoder has raised this one."""
    if isinstance(error, MemoryError | UserError):  # the latter: the network has failed, not the image
        raise error
    why = reason(error, library=True)
    if isinstance(error, Image.DecompressionBombError):
        why = f"it has more than {_MOST_PIXELS:,} pixels: make it smaller"
    elif isinstance(error, UnidentifiedImageError):
        what = _what_it_is(source.content(index)[:160])
        why = f"it is {what}" if what else f"it is no image: not {', '.join(_KINDS)}"
    return BadImageError(source.name(index), why)
