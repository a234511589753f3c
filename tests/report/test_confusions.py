"""Confused pairs against counting by hand, and thumbnails that hold the picture."""

import base64
import io
import re

import numpy as np
from conftest import draw_folder
from PIL import Image

from equipoise.data.sources import find_parts
from equipoise.report.confusions import confused_pairs, thumbnails

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 1])
PREDICTED = np.array([0, 1, 1, 1, 2, 0, 0, 1, 2, 1])
SURE = np.array([0.5, 0.6, 0.9, 0.7, 0.4, 0.8, 0.2, 0.3, 0.9, 0.8])


def test_pairs_by_number_then_by_share():
    pairs = confused_pairs(LABELS, PREDICTED, SURE, 3, 10)
    assert [(pair.true, pair.said, pair.mistakes, pair.images) for pair in pairs] == [
        (0, 1, 2, 3),  # two of three come before two of four
        (2, 0, 2, 4),
        (1, 2, 1, 3),
        (2, 1, 1, 4),
    ]
    assert pairs[0].wrong == [2, 1]  # the surest first
    assert pairs[0].typical == [9, 3]
    assert confused_pairs(LABELS, PREDICTED, SURE, 3, 1) == pairs[:1]


def test_no_mistakes_no_pairs():
    assert confused_pairs(LABELS, LABELS, SURE, 3, 5) == []


def test_thumbnails_hold_the_picture(tmp_path):
    images = find_parts(str(draw_folder(tmp_path / "data", {"<b>x & y": 2, "z": 1}))).parts["train"]
    first, second = thumbnails(images, [0, 2])
    assert 'alt="&lt;b&gt;x &amp; y"' in first
    assert 'alt="z"' in second
    data = re.search(r'src="data:image/png;base64,([^"]+)"', first)[1]
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown, Image.open(images.images.name(0)) as file:
        assert np.array_equal(np.asarray(shown), np.asarray(file.convert("RGB")))


def test_large_pictures_become_small_jpegs_and_broken_ones_are_passed_over(tmp_path):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (600, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "1.jpg")
    (folder / "2.jpg").write_bytes((folder / "1.jpg").read_bytes()[:900])
    (tmp_path / "data" / "b").mkdir()
    Image.fromarray(noise).save(tmp_path / "data" / "b" / "1.jpg")
    images = find_parts(str(tmp_path / "data")).parts["train"]
    pictures = thumbnails(images, [0, 1])
    assert len(pictures) == 1
    data = base64.b64decode(re.search(r'src="data:image/jpeg;base64,([^"]+)"', pictures[0])[1])
    assert len(data) < 5000
    with Image.open(io.BytesIO(data)) as shown:
        assert shown.size == (48, 72)
