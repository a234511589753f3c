"""Image lists, and the benchmark's subsets of them."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, draw_folder

from equipoise import UserError
from equipoise.data.images import ImageFiles, ImageList, PixelArrays, hold_out, long_tail_counts, long_tailed
from equipoise.data.sources import find_parts


def image_list(counts: list[int]) -> ImageList:
    """In a random order; the pixel of each image is its number."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    pixels = np.arange(len(labels), dtype=np.uint8).repeat(3).reshape(-1, 1, 1, 3)
    return ImageList("test", PixelArrays("test", pixels), labels, tuple(f"c{i}" for i in range(len(counts))))


def test_fingerprint_changes_with_content_labels_and_names(tmp_path):
    base = image_list([3, 2])
    assert base.fingerprint() == image_list([3, 2]).fingerprint()
    others = [
        image_list([2, 3]),
        base.take(np.array([0, 1])),
        ImageList("x", base.images, base.labels_N, ("other", "names")),
        ImageList("x", PixelArrays("x", base.images.pixels_NHW3 + 1), base.labels_N, base.class_names),
        ImageList("x", base.images, base.labels_N[::-1].copy(), base.class_names),
    ]
    draw_folder(tmp_path, {"c0": 3, "c1": 2})
    others.append(find_parts(str(tmp_path)).parts["train"])
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 7


def test_files_below_a_folder():
    """Fingerprints hang on the digest: runs of earlier versions go on."""
    names = ["a/1.jpg", "b/é 2.jpg", "a/1.jpg", "\udcff.png"]
    files = ImageFiles.of(Path("root"), names)
    assert [files.name(index) for index in range(len(files))] == [f"root/{name}" for name in names]
    assert files.digest() == hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()
    taken = files.take(np.array([3, 1]))
    assert [taken.name(index) for index in range(2)] == ["root/\udcff.png", "root/b/é 2.jpg"]


@pytest.mark.parametrize("name", GOLDEN["long_tail_counts"])
def test_long_tail_counts_golden(name):
    expected = GOLDEN["long_tail_counts"][name]
    shape = "step" if "step" in name else "exponential"
    factor = float(name.rsplit("if", 1)[1])
    assert long_tail_counts(max(expected), len(expected), factor, shape) == expected


def test_long_tailed_is_the_benchmarks_subset():
    """Seed 0 of numpy's global generator, classes in label order, the first n of each shuffled class."""
    full = image_list([40, 40, 40])
    np.random.seed(0)
    expected = []
    for label, count in enumerate([40, 12, 4]):
        indices = np.where(full.labels_N == label)[0]
        np.random.shuffle(indices)
        expected += indices[:count].tolist()
    subset = long_tailed(full, 10, "exponential")
    assert subset.images.pixels_NHW3[:, 0, 0, 0].tolist() == expected
    assert subset.class_counts == (40, 12, 4)


def test_an_imbalance_that_empties_a_class():
    with pytest.raises(UserError, match=r"leaves class 'c1' without images; .* it can be 20 at most"):
        long_tailed(image_list([20, 30]), 50, "exponential")


def test_hold_out():
    full = image_list([100, 12, 3, 2, 1])
    train, validation = hold_out(full, 0.1)
    assert validation.class_counts == (10, 1, 1, 0, 0)
    assert train.class_counts == (90, 11, 2, 2, 1)
    numbers = [part.images.pixels_NHW3[:, 0, 0, 0].tolist() for part in (train, validation)]
    assert sorted(numbers[0] + numbers[1]) == list(range(118)), "each image is in one of the two"
    assert hold_out(full, 0.1)[1].fingerprint() == validation.fingerprint()
    with pytest.raises(UserError, match=r"no class has three images, .* set --holdout 0"):
        hold_out(image_list([2, 2]), 0.5)
