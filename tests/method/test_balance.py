"""What the remedies would do, against closed forms worked out by hand."""

import math

import pytest

from equipoise.method.balance import (
    adjusted_margins,
    draws_of_an_image,
    effective_number_weights,
    inverse_frequency_weights,
)


def test_weights_go_by_one_over_n_with_mean_one():
    assert inverse_frequency_weights([1, 2, 4]) == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_effective_numbers_by_the_geometric_series():
    """E_n = 1 + beta + ... + beta^(n - 1); of few images, nearly their number."""
    series = [sum(0.5**power for power in range(count)) for count in (1, 2, 3)]  # 1, 3/2, 7/4
    inverse = [1 / number for number in series]
    assert effective_number_weights([1, 2, 3], beta=0.5) == pytest.approx([3 * w / sum(inverse) for w in inverse])
    assert effective_number_weights([1, 2, 4]) == pytest.approx(inverse_frequency_weights([1, 2, 4]), rel=1e-3)
    assert effective_number_weights([10**6, 10**7]) == pytest.approx([1, 1])


def test_samplers():
    """Of 100 images in 2 classes, the balanced sampler takes 50 of each; by square roots, 9 : 3 as 81 : 9."""
    assert draws_of_an_image([90, 10], 0) == pytest.approx([50 / 90, 50 / 10])
    assert draws_of_an_image([81, 9], 0.5) == pytest.approx([67.5 / 81, 22.5 / 9])
    assert draws_of_an_image([81, 9], 1) == pytest.approx([1, 1])
    for power in (0, 0.5):
        counts = [795, 300, 112]
        assert sum(n * d for n, d in zip(counts, draws_of_an_image(counts, power), strict=True)) == pytest.approx(1207)


def test_margins():
    assert adjusted_margins([100, 50, 1]) == pytest.approx([0, math.log(2), math.log(100)])
