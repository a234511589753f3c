"""Predictions, labels and training counts become the figures of the field, and those that it leaves out.

Shapes: N images, C classes, K ranked classes of an image. All figures are fractions. `None` is "there is nothing to
average", which is not the same as 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

MANY_ABOVE = 100  # Liu et al., CVPR 2019: many > 100 training images, few < 20, medium between, both ends inclusive
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")
GROUP_LIMITS = {
    "many": f"more than {MANY_ABOVE}",
    "medium": f"{FEW_BELOW} to {MANY_ABOVE}",
    "few": f"fewer than {FEW_BELOW}",
}
FURTHER = {  # what else is shown beside top-1 and the groups: in words, and its field of `Scores`
    "top-5": "top5",
    "mean over classes": "mean_per_class",
    "worst tenth of classes": "worst_tenth",
    "worst class": "worst_class",
    "macro F1": "macro_f1",
    "calibration error": "ece",
}
TAUS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # strengths of the post-hoc prior
_BINS = 15

Labels = npt.NDArray[np.int64]
Fractions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What a network says of the N images of a list.

    `ranked_NK`: the (at most five) classes of highest logits, best first. `confidence_N`: the softmax probability of
    the best. `adjusted`: for each tau of `TAUS` the argmax of `logits - tau * log prior`; empty where the prior is not
    known. `logits_NC`: where they were asked for.
    """

    labels_N: Labels
    ranked_NK: Labels
    confidence_N: Fractions
    adjusted: Mapping[float, Labels] = field(default_factory=dict[float, Labels])
    logits_NC: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Scores:
    """The figures of a list.

    `top5` is None where five classes or fewer make it always right. `many`, `medium`, `few` and `mean_per_class` are
    means of per-class accuracy. `macro_f1`: the mean F1 over the classes that have images. `worst_tenth`: the mean over
    the tenth of these classes (rounded up) with the lowest accuracy. `ece`: expected calibration error of the top class
    over 15 bins of equal width (Guo et al., ICML 2017).
    """

    images: int
    top1: float
    top5: float | None
    mean_per_class: float
    many: float | None
    medium: float | None
    few: float | None
    macro_f1: float
    worst_class: float
    worst_tenth: float
    ece: float
    per_class: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "per_class": list(self.per_class)}


def shot_group(train_count: int) -> str:
    """'many', 'medium' or 'few' by the number of training images of the class."""
    if train_count > MANY_ABOVE:
        return "many"
    return "few" if train_count < FEW_BELOW else "medium"


def score(predictions: Predictions, train_counts_C: Sequence[int] | None, classes: int) -> Scores:
    """All figures of the predictions.

    `train_counts_C` are the training images of each class, which decide its shot group; without them there are no
    groups. A class without test images has no accuracy and enters no mean. Raises ValueError on an empty set or a label
    outside the classes.
    """
    labels_N, ranked_NK = predictions.labels_N, predictions.ranked_NK
    if len(labels_N) == 0:
        raise ValueError("there are no images to score")
    if labels_N.min() < 0 or labels_N.max() >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}")
    best_N = ranked_NK[:, 0]
    hits_C, seen_C, accuracy_C = _class_accuracy(labels_N, best_N, classes)
    said_C, present_C = np.bincount(best_N, minlength=classes), seen_C > 0
    ascending = np.sort(accuracy_C[present_C])
    f1_C = 2 * hits_C[present_C] / (seen_C + said_C)[present_C]  # 2 TP / (2 TP + FP + FN)
    return Scores(
        images=len(labels_N),
        top1=float((best_N == labels_N).mean()),
        top5=float((ranked_NK == labels_N[:, None]).any(1).mean()) if classes > 5 else None,
        mean_per_class=float(ascending.mean()),
        **_group_means(accuracy_C, train_counts_C),
        macro_f1=float(f1_C.mean()),
        worst_class=float(ascending[0]),
        worst_tenth=float(ascending[: math.ceil(len(ascending) / 10)].mean()),
        ece=calibration_error(predictions.confidence_N, best_N == labels_N),
        per_class=tuple(None if math.isnan(share) else share for share in accuracy_C.tolist()),
    )


def _class_accuracy(labels_N: Labels, said_N: Labels, classes: int) -> tuple[Labels, Labels, Fractions]:
    """Of each class: the images that are told rightly, all of its images, and their share; NaN without images."""
    hits_C = np.bincount(labels_N[said_N == labels_N], minlength=classes)
    seen_C = np.bincount(labels_N, minlength=classes)
    return hits_C, seen_C, np.divide(hits_C, seen_C, out=np.full(classes, np.nan), where=seen_C > 0)


def _group_means(accuracy_C: Fractions, train_counts_C: Sequence[int] | None) -> dict[str, float | None]:
    """The mean accuracy of each shot group; NaN is a class without test images."""
    if train_counts_C is None:
        return dict.fromkeys(GROUPS)
    counts_C = np.asarray(train_counts_C)
    many_C, few_C = counts_C > MANY_ABOVE, counts_C < FEW_BELOW
    groups = {"many": many_C, "medium": ~many_C & ~few_C, "few": few_C}
    there_C = ~np.isnan(accuracy_C)
    return {
        name: float(accuracy_C[group_C & there_C].mean()) if (group_C & there_C).any() else None
        for name, group_C in groups.items()
    }


def calibration_error(confidence_N: Fractions, right_N: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error: |accuracy - mean confidence| of each bin (low, high], weighted by its images."""
    # A confidence on an edge belongs to the bin below it; the first bin takes 0 too.
    bin_N = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence_N, side="left")
    gaps = np.bincount(bin_N, weights=right_N - confidence_N, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


# ---------------------------------------------------------------------------------------------- post-hoc prior


def sweep(predictions: Predictions, train_counts_C: Sequence[int]) -> list[dict[str, float | None]]:
    """Figures with the post-hoc prior: the argmax of `logits - tau * log prior` (Menon et al., ICLR 2021, section 4.1)
    for each tau of `TAUS`. tau = 0 is the prediction as it is."""
    rows: list[dict[str, float | None]] = []
    classes = len(train_counts_C)
    for tau, adjusted_N in predictions.adjusted.items():
        labels_N = predictions.labels_N
        _, _, accuracy_C = _class_accuracy(labels_N, adjusted_N, classes)
        rows.append(
            {
                "tau": tau,
                "top1": float((adjusted_N == labels_N).mean()),
                "mean_per_class": float(np.nanmean(accuracy_C)),
                **_group_means(accuracy_C, train_counts_C),
            }
        )
    return rows


def choose_tau(validation_sweep: Sequence[Mapping[str, Any]]) -> float:
    """The tau of the highest mean per-class accuracy; the smallest of those that are equal. Only ever call it with the
    sweep of a validation part: a tau that is chosen on the test part makes its figures too good."""
    return max(validation_sweep, key=lambda row: (row["mean_per_class"], -row["tau"]))["tau"]


# ---------------------------------------------------------------------------------------------- calibration

_COLDEST, _HOTTEST = 0.05, 20.0
_ROWS = 1024  # at a time: the logits of a large validation part fill memory once, not four times


def fit_temperature(
    logits_NC: npt.NDArray[np.float32], labels_N: Labels, log_prior_ratio_C: npt.NDArray[np.floating[Any]]
) -> float | None:
    """The temperature T of the smallest mean negative log-likelihood of softmax(logits / T + log prior ratio) (Guo et
    al., ICML 2017, section 4.2). Only ever call it with a validation part.

    `log_prior_ratio_C`: log of each class's share of these images over the prior that the logits are for; zeros where
    the two agree, -inf for a class without images. Without it a temperature would be bent to make up for the shares.

    None where nothing between 0.05 and 20 is the minimum: of images that are all classified right, the smaller T the
    better; of logits that say nothing, the larger.
    """
    from scipy.optimize import root_scalar  # a quarter of a second, needed here alone

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
