"""Where and how much two images are mixed, against their formulas and laws. Pixels: test_loader.py."""

import numpy as np
import pytest

from equipoise.views.draws import Numbers, draws
from equipoise.views.mixing import mixing, second_draws
from equipoise.views.views import ViewSettings

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [700, 200, 100]))


def settings(mix: str, alpha: float = 1.0) -> ViewSettings:
    return ViewSettings(size=32, mix=mix, mix_alpha=alpha)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_is_from_the_beta_distribution(alpha):
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)), and the same from either end; bounds are five standard errors."""
    shares = mixing(settings("mixup", alpha), 0, 0, np.arange(20_000))[2]
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * np.sqrt(variance / 20_000)
    assert abs(shares.var() - variance) < 5 * np.sqrt(((shares - 0.5) ** 4).mean() / 20_000)
    assert abs((shares < 0.1).mean() - (shares > 0.9).mean()) < 5 * np.sqrt(0.5 / 20_000)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_boxes_are_those_of_cutmix(alpha):
    """By the slow way, from the numbers of each image; half of them have none."""
    from scipy.stats import beta

    others = np.arange(400)
    boxes, kept, shares = mixing(settings("cutmix", alpha), 3, 5, others)
    for other in others.tolist():
        quantile, paste, y, x = Numbers(3, 5, np.array([other]), 1).take(4)[0]
        half = int(32 * np.sqrt(1 - beta.ppf(quantile, alpha, alpha))) // 2
        covered = np.zeros((32, 32), bool)
        if paste < 0.5:
            for row in range(32):
                for column in range(32):
                    covered[row, column] = -half <= row - int(32 * y) < half and -half <= column - int(32 * x) < half
        top, left, bottom, right = boxes[other]
        found = np.zeros((32, 32), bool)
        found[top:bottom, left:right] = True
        assert (found == covered).all()
        assert shares[other] == pytest.approx(1 - covered.mean())
    assert (kept == 0).all()
    assert abs((shares < 1).mean() - 0.5) < 5 * np.sqrt(0.25 / 400) + 0.05  # some boxes are too small to be there


def test_second_images_have_draws_of_their_own():
    """CMO's are of all classes alike; the others' are as the sampler draws the first ones."""
    for mix, sampler, expected in [
        ("cmo", "instance", [1 / 3, 1 / 3, 1 / 3]),
        ("cutmix", "instance", [0.7, 0.2, 0.1]),
        ("mixup", "class-balanced", [1 / 3, 1 / 3, 1 / 3]),
        ("mixup", "progressive", [0.7 / 2 + 1 / 6, 0.2 / 2 + 1 / 6, 0.1 / 2 + 1 / 6]),
    ]:
        found = [second_draws(mix, seed, 2, LABELS, sampler, 4) for seed in range(10)]
        shares = np.bincount(LABELS[np.concatenate(found) % 1000]) / 10_000
        assert abs(shares - expected).max() < 5 * np.sqrt(0.25 / 10_000)
        first = draws(0, 2, LABELS, sampler, 4)
        assert not np.intersect1d(first, found[0]).size
        assert len(np.unique(found[0])) == 1000
        assert (found[0] % 1000 != first % 1000).mean() > 0.9, "in another order"
        assert (found[0] != second_draws(mix, 0, 3, LABELS, sampler, 4)).any()
