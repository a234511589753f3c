"""One entry of a list becomes a decoded image, uint8 `[H, W, 3]`, RGB; or is named as a bad one."""

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from equipoise.base.errors import UserError, lacks_memory, one_line, reason
from equipoise.base.files import regular_file
from equipoise.data.images import EncodedImages, ImageFiles, ImageList, PackedImages, PixelArrays

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

# Pillow knows more, and some of those run a program of the system's (EPS: Ghostscript) or ask one (IPTC, FPX).
_KINDS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# Pillow's own limit. Decoding takes up to 8 bytes a pixel, however small the file is.
MOST_PIXELS = 89_478_485
_MOST_BYTES = 16 * MOST_PIXELS
_LONGEST_SIDE = 2**20  # pixels. Of rows, Pillow takes 22 bytes for each, however narrow
_BAND = 2**22  # pixels
_BLOCK = 4096  # images looked at between two reports

cv2.setNumThreads(0)  # as in views.operations


class BadImageError(UserError):
    """An image that cannot be read: `args` are its name and the reason. (Made so that it survives being pickled.)"""

    @property
    def name(self) -> str:
        return self.args[0]

    @property
    def reason(self) -> str:
        return self.args[1]

    @property
    def fault(self) -> str:
        """What is wrong, without what to do."""
        return f"{self.name} cannot be read ({self.reason})"

    def __str__(self) -> str:
        return one_line(f"{self.fault}; repair or remove it, or pass over such images with --on-bad-image skip")


def decode(images: ImageList, index: int) -> Pixels:
    """The image at `index`, upright (its EXIF orientation applied). Raises BadImageError naming the file."""
    with _QUIET:
        return _decode(images, index)


def decode_bytes(content: bytes) -> Pixels:
    """An image file's bytes as pixels.

    JPEG that ends as JPEG should is read by OpenCV, which is the fastest; all else by Pillow, which refuses what is
    broken where OpenCV would fill the missing half with gray. Of an animation it is the first frame; an alpha channel
    is dropped. Raises whatever a decoder raises for a broken file.
    """
    with Image.open(io.BytesIO(content), formats=_KINDS) as image:
        _refuse_what_no_header_may_say(image)
        if image.mode in ("RGB", "L") and content[:3] == b"\xff\xd8\xff" and content[-2:] == b"\xff\xd9":
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is not None:
                return pixels.astype(np.uint8, copy=False)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _as_array(image)


def stand_ins(images: ImageList, index: int) -> list[int]:
    """Which images may stand in for the bad one at `index`, in this order: the others of its class, from there on and
    round to the beginning. So it is the same one in every run and in every loader process."""
    of_class = np.flatnonzero(images.labels_N == images.labels_N[index])
    return np.roll(of_class, -1 - int(np.searchsorted(of_class, index)))[:-1].tolist()


def decode_another(images: ImageList, index: int) -> Pixels:
    """What stands in for the bad image at `index`. Raises UserError if no image of its class can be read."""
    for other in stand_ins(images, index):
        with contextlib.suppress(BadImageError):
            return decode(images, other)
    raise no_image_left(images, int(images.labels_N[index]))


def no_image_left(images: ImageList, label: int) -> UserError:
    """What to say where no image of a class can be read."""
    index = int(np.flatnonzero(images.labels_N == label)[0])
    return UserError(
        f"{images.origin}: none of the {images.class_counts[label]:,} images of class '{images.class_names[label]}' "
        f"can be read (first: {images.images.name(index)}); repair them or remove the class"
    )


def decode_all(images: ImageList, size: int, skip: bool = False) -> tuple[Pixels, dict[int, BadImageError]]:
    """All images as `[N, size, size, 3]`, for sets small enough to stay in memory, and the bad ones by their index.

    An image of another size is resized. The first bad image is raised; with `skip` it stays black, and is for the
    caller to leave out.
    """
    pixels_NHW3 = np.empty((len(images), size, size, 3), np.uint8)
    bad: dict[int, BadImageError] = {}
    for index in range(len(images)):
        try:
            pixels = decode(images, index)
        except BadImageError as error:
            if not skip:
                raise
            bad[index] = error
            pixels = np.zeros((size, size, 3), np.uint8)
        pixels_NHW3[index] = resized(pixels, size)
    return pixels_NHW3, bad


def resized(pixels: Pixels, size: int) -> Pixels:
    """An image as `[size, size, 3]`, whatever its shape, by Pillow's antialiased bilinear filter."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def _refuse_what_no_header_may_say(image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > _LONGEST_SIDE:
        raise ValueError(
            f"its header claims {width:,} x {height:,} pixels, and {_LONGEST_SIDE:,} is the most of either: a "
            "decompression bomb?"
        )
    if width * height > MOST_PIXELS:
        raise ValueError(f"its header claims {width:,} x {height:,} pixels: a decompression bomb?")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range: convert it to 8 or 16 bits")


def _as_array(image: Image.Image) -> Pixels:
    """A large image is converted in bands: Pillow's way to an array has three copies of it in memory."""
    width, height = image.size
    rows = max(1, _BAND // width)
    if rows >= height:
        return np.array(_as_rgb(image))  # a copy: torch wants to be able to write
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(_as_rgb(image.crop((0, top, width, bottom))))
    return pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip, not scale
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits: convert it to 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")


def bad_images(images: ImageList, decoded: bool = False) -> Iterator[BadImageError | None]:
    """For each image of the list, in its order, the error if it is a bad one, else None. With `decoded` every pixel is
    decoded, in a thread for each core; else the file is opened and its header read: most bad files, in no time."""

    def look(index: int) -> BadImageError | None:
        try:
            _decode(images, index) if decoded else _open_header(images, index)
        except BadImageError as error:
            return error
        return None

    unlike_files = (
        PixelArrays if decoded else PixelArrays | PackedImages
    )  # packed ones were decoded when they were packed
    if isinstance(images.images, unlike_files):
        return
    with ThreadPoolExecutor(usable_cores() if decoded else 8) as pool:
        # Block by block: the pool keeps an object for everything it is given.
        for start in range(0, len(images), _BLOCK):
            with _QUIET:
                found = list(pool.map(look, range(start, min(start + _BLOCK, len(images)))))
            yield from found


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(images: ImageList, index: int) -> Pixels:
    source = images.images
    if isinstance(source, PixelArrays):
        return source.pixels_NHW3[index]
    return _named(images, index, lambda: decode_bytes(content_of(images, index)))


def _open_header(images: ImageList, index: int) -> None:
    def read() -> None:
        # Of a file, only the header is read.
        source = images.images
        file = (
            regular_file(source.root / source.paths[index])
            if isinstance(source, ImageFiles)
            else io.BytesIO(content_of(images, index))
        )
        with Image.open(file, formats=_KINDS) as image:
            _refuse_what_no_header_may_say(image)

    _named(images, index, read)


def content_of(images: ImageList, index: int) -> bytes:
    """The image's file, as bytes. Raises OSError or ValueError where it cannot be had."""
    source = images.images
    if isinstance(source, ImageFiles):
        file = regular_file(source.root / source.paths[index])
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than any image of {MOST_PIXELS:,} pixels")
        return file.read_bytes()
    assert isinstance(source, EncodedImages | PackedImages)
    content = source.content(index)
    if content is None:
        raise ValueError("it has no bytes")
    return content


def _named(images: ImageList, index: int, read: Callable[[], T]) -> T:
    """What `read` returns; or, whatever a decoder raises for a damaged file, the error that names it. Raises
    MemoryError where it is not the file's fault."""
    try:
        return read()
    except UnidentifiedImageError:
        why = "it is no image: not JPEG, PNG, GIF, BMP, TIFF, WebP or PPM"
    except Image.DecompressionBombError:  # Pillow names twice the limit that is ours
        why = f"it claims more than {Image.MAX_IMAGE_PIXELS:,} pixels: a decompression bomb?"
    except Exception as error:  # decoders raise what they like: anything but a bad file would be a bug of theirs
        if lacks_memory(error, 8 * MOST_PIXELS):
            raise MemoryError from None
        why = reason(error, library=True)
    raise BadImageError(images.images.name(index), why)


class _Quiet:
    """A context without warnings of Pillow's about what is odd in a file: it is decoded, or it is an error. What
    warnings do is one setting of the process: of several threads, the first in changes it, the last out puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._setting = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._setting = warnings.catch_warnings()
                self._setting.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._setting.__exit__(None, None, None)


_QUIET = _Quiet()
