"""The literature's long-tail subsets, and what is held out of training."""

import numpy as np
import pytest
from conftest import GOLDEN, draw_folder, image_list, opened

from equipoise import UserError
from equipoise.config.recipe import Data
from equipoise.data.images import ImageList
from equipoise.data.sources import open_data
from equipoise.data.subsets import grouped, hold_out, long_tail_counts, long_tailed


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


def test_a_tail_of_classes_of_any_size():
    """In the order of their sizes at most 40 * 16^(-r/4): 40, 20, 10, 5, 2; of equal ones the benchmark's subset."""
    assert long_tailed(image_list([7, 40, 3, 25, 9]), 16, "by-size").class_counts == (5, 40, 2, 20, 9)
    equal = image_list([30, 30, 30])
    subsets = [long_tailed(equal, 10, shape).images.pixels_NHW3 for shape in ("by-size", "exponential")]
    assert np.array_equal(*subsets)


def test_an_imbalance_that_empties_a_class():
    with pytest.raises(UserError, match=r"leaves class 'c1' without images; .* it can be 20 at most"):
        long_tailed(image_list([20, 30]), 50, "exponential")


def test_hold_out():
    full = image_list([100, 12, 5, 2, 1])
    train, validation = hold_out(full, 0.1)
    assert validation.class_counts == (10, 1, 0, 0, 0), "a class of few images needs them all"
    assert train.class_counts == (90, 11, 5, 2, 1)
    numbers = [part.images.pixels_NHW3[:, 0, 0, 0].tolist() for part in (train, validation)]
    assert sorted(numbers[0] + numbers[1]) == list(range(120)), "each image is in one of the two"
    assert hold_out(full, 0.1)[1].fingerprint() == validation.fingerprint()
    assert hold_out(image_list([5, 2]), 0.1)[1] is None
    with pytest.raises(UserError, match=r"no class has two images, .* set --holdout 0"):
        hold_out(image_list([1, 1]), 0.5, "1/2")


def numbers(images: ImageList) -> list[int]:
    return images.images.pixels_NHW3[:, 0, 0, 0].tolist()


def test_folds():
    """Each image of a class with two or more is held out once; classes and folds are as even as they can be."""
    full = image_list([41, 12, 3, 2, 1])
    held = [hold_out(full, 0.1, f"{fold}/5") for fold in range(1, 6)]
    together = sorted(number for _, validation in held for number in numbers(validation))
    assert together == sorted(numbers(full.take(np.flatnonzero(full.labels_N < 4))))
    for train, validation in held:
        assert sorted(numbers(train) + numbers(validation)) == list(range(59))
        assert min(train.class_counts) > 0
        assert validation.class_counts[0] in (8, 9)
        assert validation.class_counts[1] in (2, 3)
    for fold in ("0/5", "6/5", "1/1"):
        with pytest.raises(UserError, match=f"data.fold must be the number of a part and of all parts.*, not '{fold}'"):
            hold_out(full, 0.1, fold)


@pytest.mark.parametrize("fold", ["", "1/3", "3/3"])
def test_groups_stay_together(fold, tmp_path):
    """Frames of one film: their pictures are nearly the same."""
    for label, name in enumerate(("ant", "bee", "rare")):
        films = 12 if label < 2 else 1
        draw_folder(tmp_path, {f"{name}/film{label * 20 + film}_": 0 for film in range(films)})
        for film in range(films):
            draw_folder(tmp_path, {f"{name}/film{label * 20 + film}": 3 + film % 3})
    parts = open_data(Data(str(tmp_path), group_by=r"film(\d+)/", holdout=0.25, fold=fold))
    groups = [set(part.groups_N) for part in (parts.train, parts.validation)]
    assert not groups[0] & groups[1]
    assert len(groups[0] | groups[1]) == 25
    assert parts.train.class_counts[2] == 3, "a class of one group is not held out"
    assert all(0.15 < count / 47 < 0.45 for count in parts.validation.class_counts[:2])


def test_more_groups_than_images_of_a_class(tmp_path):
    """Small data in pairs: there are groups for twenty parts, but no class has twenty images."""
    draw_folder(tmp_path, {f"{name}/{pair}": 2 for name in "abc" for pair in range(6)})
    parts = open_data(Data(str(tmp_path), group_by=r"./\d", holdout=0.25))
    assert not set(parts.train.groups_N) & set(parts.validation.groups_N)
    assert 0 < len(parts.validation) < 18


def test_refused_groups(tmp_path):
    draw_folder(tmp_path, {"ant": 4, "bee": 4})
    with pytest.raises(UserError, match=r"group_by = 'film' finds nothing in ant/0.png; it must match every path"):
        opened(tmp_path, group_by="film")
    with pytest.raises(UserError, match=r"group_by = '\(x\)\?' finds nothing in ant/0.png"):
        opened(tmp_path, group_by="(x)?")
    assert set(opened(tmp_path, group_by="(ant)|(bee)").train.groups_N) == {"ant", "bee"}
    with pytest.raises(UserError, match=r"no column and no regular expression: '\(' \(missing \), unterminated"):
        opened(tmp_path, group_by="(")
    with pytest.raises(UserError, match="its images are of 1 group, those of a class 4 at most: too few for 2 parts"):
        opened(tmp_path, group_by="png", holdout=0.1)
    with pytest.raises(UserError, match="no class has images of two groups"):
        opened(tmp_path, group_by="^...", fold="1/2")
    with pytest.raises(UserError, match="has no column 'film', and its images have no paths"):
        grouped(image_list([2, 2]), "film")


def test_a_fold_of_data_with_a_validation_part(tmp_path):
    draw_folder(tmp_path, {f"{part}/{name}": 2 for part in ("train", "val") for name in ("ant", "bee")})
    with pytest.raises(UserError, match=r"has a validation part: train on that, without data.fold = 1/2"):
        opened(tmp_path, fold="1/2")
