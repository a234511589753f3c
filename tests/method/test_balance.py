"""What the remedies would do, against closed forms worked out by hand."""

import math

import numpy as np
import pytest

from equipoise.method.balance import remedies


def figures(remedy: str, counts: list[int], beta: float = 0.9999) -> np.ndarray:
    return next(figures_C for name, figures_C, _ in remedies(counts, beta) if name.strip() == remedy)


def test_weights_go_by_one_over_n_with_mean_one():
    assert figures("class weights 1/n", [1, 2, 4]) == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_effective_numbers_by_the_geometric_series():
    """E_n = 1 + beta + ... + beta^(n - 1); of few images, nearly their number."""
    series = [sum(0.5**power for power in range(count)) for count in (1, 2, 3)]  # 1, 3/2, 7/4
    inverse = [1 / number for number in series]
    found = figures("by effective number", [1, 2, 3], beta=0.5)
    assert found == pytest.approx([3 * w / sum(inverse) for w in inverse])
    few = [1, 2, 4]
    assert figures("by effective number", few) == pytest.approx(figures("class weights 1/n", few), rel=1e-3)
    assert figures("by effective number", [10**6, 10**7]) == pytest.approx([1, 1])


def test_samplers():
    """Of 100 images in 2 classes, the balanced sampler takes 50 of each; by square roots, 9 : 3 as 81 : 9."""
    assert figures("class-balanced sampler", [90, 10]) == pytest.approx([50 / 90, 50 / 10])
    assert figures("square-root sampler", [81, 9]) == pytest.approx([67.5 / 81, 22.5 / 9])
    for sampler in ("class-balanced sampler", "square-root sampler"):
        assert figures(sampler, [795, 300, 112]) @ [795, 300, 112] == pytest.approx(1207)


def test_margins():
    assert figures("logit adjustment", [100, 50, 1]) == pytest.approx([0, math.log(2), math.log(100)])
