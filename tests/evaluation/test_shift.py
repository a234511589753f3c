"""Other class priors: against resampled images, slow loops, and Gaussians whose prior is known."""

import math

import numpy as np
import pytest

from equipoise.evaluation.shift import estimate_prior, label_shift, shifted_priors

COUNTS = (20, 300, 5, 60)


def test_shifted_priors_by_hand():
    priors = shifted_priors(COUNTS)
    for prior_C in priors.values():
        assert prior_C.sum() == pytest.approx(1)
    assert len(priors) == 5 + 1 + 5 + 20
    steps = np.array([2, 0, 3, 1]) / 3  # the second class has the most training images
    for factor in (2, 5, 10, 25, 50):
        for name, sign in (("forward", -1), ("backward", 1)):
            prior_C = priors[f"{name} {factor}"]
            expected = [factor ** (sign * step) for step in steps]
            assert prior_C == pytest.approx(np.array(expected) / sum(expected))
            assert prior_C.max() / prior_C.min() == pytest.approx(factor)
    assert (priors["uniform"] == 0.25).all()
    assert (shifted_priors(COUNTS)["draw 7"] == priors["draw 7"]).all(), "the same every time"
    assert shifted_priors([3])["forward 50"].tolist() == [1]
    absent = shifted_priors([20, 0, 5])["backward 10"]
    assert absent.tolist() == pytest.approx([1 / 11, 0, 10 / 11])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_label_shift_is_the_accuracy_on_resampled_images(temperature):
    """By a loop in which each image counts as often as makes the shares those of the prior. The third class has no
    images."""
    generator = np.random.default_rng(0)
    labels_N = generator.choice([0, 1, 3], 2500, p=[0.2, 0.5, 0.3])
    logits_NC = generator.normal(size=(2500, 4)).astype(np.float32)
    logits_NC[np.arange(2500), labels_N] += 1
    log_prior_C = np.log(np.array(COUNTS) / sum(COUNTS)) * 0.5
    rows = label_shift(logits_NC, labels_N, COUNTS, log_prior_C, temperature)
    priors = shifted_priors([20, 300, 0, 60])
    assert [row["prior"] for row in rows] == list(priors)
    for row in rows:
        prior_C = priors[row["prior"]]
        known = unknown = weight = 0.0
        for logits_C, label in zip(logits_NC.tolist(), labels_N.tolist(), strict=True):
            copies = prior_C[label] / (labels_N == label).sum()
            scores = [
                logits_C[c] / temperature - log_prior_C[c] + math.log(prior_C[c]) if prior_C[c] else -math.inf
                for c in range(4)
            ]
            unknown += copies * (logits_C.index(max(logits_C)) == label)
            known += copies * (scores.index(max(scores)) == label)
            weight += copies
        assert weight == pytest.approx(1)
        assert (row["unknown"], row["known"]) == pytest.approx((unknown, known)), row["prior"]


def test_a_known_prior_is_worth_what_bayes_rule_says():
    """Two Gaussians at -1 and 1, equally frequent in training: the rate of Bayes' classifier under any prior."""
    from scipy.stats import norm

    generator = np.random.default_rng(1)
    labels_N = np.repeat([0, 1], 200_000)
    x_N = generator.normal(2 * labels_N - 1)
    logits_NC = np.stack([-((x_N + 1) ** 2) / 2, -((x_N - 1) ** 2) / 2], axis=1).astype(np.float32)
    rows = {row["prior"]: row for row in label_shift(logits_NC, labels_N, (200, 10), np.zeros(2))}
    for name, p in (("forward 10", 10 / 11), ("uniform", 1 / 2), ("backward 50", 1 / 51)):
        edge = math.log(p / (1 - p)) / 2  # of Bayes' classifier
        assert rows[name]["known"] == pytest.approx(p * norm.cdf(edge + 1) + (1 - p) * norm.sf(edge - 1), abs=2e-3)
        assert rows[name]["unknown"] == pytest.approx(norm.cdf(1), abs=2e-3)
    assert rows["uniform"]["known"] == rows["uniform"]["unknown"]


@pytest.mark.parametrize("prior", [(0.7, 0.25, 0.05), (0.02, 0.08, 0.9), (1 / 3, 1 / 3, 1 / 3)])
def test_the_prior_of_gaussians_is_recovered(prior):
    """From log densities, to each row of which any number may be added."""
    generator = np.random.default_rng(2)
    labels_N = generator.choice(3, 100_000, p=prior)
    x_N1 = generator.normal(1.5 * labels_N)[:, None]
    scores_NC = -((x_N1 - 1.5 * np.arange(3)) ** 2) / 2 + generator.normal(0, 300, x_N1.shape)
    assert estimate_prior(scores_NC) == pytest.approx(np.array(prior), abs=0.01)


def test_the_estimate_is_the_most_probable_prior():
    """Against a search on the simplex for the maximum of the likelihood times one image more of each class."""
    from scipy.optimize import minimize

    scores_NC = np.random.default_rng(3).normal(0, 2, (40, 4))

    def loss(free):
        prior_C = np.exp(np.append(free, 0)) / np.exp(np.append(free, 0)).sum()
        return -np.log(np.exp(scores_NC) @ prior_C).sum() - np.log(prior_C).sum()

    free = minimize(loss, np.zeros(3), tol=1e-12).x
    expected = np.exp(np.append(free, 0)) / np.exp(np.append(free, 0)).sum()
    assert estimate_prior(scores_NC) == pytest.approx(expected, abs=1e-5)


def test_what_few_images_say_of_the_prior():
    """Nothing without images; of sure ones, their shares with one more of each class; numbers however large."""
    assert estimate_prior(np.empty((0, 4))).tolist() == [0.25] * 4
    sure = np.array([[2000.0, 0, 0]] * 3 + [[0, 0, 2000.0]])
    assert estimate_prior(sure) == pytest.approx(np.array([4, 1, 2]) / 7)
