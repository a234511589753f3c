"""Policies: tables and random parameters against torchvision and timm."""

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import auto_augment as timm_augment
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandomResizedCrop

from equipoise.views import policies
from equipoise.views.draws import Numbers


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 400), (500, 60)])
def test_boxes_are_those_of_random_resized_crop(height, width):
    """Every coordinate of 2,000 boxes has torchvision's distribution (Kolmogorov-Smirnov)."""
    count = 2000
    numbers = Numbers(0, 0, np.arange(count), 0)
    ours = policies.random_boxes(numbers, np.full(count, height), np.full(count, width), 0.2).T
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]).T
    for name, mine, reference in zip(("top", "left", "height", "width"), ours, theirs, strict=True):
        assert stats.ks_2samp(mine, reference).pvalue > 1e-4, name
    top, left, box_height, box_width = ours
    assert min(top.min(), left.min()) >= 0
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


def test_auto_augment_is_torchvisions_policy():
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)
    expected_policies = [tuple((name, p, magnitude or 0) for name, p, magnitude in pair) for pair in theirs.policies]
    assert list(policies.AUTO_AUGMENT) == expected_policies
    bins = np.arange(10) / 9
    for name, (magnitudes, signed) in theirs._augmentation_space(10, (32, 32)).items():
        for sign in (1.0, -1.0) if signed else (1.0,):
            ours = policies.auto_augment_arguments(bins, sign * bins, 32).get(name, 0 * bins)
            expected = magnitudes.expand(10).numpy() * sign
            if name in ("Brightness", "Color", "Contrast", "Sharpness"):
                expected = 1 + expected
            if name.startswith("Translate"):
                expected = -np.trunc(expected)  # _apply_op's int()
            assert ours == pytest.approx(expected, abs=1e-4), name


def test_rand_augment_has_timms_operations_and_arguments(monkeypatch):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: value)
    timm_name = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}
    assert [timm_name.get(name, name) for name in policies.RAND_AUGMENT] == timm_augment._RAND_TRANSFORMS
    for level in (0.0, 3.3, 7.77, 9.5, 10.0):
        ours = policies.rand_augment_arguments(np.array([level / 10]), np.array([level / 10]), 48)
        for name in policies.RAND_AUGMENT:
            to_argument = timm_augment.LEVEL_TO_ARG[timm_name.get(name, name)]
            assert (name in ours) == (to_argument is not None)
            if to_argument is not None:
                scale = 48 if name.startswith("Translate") else 1
                assert ours[name][0] == pytest.approx(to_argument(level, {})[0] * scale), name
