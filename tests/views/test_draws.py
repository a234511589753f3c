"""Random numbers: reproducible wherever they are computed, and uniform."""

import numpy as np

from equipoise.views.draws import Numbers, draws, permutation, sampled_counts


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
