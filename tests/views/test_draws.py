"""Random numbers: reproducible wherever they are computed, and uniform."""

import numpy as np
import pytest

from equipoise.views.draws import Numbers, draws, mixing, permutation, sampled_counts, second_draws
from equipoise.views.views import ViewSettings


def uniforms(seed: int, epoch: int, indices: np.ndarray, stream: int, count: int) -> np.ndarray:
    return Numbers(seed, epoch, indices, stream).take(count)


def test_depend_on_the_image_and_not_on_the_batch():
    together = uniforms(3, 5, np.arange(100), 1, 8)
    apart = np.concatenate([uniforms(3, 5, np.array([index]), 1, 8) for index in range(100)])
    assert (together == apart).all()
    assert (uniforms(3, 5, np.arange(100)[::-1], 1, 8) == together[::-1]).all()
    in_turn = Numbers(3, 5, np.arange(100), 1)
    assert (np.stack([*in_turn.take(3).T, in_turn.next(), *in_turn.take(4).T], axis=1) == together).all()


def test_differ_by_seed_epoch_stream_and_image():
    base = uniforms(0, 0, np.arange(50), 0, 4)
    for seed, epoch, stream in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**31 - 1, 0, 0)]:
        other = uniforms(seed, epoch, np.arange(50), stream, 4)
        assert not (other == base).any()
    assert len(np.unique(base)) == base.size


def test_uniform_and_uncorrelated():
    """Mean, variance, ten equal bins, and neighbours in every direction; bounds are five standard errors."""
    numbers = np.stack([uniforms(0, epoch, np.arange(1000), 0, 32) for epoch in range(4)])
    count = numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * np.sqrt(1 / 12 / count)
    assert abs(numbers.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / count)
    bins = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert (abs(bins - count / 10) < 5 * np.sqrt(count * 0.09)).all()
    centred = numbers - 0.5
    for axis in range(3):
        ahead = np.roll(centred, 1, axis=axis)
        assert abs((centred * ahead).mean()) < 5 / 12 / np.sqrt(count)


def test_permutation():
    assert sorted(permutation(0, 0, 100)) == list(range(100))
    assert (permutation(0, 0, 100) == permutation(0, 0, 100)).all()
    assert (permutation(0, 1, 100) != permutation(0, 0, 100)).any()


def test_the_progressive_sampler_goes_from_the_images_to_the_classes():
    """The shares of Kang et al. (eq. 3) in each of ten epochs, and what is drawn, within five standard errors."""
    counts, epochs = np.array([400, 80, 16, 4]), 10
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    for epoch in range(epochs):
        expected = (1 - epoch / epochs) * counts / 500 + epoch / epochs / 4
        assert np.allclose(sampled_counts(counts.tolist(), "progressive", epoch / epochs) / 500, expected)
        drawn = [draws(seed, epoch, labels, "progressive", epochs) for seed in range(20)]
        shares = np.bincount(labels[np.concatenate(drawn) % 500]) / 10_000
        assert (abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / 10_000)).all()


def test_samplers_draw_classes_as_often_as_they_say():
    """The shares of the classes, within five standard errors of what the paper's formula gives; every draw its own."""
    counts = np.array([400, 80, 16, 4])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    assert (draws(3, 1, labels, "instance") == permutation(3, 1, 500)).all()
    for sampler, power in (("square-root", 0.5), ("class-balanced", 0.0)):
        expected = counts**power / (counts**power).sum()
        assert np.allclose(
            sampled_counts(counts.tolist(), sampler) / sampled_counts(counts.tolist(), sampler).sum(), expected
        )
        epochs = [draws(0, epoch, labels, sampler) for epoch in range(20)]
        shares = np.bincount(labels[np.concatenate(epochs) % 500]) / 10_000
        assert (abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / 10_000)).all()
        assert (draws(0, 7, labels, sampler) == epochs[7]).all()
        seen: dict[int, int] = {}
        for draw in epochs[0].tolist():  # the slow count of how often the image came before
            assert draw // 500 == seen.get(draw % 500, 0)
            seen[draw % 500] = seen.get(draw % 500, 0) + 1
        assert max(seen.values()) > 1


# ---- mixed images: where and how much, against formulas and laws. Pixels: test_loader.py

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
