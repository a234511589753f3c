"""One entry of a list becomes a decoded image, uint8 `[H, W, 3]`, RGB."""

import io
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from equipoise.errors import UserError
from equipoise.lists import EncodedImages, ImageFiles, ImageList, PackedImages, PixelArrays

Pixels = npt.NDArray[np.uint8]

# What decoders raise for a file that is no good image.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    cv2.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_HEADERS = Lock()
cv2.setNumThreads(0)  # the loader's processes are the parallelism; threads inside each would fight for the cores


def decode(images: ImageList, index: int) -> Pixels:
    """The image at `index`, upright (its EXIF orientation applied). Raises UserError naming the file."""
    source = images.images
    if isinstance(source, PixelArrays):
        return source.pixels_NHW3[index]
    try:
        return decode_bytes(content_of(images, index))
    except _BROKEN as error:
        raise _unreadable(images, index, error) from None


def decode_bytes(content: bytes) -> Pixels:
    """An image file's bytes as pixels.

    JPEG that ends as JPEG should is read by OpenCV, which is the fastest; all else by Pillow, which refuses what is
    broken where OpenCV would fill the missing half with gray. Raises OSError or ValueError for a broken file.
    """
    if content[:3] == b"\xff\xd8\xff" and content[-2:] == b"\xff\xd9":
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            return pixels.astype(np.uint8, copy=False)
    # Pillow warns of an image that is too large when it reads the header. What a warning does is the process's own, not
    # a thread's; and reading headers is short.
    with _HEADERS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content))
    with image:
        return np.array(_as_rgb(ImageOps.exif_transpose(image)))  # a copy: torch wants to be able to write


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip, not scale
        scaled = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def decode_all(images: ImageList, size: int) -> Pixels:
    """All images as `[N, size, size, 3]`, for sets small enough to stay in memory.

    An image of another size is resized. Raises UserError naming a file that cannot be read.
    """
    pixels_NHW3 = np.empty((len(images), size, size, 3), np.uint8)
    for index in range(len(images)):
        pixels_NHW3[index] = resized(decode(images, index), size)
    return pixels_NHW3


def resized(pixels: Pixels, size: int) -> Pixels:
    """An image as `[size, size, 3]`, whatever its shape, by Pillow's antialiased bilinear filter."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def unreadable(images: ImageList) -> Iterator[UserError]:
    """An error for every image whose file cannot be opened or whose header is no image's. Pixels are not decoded."""
    if isinstance(images.images, PixelArrays | PackedImages):  # packed ones were decoded when they were packed
        return

    def check(index: int) -> UserError | None:
        path = images.images.name(index) if isinstance(images.images, ImageFiles) else None
        try:
            # Of a file, only the header is read.
            with Image.open(path if path else io.BytesIO(content_of(images, index))):
                return None
        except _BROKEN as error:
            return _unreadable(images, index, error)

    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for error in pool.map(check, range(len(images)), chunksize=64):
            if error is not None:
                yield error


def content_of(images: ImageList, index: int) -> bytes:
    """The image's file, as bytes. Raises OSError or ValueError where it cannot be had."""
    source = images.images
    if isinstance(source, ImageFiles):
        return (source.root / source.paths[index]).read_bytes()
    assert isinstance(source, EncodedImages | PackedImages)
    content = source.content(index)
    if content is None:
        raise ValueError("it has no bytes")
    return content


def _unreadable(images: ImageList, index: int, error: Exception) -> UserError:
    if isinstance(error, UnidentifiedImageError):
        reason = "it is no image"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror.lower()
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{images.images.name(index)} cannot be read ({reason}); repair or remove it")
