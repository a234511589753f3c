"""Predictions, labels and training counts become the metrics of the field, and those that it mostly leaves out; with
95 % intervals over test images, which tell how far other images would move them, not how far other seeds.

Shapes: N images, C classes, K ranked classes of an image; V values that an image can have, G accuracies, R replicates.
All metrics are fractions. None means that there is nothing to average, which is not the same as 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from equipoise.runs.records import Means, PartMetrics, PostHocPrior

MANY_ABOVE = 100  # Liu et al., CVPR 2019: many > 100 training images, few < 20, medium between, both ends inclusive
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")
GROUP_LIMITS = {
    "many": f"more than {MANY_ABOVE}",
    "medium": f"{FEW_BELOW} to {MANY_ABOVE}",
    "few": f"fewer than {FEW_BELOW}",
}
FURTHER = {  # what is shown beside top-1 and the groups: its label, and its key in `PartMetrics`
    "top-5": "top5",
    "mean over classes": "mean_per_class",
    "worst tenth of classes": "worst_tenth",
    "worst class": "worst_class",
    "few taken for many": "false_head_rate",
    "macro F1": "macro_f1",
    "calibration error": "ece",
}
ALL_FIGURES = {"top-1": "top1", **{group: group for group in GROUPS}, **FURTHER}
TAUS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # strengths of the post-hoc prior
BINS = 15
_Z, _REPLICATES = NormalDist().inv_cdf(0.975), 2000
_CLASSES = 64  # resampled at a time, so that thousands of classes take little memory

Labels = npt.NDArray[np.int64]
Fractions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What a network predicts for the N images of a list. `ranked_NK`: the (at most five) classes of highest logits,
    best first. `confidence_N`: the softmax probability of the best. `adjusted`: for each tau of `TAUS` the argmax of
    `logits - tau * log prior`; empty where the prior is not known. `logits_NC`: None unless they were asked for."""

    labels_N: Labels
    ranked_NK: Labels
    confidence_N: Fractions
    adjusted: Mapping[float, Labels] = field(default_factory=dict[float, Labels])
    logits_NC: npt.NDArray[np.float32] | None = None


def shot_group(train_count: int) -> str:
    """'many', 'medium' or 'few' by the number of training images of the class."""
    if train_count > MANY_ABOVE:
        return "many"
    return "few" if train_count < FEW_BELOW else "medium"


def score(predictions: Predictions, train_counts_C: Sequence[int], classes: int) -> PartMetrics:
    """All metrics of the predictions but `calibration`. `train_counts_C`: the training images of each class, which
    decide its shot group; empty where they are not known. A class without test images has no accuracy and enters no
    mean."""
    labels_N, best_N = predictions.labels_N, predictions.ranked_NK[:, 0]
    images_C, predicted_C = (np.bincount(of, minlength=classes) for of in (labels_N, best_N))
    weights, present_C, divisors_C = figure_weights(images_C, train_counts_C), images_C > 0, np.maximum(images_C, 1)

    def accuracies(predicted_N: Labels) -> tuple[Means, Labels]:
        hits_C = np.bincount(labels_N[predicted_N == labels_N], minlength=classes)
        known = {figure: float(np.average(hits_C / divisors_C, weights=of_C)) for figure, of_C in weights.items()}
        return cast("Means", {figure: known.get(figure) for figure in Means.__annotations__}), hits_C

    def if_present(values_C: Fractions) -> list[Any]:
        return [value if images else None for value, images in zip(values_C.tolist(), images_C, strict=True)]

    means, hits_C = accuracies(best_N)
    shares_C, f1_C = hits_C / divisors_C, 2 * hits_C[present_C] / (images_C + predicted_C)[present_C]
    ascending = np.sort(shares_C[present_C])
    counts_C = np.array(train_counts_C or [math.nan] * classes)
    many_C, of_few = counts_C > MANY_ABOVE, best_N[counts_C[labels_N] < FEW_BELOW]
    # With the post-hoc prior: the argmax of `logits - tau * log prior` (Menon et al., ICLR 2021, section 4.1).
    adjusted = predictions.adjusted.items()
    return {
        **means,
        "images": len(labels_N),
        "top5": float((predictions.ranked_NK == labels_N[:, None]).any(1).mean()) if classes > 5 else None,
        "macro_f1": float(f1_C.mean()),
        "worst_class": float(ascending[0]),
        "worst_tenth": float(ascending[: math.ceil(len(ascending) / 10)].mean()),
        "false_head_rate": float(many_C[of_few].mean()) if of_few.size and many_C.any() else None,
        "ece": calibration_error(predictions.confidence_N, best_N == labels_N),
        "per_class": if_present(shares_C),
        "intervals": {figure: _interval(shares_C, of_C, divisors_C) for figure, of_C in weights.items()},
        "per_class_intervals": if_present(wilson(shares_C, divisors_C).round(4)),
        "prior_sweep": [{"tau": tau, **accuracies(adjusted_N)[0]} for tau, adjusted_N in adjusted] or None,
    }


def _interval(shares_C: Fractions, weights_C: Labels, images_C: Labels) -> list[float]:
    """Wilson's of a mean with weights q, for 1 / sum(q^2 / n) images, as it varies like the share of so many where all
    classes are alike. For top-1 these are all images. How often the truth is covered: `test_intervals.py`."""
    parts_C = weights_C / weights_C.sum()
    alike = 1 / float((parts_C**2 / images_C).sum())
    return wilson(float(parts_C @ shares_C), alike).round(4).tolist()


def figure_weights(images_C: Labels, train_counts_C: Sequence[int]) -> dict[str, Labels]:
    """The weights `[C]` by which each accuracy of `Means` that is known is a mean over classes of so many images."""
    groups_C = np.array([shot_group(count) for count in train_counts_C] or [""])
    weights = {"top1": images_C, "mean_per_class": images_C > 0}
    weights |= {group: (images_C > 0) & (groups_C == group) for group in GROUPS}
    return {figure: of_C.astype(np.int64) for figure, of_C in weights.items() if of_C.any()}


def wilson(shares: Fractions | float, images: Labels | float) -> Fractions:
    """Wilson's score interval (JASA 1927) of `shares` of so many `images`, both `[...]`: `[..., 2]`, low and high.

    >>> wilson(0.9, 50).round(3)
    array([0.786, 0.957])
    """
    scale = 1 + _Z**2 / images
    centres = (shares + _Z**2 / (2 * images)) / scale
    halves = _Z * np.sqrt(shares * (1 - shares) / images + (_Z / (2 * images)) ** 2) / scale
    return np.stack([centres - halves, centres + halves], -1).clip(0, 1)


def bootstrap(counts_CV: Labels, values_V: Fractions, weights: Mapping[str, Labels]) -> dict[str, Fractions]:
    """Percentile intervals `[2]` of weighted means over classes of the mean value of their images, resampled within
    the class, from a fixed seed. `counts_CV`: how many images of a class have the value. Images of one class and value
    are alike: resampling is a multinomial draw a class. Of n images n - 1 are drawn: only so is the variance unbiased
    (Rao and Wu, JASA 1988); n draws of n = 3 show two thirds. One image shows none."""
    generator = np.random.default_rng(0)
    weights_GC = np.stack([of_C / of_C.sum() for of_C in weights.values()])
    means_GR = np.zeros((len(weights), _REPLICATES))
    for start in range(0, len(counts_CV), _CLASSES):
        rows = slice(start, start + _CLASSES)
        images_C1 = counts_CV[rows].sum(1, keepdims=True)
        drawn_C1, shares_CV = np.maximum(images_C1 - 1, 1), counts_CV[rows] / np.maximum(images_C1, 1)
        draws_CRV = generator.multinomial(drawn_C1, shares_CV[:, None], (len(drawn_C1), _REPLICATES))
        means_GR += weights_GC[:, rows] @ (draws_CRV @ values_V / drawn_C1)
    return dict(zip(weights, np.percentile(means_GR, [2.5, 97.5], axis=1).T, strict=True))


def calibration_error(confidence_N: Fractions, right_N: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error: |accuracy - mean confidence| of each bin (low, high], weighted by its images."""
    # A confidence on an edge belongs to the bin below it; the first bin takes 0 too.
    bin_N = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence_N, side="left")
    gaps = np.bincount(bin_N, weights=right_N - confidence_N, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


def post_hoc_prior(validation: PartMetrics | None, test: PartMetrics | None) -> PostHocPrior | None:
    """The strength of the post-hoc prior with the highest mean per-class accuracy on the validation part, of equal ones
    the smallest, and what it gives on each part. Chosen on the test part, it would make the test metrics too good."""
    if validation is None or validation["prior_sweep"] is None:
        return None
    best = max(validation["prior_sweep"], key=lambda row: row["mean_per_class"])  # the first of equal ones
    post_hoc: PostHocPrior = {"tau": best["tau"], "chosen_on": "validation", "validation": best}
    if test is not None:
        post_hoc["test"] = next(row for row in test["prior_sweep"] or () if row["tau"] == best["tau"])
    return post_hoc


_ROWS = 1024  # at a time, so that the logits of a large validation part are not copied as a whole


def fit_temperature(
    logits_NC: npt.NDArray[np.float32], labels_N: Labels, log_prior_ratio_C: npt.NDArray[np.floating[Any]]
) -> float | None:
    """The temperature T of the smallest mean negative log-likelihood of softmax(logits / T + log prior ratio) (Guo et
    al., ICML 2017, section 4.2). Only ever call it with a validation part. `log_prior_ratio_C`: log of each class's
    share of these images over the prior that the logits are for; -inf for a class without images. None where no
    temperature between 0.05 and 20 is the minimum: if all images are classified right, a smaller T is always better; if
    the logits say nothing, a larger one is."""
    from scipy.optimize import root_scalar  # takes a quarter of a second to import

    own_N = logits_NC[np.arange(len(labels_N)), labels_N].astype(np.float64)

    def slope(inverse: float) -> float:
        """The derivative of the loss by 1/T: mean over the images of E[logit] - logit of the label. The loss is convex
        in 1/T, so this rises."""
        total = -float(own_N.sum())
        for start in range(0, len(logits_NC), _ROWS):
            rows_BC = logits_NC[start : start + _ROWS].astype(np.float64)
            scores_BC = inverse * rows_BC + log_prior_ratio_C
            shares_BC = np.exp(scores_BC - scores_BC.max(1, keepdims=True))
            total += float(((shares_BC * rows_BC).sum(1) / shares_BC.sum(1)).sum())
        return total / len(logits_NC)

    bracket = 1 / 20, 1 / 0.05
    if not slope(bracket[0]) < 0 < slope(bracket[1]):
        return None
    return 1 / float(root_scalar(slope, bracket=bracket, rtol=1e-6).root)


def percent(share: float | None) -> str:
    """A share as people read it: '83.1'; '-' where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"
