"""Predictions, labels and training counts become the metrics of the field, and those that it mostly leaves out.

Shapes: N images, C classes, K ranked classes of an image. All metrics are fractions. None means that there is nothing
to average, which is not the same as 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.runs.records import Means, PartMetrics, PriorRow

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
    "macro F1": "macro_f1",
    "calibration error": "ece",
}
TAUS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # strengths of the post-hoc prior
BINS = 15

Labels = npt.NDArray[np.int64]
Fractions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What a network predicts for the N images of a list.

    `ranked_NK`: the (at most five) classes of highest logits, best first. `confidence_N`: the softmax probability of
    the best. `adjusted`: for each tau of `TAUS` the argmax of `logits - tau * log prior`; empty where the prior is not
    known. `logits_NC`: None unless they were asked for.
    """

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


def score(predictions: Predictions, train_counts_C: Sequence[int] | None, classes: int) -> PartMetrics:
    """All metrics of the predictions.

    `train_counts_C` are the training images of each class, which decide its shot group; without them there are no
    groups. A class without test images has no accuracy and enters no mean.
    """
    labels_N, ranked_NK = predictions.labels_N, predictions.ranked_NK
    best_N = ranked_NK[:, 0]
    means, accuracy_C = _means(labels_N, best_N, train_counts_C, classes)
    present_C = ~np.isnan(accuracy_C)
    ascending = np.sort(accuracy_C[present_C])
    hits_C, predicted_C, seen_C = (
        np.bincount(labels, minlength=classes)[present_C] for labels in (labels_N[best_N == labels_N], best_N, labels_N)
    )
    return {
        **means,
        "images": len(labels_N),
        "top5": float((ranked_NK == labels_N[:, None]).any(1).mean()) if classes > 5 else None,
        "macro_f1": float((2 * hits_C / (seen_C + predicted_C)).mean()),  # 2 TP / (2 TP + FP + FN)
        "worst_class": float(ascending[0]),
        "worst_tenth": float(ascending[: math.ceil(len(ascending) / 10)].mean()),
        "ece": calibration_error(predictions.confidence_N, best_N == labels_N),
        "per_class": [None if math.isnan(share) else share for share in accuracy_C.tolist()],
        "prior_sweep": sweep(predictions, train_counts_C) if train_counts_C and predictions.adjusted else None,
    }


def _means(
    labels_N: Labels, predicted_N: Labels, train_counts_C: Sequence[int] | None, classes: int
) -> tuple[Means, Fractions]:
    """Accuracy over all images, over the classes and over those of each shot group; and of each class, NaN for one
    without images."""
    hits_C = np.bincount(labels_N[predicted_N == labels_N], minlength=classes)
    seen_C = np.bincount(labels_N, minlength=classes)
    accuracy_C = np.divide(hits_C, seen_C, out=np.full(classes, np.nan), where=seen_C > 0)
    groups_C = np.array([shot_group(count) for count in train_counts_C or ()] or [""] * classes)

    def mean(group: str) -> float | None:
        known = accuracy_C[(groups_C == group) & ~np.isnan(accuracy_C)]
        return float(known.mean()) if known.size else None

    means: Means = {
        "top1": float((predicted_N == labels_N).mean()),
        "mean_per_class": float(np.nanmean(accuracy_C)),
        "many": mean("many"),
        "medium": mean("medium"),
        "few": mean("few"),
    }
    return means, accuracy_C


def calibration_error(confidence_N: Fractions, right_N: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error: |accuracy - mean confidence| of each bin (low, high], weighted by its images."""
    # A confidence on an edge belongs to the bin below it; the first bin takes 0 too.
    bin_N = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence_N, side="left")
    gaps = np.bincount(bin_N, weights=right_N - confidence_N, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


def sweep(predictions: Predictions, train_counts_C: Sequence[int]) -> list[PriorRow]:
    """Accuracy with the post-hoc prior: the argmax of `logits - tau * log prior` (Menon et al., ICLR 2021, section 4.1)
    for each tau of `TAUS`. tau = 0 is the prediction as it is."""
    return [
        {"tau": tau, **_means(predictions.labels_N, adjusted_N, train_counts_C, len(train_counts_C))[0]}
        for tau, adjusted_N in predictions.adjusted.items()
    ]


def choose_tau(validation_sweep: Sequence[PriorRow]) -> PriorRow:
    """The row of the highest mean per-class accuracy; of equal ones, that of the smallest tau. Only ever call it with
    the sweep of a validation part: a tau that is chosen on the test part makes the test metrics too good."""
    return max(validation_sweep, key=lambda row: (row["mean_per_class"], -row["tau"]))


_COLDEST, _HOTTEST = 0.05, 20.0
_ROWS = 1024  # at a time, so that the logits of a large validation part are not copied as a whole


def fit_temperature(
    logits_NC: npt.NDArray[np.float32], labels_N: Labels, log_prior_ratio_C: npt.NDArray[np.floating[Any]]
) -> float | None:
    """The temperature T of the smallest mean negative log-likelihood of softmax(logits / T + log prior ratio) (Guo et
    al., ICML 2017, section 4.2). Only ever call it with a validation part.

    `log_prior_ratio_C`: log of each class's share of these images over the prior that the logits are for; zeros where
    the two agree, -inf for a class without images.

    None where no temperature between 0.05 and 20 is the minimum: if all images are classified right, a smaller T is
    always better; if the logits say nothing, a larger one is.
    """
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

    if not slope(1 / _HOTTEST) < 0 < slope(1 / _COLDEST):
        return None
    return 1 / float(root_scalar(slope, bracket=(1 / _HOTTEST, 1 / _COLDEST), rtol=1e-6).root)


def percent(share: float | None, absent: str = "-") -> str:
    """A share as people read it: '83.1'; `absent` where there is none."""
    return absent if share is None else f"{100 * share:.1f}"
