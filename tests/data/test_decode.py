"""Decoding: real files of the kinds that people have, and broken ones."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from equipoise import UserError
from equipoise.data.decode import bad_images, decode, decode_bytes, stand_in
from equipoise.data.sources import find_parts
from equipoise.views.views import evaluation_view


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photo() -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    y, x = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([4 * x, 5 * y, 128 + 0 * x], axis=-1).astype(np.uint8))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "PPM"])
def test_kinds(kind, photo):
    content = encoded(photo, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    assert difference(decode_bytes(content), np.asarray(photo)) < (8 if kind == "GIF" else 2)


def test_jpeg_is_what_pillow_decodes(photo):
    content = encoded(photo, "JPEG", quality=80)
    with Image.open(io.BytesIO(content)) as image:
        assert difference(decode_bytes(content), np.asarray(image.convert("RGB"))) < 0.5


# What has to be done to the pixels of an image to see it upright (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("kind", ["JPEG", "JPEG by Pillow", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation, kind, photo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    by_pillow = b"\0" if kind == "JPEG by Pillow" else b""  # what follows its end mark is not OpenCV's to judge
    content = encoded(photo, kind.split()[0], exif=exif) + by_pillow
    assert difference(decode_bytes(content), UPRIGHT[orientation](np.asarray(photo))) < 2


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[(mode, "PNG") for mode in ("L", "P", "1", "RGBA", "LA")],
        *[(mode, "JPEG") for mode in ("L", "CMYK")],
        *[(mode, "TIFF") for mode in ("L", "P", "1", "RGBA", "CMYK", "YCbCr", "LAB")],
        *[(mode, "WEBP") for mode in ("RGBA",)],
    ],
)
def test_modes_become_rgb(mode, kind, photo):
    image = photo.convert(mode)
    assert difference(decode_bytes(encoded(image, kind)), np.asarray(image.convert("RGB"))) < 2
    if mode == "P":
        assert decode_bytes(encoded(image, kind, transparency=3)).shape == (48, 64, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind, photo):
    gray = np.asarray(photo.convert("L")).astype(np.uint16)
    content = encoded(Image.fromarray(gray * 257), kind)
    assert (decode_bytes(content) == gray[..., None]).all()
    colour = np.asarray(photo).astype(np.uint16) * 257
    content = cv2.imencode(f".{kind.lower()}", colour[..., ::-1])[1].tobytes()
    assert (decode_bytes(content) == np.asarray(photo)).all()


def test_pixels_of_no_known_range_are_refused(photo):
    values = np.asarray(photo.convert("L")).astype(np.float32)
    for spoilt in (values, np.full_like(values, np.nan), np.full_like(values, np.inf)):
        with pytest.raises(ValueError, match="floating-point numbers of no known range"):
            decode_bytes(encoded(Image.fromarray(spoilt), "TIFF"))
    with pytest.raises(ValueError, match="its pixels have more than 16 bits"):
        decode_bytes(encoded(Image.fromarray(values.astype(np.int32) * 1000), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind, photo):
    others = [photo.rotate(90 * turn) for turn in (1, 2)]
    content = encoded(photo, kind, save_all=True, append_images=others)
    assert difference(decode_bytes(content), np.asarray(photo)) < (8 if kind == "GIF" else 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_any_shape(size, kind):
    content = encoded(Image.new("RGB", size, (200, 100, 50)), kind)
    pixels = decode_bytes(content)
    assert pixels.shape == (size[1], size[0], 3)
    view = evaluation_view(pixels, 224)
    assert np.abs(view.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.filterwarnings("ignore")  # as `decode.py` does it, which pytest undoes
def test_odd_metadata_is_no_reason_to_refuse(photo, pictures):
    spoilt = encoded(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(40))
    (pictures / "ant" / "0.png").write_bytes(spoilt)
    assert decode(find_parts(str(pictures)).parts["train"], 0).shape == (48, 64, 3)


def _jpeg_bomb(jpeg: bytes) -> bytes:
    """The JPEG, which now claims 30,000 x 30,000 pixels. It is of the kind that OpenCV reads."""
    content = bytearray(jpeg)
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", 30_000, 30_000)
    return bytes(content)


def _bomb(side: int = 100_000) -> bytes:
    """A PNG of a few bytes that claims `side` x `side` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "(it is empty: 0 bytes)"),
        (lambda content: b"<html>", "it is a web page, not the image behind it: fetch it again"),
        (
            lambda content: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            "it is no image",
        ),  # not by Ghostscript
        (lambda content: b"%PDF-1.4\n", "it is PDF: convert it to JPEG"),
        (lambda content: content[: len(content) // 2], "Truncated File Read"),
        (lambda content: content[:-40], "image file is truncated"),
        (lambda content: content[:-40] + content[-1:] * 100, "image file is truncated"),
        (lambda content: _bomb(), "it has more than 268,435,456 pixels: make it smaller"),
        (lambda content: _bomb(20_000), "it has more than 268,435,456 pixels: make it smaller"),
        (lambda content: _bomb(8_000), "truncated"),
        (_jpeg_bomb, "it has more than 268,435,456 pixels: make it smaller"),
        (lambda content: None, "no such file or directory"),
    ],
)
def test_broken_files_are_named(damage, reason, photo, pictures):
    path = pictures / "ant" / "0.png"
    images = find_parts(str(pictures)).parts["train"]
    damaged = damage(encoded(photo, "JPEG"))
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(UserError) as error:
        decode(images, 0)
    assert str(error.value).startswith(f"{path} cannot be read (")
    assert str(error.value).endswith("; repair it, or pass over such images with --on-bad-image skip")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    if any(
        word in reason for word in ("no image", "more than", "directory", "empty", "web page", "PDF")
    ):  # its header tells
        assert [error.name for error in bad_images(images)] == [images.images.name(0)]


def test_what_stands_in_for_a_bad_image(pictures):
    """The next of its class in the list, round to the beginning: 12 ants, 6 bees, 3 cats."""
    images = find_parts(str(pictures)).parts["train"]
    for index, expected in ((14, [15, 16, 17, 12, 13]), (20, [18, 19])):
        tried: list[int] = []
        with pytest.raises(UserError, match=f"none of the {1 + len(expected)} images of class '.*' can be read"):
            stand_in(images, index, tried.append)
        assert tried == expected
    assert stand_in(images, 14, lambda other: other if other > 15 else None) == 16
