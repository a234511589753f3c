"""Intervals against scipy, closed forms and a slow loop that resamples image by image."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from equipoise.evaluation.metrics import GROUPS, Predictions, bootstrap, figure_weights, score, wilson

COUNTS = (500, 120, 80, 30, 12, 7, 3)  # training images: two classes of many, two of medium, three of few


def case(seed: int, images=(60, 40, 50, 30, 25, 3, 2)) -> Predictions:
    """Predictions that are right for 70 % of the images of each class."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(images)), images))
    wrong = (labels + generator.integers(1, len(images), len(labels))) % len(images)
    said = np.where(generator.random(len(labels)) < 0.7, labels, wrong)
    return Predictions(labels, said[:, None], np.full(len(labels), 0.5))


def resampled(values_N, labels_N, weights_C, replicates=1500):
    """The interval by a loop over replicates and classes: of the n images of a class, n - 1 are drawn."""
    generator, found = np.random.default_rng(7), []
    of_class = [values_N[labels_N == label] for label in range(len(weights_C))]
    for _ in range(replicates):
        means = [generator.choice(values, max(1, len(values) - 1)).mean() for values in of_class]
        found.append(np.average(means, weights=weights_C))
    return np.percentile(found, [2.5, 97.5])


@pytest.mark.parametrize("images", [1, 3, 50, 24426])
def test_wilson_is_that_of_scipy(images):
    hits = np.unique(np.linspace(0, images, 6).astype(int))
    expected = [binomtest(int(k), images).proportion_ci(method="wilson") for k in hits]
    found = wilson(hits / images, np.full(len(hits), images))
    assert found == pytest.approx(np.array([(of.low, of.high) for of in expected]), abs=1e-12)
    assert wilson(hits[-1] / images, images) == pytest.approx(found[-1])


@pytest.mark.parametrize("figure", ["top1", "mean_per_class", "few"])
def test_the_bootstrap_is_a_loop_over_images(figure):
    made = case(0)
    labels, right = made.labels_N, made.ranked_NK[:, 0] == made.labels_N
    weights = figure_weights(np.bincount(labels), COUNTS)
    counts = np.stack([np.bincount(labels[right == value], minlength=7) for value in (False, True)], 1)
    expected = resampled(right.astype(float), labels, weights[figure])
    width = expected[1] - expected[0]
    assert bootstrap(counts, np.array([0.0, 1.0]), weights)[figure] == pytest.approx(expected, abs=0.06 * width)


def test_the_bootstrap_of_more_values_is_a_loop_over_images():
    """As of differences between the means over three seeds; a class that weighs nothing counts nothing."""
    generator = np.random.default_rng(1)
    labels, kinds = np.repeat(np.arange(4), (30, 12, 5, 9)), generator.integers(0, 7, 56)
    values, weights = np.arange(-3, 4) / 3, np.array([3, 1, 2, 0])
    counts = np.zeros((4, 7), np.int64)
    np.add.at(counts, (labels, kinds), 1)
    expected = resampled(values[kinds], labels, weights)
    width = expected[1] - expected[0]
    assert bootstrap(counts, values, {"": weights})[""] == pytest.approx(expected, abs=0.06 * width)


@pytest.mark.parametrize("classes", [2, 150])
def test_the_bootstrap_of_many_images_is_normal(classes):
    """Mean ± 1.96 sqrt(sum of w² p (1 - p) / (n - 1)), of more classes than are resampled at a time too."""
    generator = np.random.default_rng(2)
    images, weights = generator.integers(200, 400, classes), generator.integers(1, 5, classes)
    hits = generator.binomial(images, 0.8)
    shares, parts = hits / images, weights / weights.sum()
    half = 1.96 * np.sqrt((parts**2 * shares * (1 - shares) / (images - 1)).sum())
    low, high = bootstrap(np.stack([images - hits, hits], 1), np.array([0.0, 1.0]), {"": weights})[""]
    assert (low, high) == pytest.approx((parts @ shares - half, parts @ shares + half), abs=0.1 * half)


def test_few_images_a_class_do_not_make_it_too_narrow():
    """Six hundred classes of three images, which are right with probability 0.6: the width is that of their mean."""
    hits = np.random.default_rng(3).binomial(3, 0.6, 600)
    low, high = bootstrap(np.stack([3 - hits, hits], 1), np.array([0.0, 1.0]), {"": np.ones(600, int)})[""]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.6 * 0.4 / 3 / 600), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_weights_make_the_means_from_the_classes(seed):
    made = case(seed, (9, 0, 5, 0, 3, 8, 1))
    scored = score(made, COUNTS, 7)
    weights = figure_weights(np.bincount(made.labels_N, minlength=7), COUNTS)
    for figure in ("top1", "mean_per_class", *GROUPS):
        shares = np.array([share or 0 for share in scored["per_class"]])
        assert np.average(shares, weights=weights[figure]) == pytest.approx(scored[figure])
    assert list(figure_weights(np.array([3, 0]), (500, 3))) == ["top1", "mean_per_class", "many"]
    assert list(figure_weights(np.array([3, 0]), ())) == ["top1", "mean_per_class"]


def test_every_accuracy_lies_in_its_interval():
    made = case(4)
    scored = score(made, COUNTS, 7)
    found, of_classes = scored["intervals"], scored["per_class_intervals"]
    assert json.loads(json.dumps(found)) == found
    for figure in ("top1", "mean_per_class", *GROUPS):
        assert found[figure][0] < scored[figure] < found[figure][1]
    for share, (low, high) in zip(scored["per_class"], of_classes, strict=True):
        assert low <= share <= high
    right = int((made.ranked_NK[:, 0] == made.labels_N).sum())
    exact = binomtest(right, len(made.labels_N)).proportion_ci(method="wilson")
    assert found["top1"] == pytest.approx([exact.low, exact.high], abs=1e-4)


def test_a_mean_of_classes_has_the_images_by_which_it_varies():
    """By hand: classes of 40 and 60 images count alike, as 48 of one kind do twice; a class without images has none."""
    labels = np.repeat([0, 2, 3, 4, 6], (50, 40, 60, 20, 10))
    said = labels.copy()
    said[:5] = 1  # of class 0
    said[150:155] = 1  # of class 4; 6 is all right
    scored = score(Predictions(labels, said[:, None], np.ones(len(labels))), COUNTS, 7)
    found, of_classes = scored["intervals"], scored["per_class_intervals"]
    assert found["many"] == of_classes[0] == pytest.approx(wilson(0.9, 50), abs=1e-4)
    assert found["medium"] == pytest.approx(wilson(1.0, 96), abs=1e-4)  # 1 / (1/4/40 + 1/4/60)
    assert found["few"] == pytest.approx(wilson(0.875, 80 / 3), abs=1e-4)  # 1 / (1/4/20 + 1/4/10)
    assert found["top1"] == pytest.approx(wilson(17 / 18, 180), abs=1e-4)
    assert [label for label, of in enumerate(of_classes) if of is None] == [1, 5]
    unknown = score(Predictions(labels, said[:, None], np.ones(len(labels))), (), 7)
    assert list(unknown["intervals"]) == ["top1", "mean_per_class"]


@pytest.mark.parametrize(
    ("images", "shares"),
    [
        ((1000, 5), (1.0, 0.8)),
        ((12, 8, 3, 2, 1), (0.9, 0.8, 0.7, 0.6, 0.5)),
        ((3, 3, 3, 3, 3), (0.9, 0.8, 0.7, 0.6, 0.5)),
        ((50, 50, 50, 50, 50), (0.98,) * 5),
        ((50, 50, 50, 50, 50), (1.0, 0.9, 0.7, 0.4, 0.2)),
        ((60, 5, 5), (0.9, 0.7, 0.5)),
    ],
)
def test_intervals_cover_what_they_say(images, shares):
    """How often the interval of the mean over classes holds the true one: in 500 draws, 90 to 99.9 percent."""
    generator, labels, covered = np.random.default_rng(6), np.repeat(np.arange(len(images)), images), 0
    for _ in range(500):
        right = generator.random(len(labels)) < np.array(shares)[labels]
        said = np.where(right, labels, (labels + 1) % len(images))[:, None]
        scored = score(Predictions(labels, said, np.ones(len(labels))), (), len(images))
        low, high = scored["intervals"]["mean_per_class"]
        covered += low - 1e-4 <= np.mean(shares) <= high + 1e-4
    assert 450 <= covered < 500


def test_neither_the_order_of_images_nor_the_time_changes_them():
    made, order = case(5), np.random.default_rng(0).permutation(210)
    shuffled = Predictions(made.labels_N[order], made.ranked_NK[order], made.confidence_N)
    first, again, other = (score(of, COUNTS, 7) for of in (made, made, shuffled))
    for name in ("intervals", "per_class_intervals"):
        assert first[name] == again[name] == other[name]
