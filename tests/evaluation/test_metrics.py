"""Metrics against the golden file, by hand, by slow loops, and against scikit-learn."""

import math

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from equipoise.evaluation.metrics import (
    TAUS,
    Predictions,
    calibration_error,
    fit_temperature,
    post_hoc_prior,
    score,
    shot_group,
)

SINGLE = (
    "top1",
    "top5",
    "mean_per_class",
    "many",
    "medium",
    "few",
    "macro_f1",
    "worst_class",
    "worst_tenth",
    "false_head_rate",
    "ece",
)


def predictions(best, labels, confidence=None) -> Predictions:
    """Predictions of which only the first class is known."""
    best = np.asarray(best)
    confidence = np.full(len(best), 0.5) if confidence is None else np.asarray(confidence, float)
    return Predictions(np.asarray(labels), best[:, None], confidence)


def random_case(seed: int, images: int = 200, classes: int = 23) -> tuple[Predictions, np.ndarray, list[int]]:
    """Predictions from random logits, some classes without images; the logits; training counts."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes - 3, images)
    logits = generator.normal(size=(images, classes))
    logits[np.arange(images), labels] += 1.5
    counts = np.maximum(1, 300 / np.arange(1, classes + 1) ** 1.5).astype(int)
    log_prior = np.log(counts / counts.sum())
    made = Predictions(
        labels,
        np.argsort(-logits, axis=1, kind="stable")[:, :5],
        (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1),
        {tau: (logits - tau * log_prior).argmax(1) for tau in TAUS},
    )
    return made, logits, counts.tolist()


def test_shot_accuracy_golden():
    case = GOLDEN["shot_accuracy"]
    result = score(predictions(case["predictions"], case["labels"]), case["train_counts"], 6)
    assert (result["many"], result["medium"], result["few"]) == pytest.approx(
        (case["many"], case["medium"], case["few"])
    )
    assert result["per_class"] == pytest.approx(case["per_class"])
    assert result["mean_per_class"] == pytest.approx(np.mean(case["per_class"]))
    assert result["top1"] == pytest.approx(np.mean(np.array(case["predictions"]) == np.array(case["labels"])))


@pytest.mark.parametrize(("count", "group"), [(101, "many"), (100, "medium"), (20, "medium"), (19, "few"), (1, "few")])
def test_shot_group_limits(count, group):
    assert shot_group(count) == group
    scored = score(predictions([0, 1], [0, 1]), [count, count], 2)
    assert [name for name in ("many", "medium", "few") if scored[name] is not None] == [group]


def test_absent_is_not_zero():
    """No class is 'many' or 'medium', and class 1 has no test images."""
    result = score(predictions([0, 1, 2], [0, 0, 2]), [19, 5, 2], 3)
    assert result["many"] is None
    assert result["medium"] is None
    assert result["per_class"] == [0.5, None, 1.0]
    assert result["few"] == result["mean_per_class"] == 0.75
    assert result["top5"] is None, "of three classes five are always right"
    assert score(predictions([1], [1]), [500, 3], 2)["many"] is None, "its class has no test images"
    unknown = score(predictions([0, 1, 2], [0, 0, 2]), (), 3)
    assert (unknown["many"], unknown["medium"], unknown["few"]) == (None, None, None)
    assert unknown["mean_per_class"] == 0.75


def test_metrics_by_hand():
    """Ten classes with one image each, of which 3 to 9 are right; class 10 is predicted once and has none."""
    result = score(predictions([10, 0, 0, 3, 4, 5, 6, 7, 8, 9], range(10)), [1] * 11, 11)
    assert result["per_class"] == [0.0, 0.0, 0.0, *[1.0] * 7, None]
    assert (result["worst_class"], result["worst_tenth"]) == (0, 0)
    assert result["macro_f1"] == pytest.approx(0.7)
    twelve = score(predictions([0, 0, *range(2, 12), 2], [0, 1, *range(2, 12), 2]), [1] * 12, 12)
    assert twelve["worst_tenth"] == 0.5, "two of twelve classes: a tenth, rounded up"


def test_how_often_few_are_taken_for_many():
    """Of the five images of classes 2 and 3, which are few, two are said to be of 0, which is many; class 4, which is
    many too, has no images. Images of other classes do not count."""
    made = predictions([0, 0, 1, 2, 3, 4, 0], [0, 1, 2, 2, 3, 3, 3])
    assert score(made, [500, 50, 10, 5, 101], 5)["false_head_rate"] == pytest.approx(2 / 5)
    assert score(made, [100, 50, 10, 5, 100], 5)["false_head_rate"] is None, "no class is many"
    assert score(made, [500, 50, 20, 20, 101], 5)["false_head_rate"] is None, "no class is few"
    assert score(predictions([0, 1], [0, 1]), [500, 50, 3], 3)["false_head_rate"] is None, "few have no images"
    assert score(made, (), 5)["false_head_rate"] is None


@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed):
    made, logits, counts = random_case(seed)
    labels, best, classes = made.labels_N, made.ranked_NK[:, 0], len(counts)
    result = score(made, counts, classes)
    present = np.unique(labels)
    assert result["top1"] == pytest.approx(reference.accuracy_score(labels, best))
    assert result["top5"] == pytest.approx(reference.top_k_accuracy_score(labels, logits, k=5, labels=range(classes)))
    recalls = reference.recall_score(labels, best, labels=present, average=None)
    assert result["mean_per_class"] == pytest.approx(recalls.mean())
    f1 = reference.f1_score(labels, best, labels=present, average="macro", zero_division=0)
    assert result["macro_f1"] == pytest.approx(f1)
    assert result["worst_class"] == pytest.approx(recalls.min())
    assert result["worst_tenth"] == pytest.approx(np.sort(recalls)[: math.ceil(len(present) / 10)].mean())


@pytest.mark.parametrize("seed", range(3))
def test_nothing_depends_on_the_order_of_images_or_classes(seed):
    made, _, counts = random_case(seed)
    expected = score(made, counts, len(counts))
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(made.labels_N))
    shuffled = Predictions(made.labels_N[order], made.ranked_NK[order], made.confidence_N[order])
    found = score(shuffled, counts, len(counts))
    for name in SINGLE:
        assert found[name] == pytest.approx(expected[name]), name
    assert found["per_class"] == expected["per_class"]
    new = generator.permutation(len(counts))  # class c becomes class new[c]
    renamed = Predictions(new[made.labels_N], new[made.ranked_NK], made.confidence_N)
    moved = [0] * len(counts)
    for old, count in enumerate(counts):
        moved[new[old]] = count
    found = score(renamed, moved, len(counts))
    for name in SINGLE:
        assert found[name] == pytest.approx(expected[name]), name


# ---- calibration


def slow_calibration_error(confidence, right) -> float:
    total = 0.0
    for index in range(15):
        low, high = index / 15, (index + 1) / 15
        inside = [n for n, c in enumerate(confidence) if low < c <= high or (index == 0 and c == 0)]
        if inside:
            gap = np.mean([right[n] for n in inside]) - np.mean([confidence[n] for n in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_calibration_error_by_slow_loops(images):
    confidence, right = np.array([c for c, _ in images]), np.array([r for _, r in images])
    assert calibration_error(confidence, right) == pytest.approx(slow_calibration_error(confidence, right), abs=1e-12)


def test_calibration_error_by_hand():
    """Surety without fault; surety that is always wrong; an edge belongs to the bin below it."""
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    assert calibration_error(np.array([1.0, 1.0]), np.array([False, False])) == 1
    edge, right = 6 / 15, np.array([True, False])
    apart = calibration_error(np.array([edge, edge + 1e-9]), right)
    assert apart == pytest.approx(((1 - edge) + edge) / 2), "two bins: the gaps do not cancel"
    assert calibration_error(np.array([edge - 1e-9, edge]), right) == pytest.approx(abs(0.5 - edge)), "one: they do"


# ---- temperature


def slow_loss(logits, labels, shift, temperature) -> float:
    """Mean negative log-likelihood, image by image."""
    total = 0.0
    for line, label in zip(logits.astype(float), labels, strict=True):
        scores = line / temperature + shift
        total -= scores[label] - np.logaddexp.reduce(scores)
    return total / len(labels)


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_is_the_best_of_a_grid(seed):
    """With a shift by class, of which one class is impossible, and more images than one chunk."""
    generator = np.random.default_rng(seed)
    classes, images = 7, 1500
    labels = generator.integers(0, classes - 1, images)
    logits = (generator.normal(size=(images, classes)) * (seed + 1)).astype(np.float32)
    logits[np.arange(images), labels] += 1.5
    shift = np.append(generator.normal(size=classes - 1), -np.inf)
    fitted = fit_temperature(logits, labels, shift)
    assert fitted is not None
    losses = {temperature: slow_loss(logits, labels, shift, temperature) for temperature in np.geomspace(0.06, 19, 120)}
    nearest = min(losses, key=losses.__getitem__)
    assert abs(math.log(fitted / nearest)) < 0.05, "the grid has steps of 5 percent"
    best = slow_loss(logits, labels, shift, fitted)
    assert best <= min(losses.values())
    assert best <= min(slow_loss(logits, labels, shift, fitted * factor) for factor in (0.999, 1.001))


def test_the_temperature_that_was_put_in_is_found():
    """Labels drawn from the softmax of what the logits are a multiple of."""
    generator = np.random.default_rng(0)
    shift = np.log([0.6, 0.3, 0.1])
    true = generator.normal(size=(40_000, 3)) * 2
    shares = np.exp(true + shift)
    labels = (shares.cumsum(1) / shares.sum(1, keepdims=True) < generator.random((40_000, 1))).sum(1)
    assert fit_temperature((2.5 * true).astype(np.float32), labels, shift) == pytest.approx(2.5, rel=0.03)
    assert fit_temperature((0.4 * true).astype(np.float32), labels, shift) == pytest.approx(0.4, rel=0.03)
    without = fit_temperature((2.5 * true).astype(np.float32), labels, np.zeros(3))
    assert without is not None
    assert abs(math.log(without / 2.5)) > 0.15, "bent to make up for the shares"


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_no_temperature_where_nothing_is_the_minimum(sign):
    """All right: the smaller the better. All wrong, or no difference: the larger the better."""
    labels = np.arange(30) % 3
    assert fit_temperature((sign * np.eye(3)[labels]).astype(np.float32), labels, np.zeros(3)) is None


# ---- post-hoc prior


def test_sweep_by_slow_loops():
    made, logits, counts = random_case(7)
    rows = score(made, counts, len(counts))["prior_sweep"]
    assert [row["tau"] for row in rows] == list(TAUS)
    for row in rows:
        best = [
            max(range(len(counts)), key=lambda c: line[c] - row["tau"] * math.log(counts[c] / sum(counts)))
            for line in logits
        ]
        scored = score(predictions(best, made.labels_N), counts, len(counts))
        for name in ("top1", "mean_per_class", "many", "medium", "few"):
            assert row[name] == pytest.approx(scored[name]), (row["tau"], name)
    scored = score(made, counts, len(counts))
    assert rows[0]["top1"] == scored["top1"]
    assert score(predictions([0], [0]), [3, 1], 2)["prior_sweep"] is None, "without a prior there is no sweep"


def test_the_smallest_of_equal_taus_is_chosen():
    rows = [{"tau": tau, "mean_per_class": mean} for tau, mean in [(0, 0.1), (0.5, 0.4), (1, 0.4), (2, 0.3)]]
    chosen = post_hoc_prior({"prior_sweep": rows}, {"prior_sweep": [{"tau": 0.5, "mean_per_class": 0.2}]})
    assert (chosen["tau"], chosen["validation"], chosen["test"]["mean_per_class"]) == (0.5, rows[1], 0.2)
