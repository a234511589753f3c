"""One entry of a list becomes a decoded image, uint8 `[H, W, 3]`, RGB; or is named as a bad one.

Pillow judges what is broken and decodes everything but whole JPEGs, which OpenCV decodes, because it is the fastest.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from equipoise.base.errors import UserError, one_line, reason
from equipoise.data.images import EncodedImages, ImageFiles, ImageList, PixelArrays

Pixels = npt.NDArray[np.uint8]

# Pillow knows more, and some of those run a program of the system's (EPS: Ghostscript).
_KINDS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_BLOCK = 4096  # images looked at between two reports

cv2.setNumThreads(0)  # as in views.operations
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata: an image is decoded, or it is an error


class BadImageError(UserError):
    """An image that cannot be read. `fault`: what is wrong, without what to do."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # `args`: it survives being pickled
        self.name, self.reason = name, reason
        self.fault = f"{name} cannot be read ({reason})"

    def __str__(self) -> str:
        return one_line(f"{self.fault}; repair or remove it, or pass over such images with --on-bad-image skip")


def decode(images: ImageList, index: int) -> Pixels:
    """The image at `index`, upright (its EXIF orientation applied). Raises BadImageError naming the file."""
    source = images.images
    if isinstance(source, PixelArrays):
        return source.pixels_NHW3[index]
    with _named(source, index):
        return decode_bytes(source.content(index))


def decode_bytes(content: bytes) -> Pixels:
    """An image file's bytes as pixels.

    JPEG that ends as JPEG should is read by OpenCV; all else by Pillow, which refuses what is broken where OpenCV would
    fill the missing half with gray. Of an animation it is the first frame; an alpha channel is dropped. Raises whatever
    a decoder raises for a broken file.
    """
    with _opened(io.BytesIO(content)) as image:
        if image.mode in ("RGB", "L") and content[:3] == b"\xff\xd8\xff" and content[-2:] == b"\xff\xd9":
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is not None:
                return pixels.astype(np.uint8, copy=False)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(_as_rgb(image))  # a copy: torch wants to be able to write


def decode_all(images: ImageList, size: int, skip: bool = False) -> tuple[Pixels, dict[int, BadImageError]]:
    """All images as `[N, size, size, 3]`, resized, and the bad ones by their index: with `skip` these stay black, else
    the first of them is raised."""
    pixels_NHW3 = np.zeros((len(images), size, size, 3), np.uint8)
    bad: dict[int, BadImageError] = {}
    for index in range(len(images)):
        try:
            pixels_NHW3[index] = resized(decode(images, index), size)
        except BadImageError as error:
            if not skip:
                raise
            bad[index] = error
    return pixels_NHW3, bad


def resized(pixels: Pixels, size: int) -> Pixels:
    """An image as `[size, size, 3]`, whatever its shape, by Pillow's antialiased bilinear filter."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def bad_images(images: ImageList, decoded: bool = False) -> Iterator[BadImageError | None]:
    """For each image of the list, in its order, the error if it is a bad one, else None. With `decoded` every pixel is
    decoded; else the header is read: most bad files, in no time. Nothing for images in memory, nor, without `decoded`,
    for packed ones: they were decoded when they were packed."""
    source = images.images
    if isinstance(source, PixelArrays) or (isinstance(source, EncodedImages) and source.packed and not decoded):
        return

    def look(index: int) -> BadImageError | None:
        try:
            if decoded:
                decode(images, index)
            else:
                with _named(source, index):
                    file = source.path(index) if isinstance(source, ImageFiles) else io.BytesIO(source.content(index))
                    _opened(file).close()
        except BadImageError as error:
            return error
        return None

    with ThreadPoolExecutor(usable_cores() if decoded else 8) as pool:
        # Block by block: the pool keeps an object for everything it is given.
        for start in range(0, len(images), _BLOCK):
            yield from pool.map(look, range(start, min(start + _BLOCK, len(images))))


def stand_ins(images: ImageList, index: int) -> list[int]:
    """Which images may stand in for the bad one at `index`, in this order: the others of its class, from there on and
    round to the beginning: the same in every process."""
    of_class = np.flatnonzero(images.labels_N == images.labels_N[index])
    return np.roll(of_class, -1 - int(np.searchsorted(of_class, index)))[:-1].tolist()


def no_image_left(images: ImageList, label: int) -> UserError:
    """The error where no image of a class can be read."""
    index = int(np.flatnonzero(images.labels_N == label)[0])
    return UserError(
        f"{images.origin}: none of the {images.class_counts[label]:,} images of class '{images.class_names[label]}' "
        f"can be read (first: {images.images.name(index)}); repair them or remove the class"
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _opened(file: io.BytesIO | Path) -> Image.Image:
    """The image, of which the header has been read. Raises ValueError for one that must not be decoded."""
    if not (file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes):
        raise ValueError("it is empty: 0 bytes")
    image = Image.open(file, formats=_KINDS)
    width, height = image.size
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):  # Pillow itself only warns below twice as many
        raise ValueError(f"its header claims {width:,} x {height:,} pixels: a decompression bomb?")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range: convert it to 8 or 16 bits")
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip, not scale
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits: convert it to 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _named(source: ImageFiles | EncodedImages, index: int) -> Generator[None]:
    """Raise BadImageError, which names the image, for whatever a decoder raises."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        why = "it is no image: not JPEG, PNG, GIF, BMP, TIFF, WebP or PPM"
    except Exception as error:  # decoders raise what they like
        why = reason(error, library=True)
    else:
        return
    raise BadImageError(source.name(index), why)
