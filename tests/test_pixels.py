"""Decoding: real files of the kinds that people have, and broken ones."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import draw_folder
from PIL import Image

from equipoise import UserError
from equipoise.pixels import bad_images, decode, decode_all, decode_bytes
from equipoise.sources import find_parts


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(kind, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    turned = decode_bytes(encoded(photo, kind, exif=exif))
    assert difference(turned, np.asarray(photo.rotate(-90, expand=True))) < 2


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("L", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG")],
)
def test_modes_become_rgb(mode, kind, photo):
    image = photo.convert(mode)
    assert difference(decode_bytes(encoded(image, kind)), np.asarray(image.convert("RGB"))) < 2


def test_sixteen_bits_are_scaled(photo):
    gray = np.asarray(photo.convert("L")).astype(np.uint16)
    content = encoded(Image.fromarray(gray * 257), "PNG")
    assert (decode_bytes(content) == gray[..., None]).all()


def test_palette_with_transparency(photo):
    content = encoded(photo.convert("P"), "PNG", transparency=3)
    assert decode_bytes(content).shape == (48, 64, 3)


def _bomb() -> bytes:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "it is no image"),
        (lambda content: b"<html>", "it is no image"),
        (lambda content: content[: len(content) // 2], "Truncated File Read"),
        (lambda content: content[:-40], "image file is truncated"),
        (lambda content: _bomb(), "decompression bomb"),
    ],
)
def test_broken_files_are_named(damage, reason, photo, pictures):
    path = pictures / "ant" / "0.png"
    path.write_bytes(damage(encoded(photo, "JPEG")))
    images = find_parts(str(pictures)).parts["train"]
    with pytest.raises(UserError) as error:
        decode(images, 0)
    assert str(error.value).startswith(f"{path} cannot be read (")
    assert str(error.value).endswith("; repair or remove it, or pass over such images with --on-bad-image skip")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_vanished_file(pictures):
    images = find_parts(str(pictures)).parts["train"]
    (pictures / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0.png cannot be read \(no such file or directory\)"):
        decode(images, 0)


def test_headers_are_checked_without_decoding(pictures):
    (pictures / "bee" / "1.png").write_bytes(b"no image")
    (pictures / "cat" / "2.png").write_bytes(b"")
    images = find_parts(str(pictures)).parts["train"]
    found = {index: error.name for index, error in enumerate(bad_images(images)) if error}
    assert found == {13: str(pictures / "bee" / "1.png"), 20: str(pictures / "cat" / "2.png")}


def test_decode_all_resizes_as_pillow_does(tmp_path):
    draw_folder(tmp_path, {"a": 2, "b": 1})
    images = find_parts(str(tmp_path)).parts["train"]
    small, bad = decode_all(images, 16)
    assert bad == {}
    assert small.shape == (3, 16, 16, 3)
    with Image.open(images.images.name(2)) as image:
        expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    assert (small[2] == expected).all()
