"""Class priors other than the training's: what a network is worth under them, and which one unlabelled images have.

Shapes: N images, C classes, R rows at a time. Scores are logits / T - log prior of the logits: the log of p(x|y), up to
a constant of the image (docs/probabilities.md).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.evaluation.metrics import Fractions, Labels
from equipoise.runs.records import ShiftRow

IMBALANCES = (2, 5, 10, 25, 50)
DRAWS = 20
_ROWS = 1024  # at a time, so that the logits of a large part are not copied as a whole


def shifted_priors(train_counts_C: Sequence[int] | Labels) -> dict[str, Fractions]:
    """Class priors `[C]` by name, as Hong et al. (CVPR 2021, arXiv:2012.00321) shift a test part.

    'forward 50': exponential, the class with the most training images 50 times as frequent as the one with the fewest;
    'backward 50': the reverse; 'draw 1', ...: of a Dirichlet distribution whose parameters are 1, the same every time.
    """
    falls_C = np.argsort(np.argsort(-np.asarray(train_counts_C), kind="stable")) / max(len(train_counts_C) - 1, 1)
    weights = {f"forward {factor}": factor**-falls_C for factor in reversed(IMBALANCES)}
    weights["uniform"] = np.ones(len(falls_C))
    weights |= {f"backward {factor}": factor**falls_C for factor in IMBALANCES}
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(falls_C)), DRAWS)
    weights |= {f"draw {number}": weights_C for number, weights_C in enumerate(drawn, 1)}
    return {name: weights_C / weights_C.sum() for name, weights_C in weights.items()}


def label_shift(
    logits_NC: npt.NDArray[np.float32],
    labels_N: Labels,
    train_counts_C: Sequence[int],
    log_prior_of_logits_C: npt.NDArray[np.floating[Any]],
    temperature: float = 1.0,
) -> list[ShiftRow]:
    """Accuracy under each of `shifted_priors` of the classes that have images; the others do not occur.

    The accuracy under a prior is the sum over the classes of its share times the accuracy on the class: nothing is
    resampled. 'unknown': the argmax of the logits; 'known': that of the scores + log prior.
    """
    seen_C = np.bincount(labels_N, minlength=len(train_counts_C))
    present_C = seen_C > 0
    priors = shifted_priors(np.asarray(train_counts_C)[present_C])
    log_priors: dict[str, Fractions] = {}
    for name, shares in priors.items():
        log_priors[name] = np.full(len(seen_C), -np.inf)
        log_priors[name][present_C] = np.log(shares)
    right: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in ("", *priors)}
    for start in range(0, len(logits_NC), _ROWS):
        rows_RC, labels_R = logits_NC[start : start + _ROWS], labels_N[start : start + _ROWS]
        scores_RC = rows_RC / temperature - log_prior_of_logits_C
        right[""].append(rows_RC.argmax(1) == labels_R)
        for name, log_prior_C in log_priors.items():
            right[name].append((scores_RC + log_prior_C).argmax(1) == labels_R)

    def accuracy(name: str) -> Fractions:
        """Of each class that has images."""
        hits_C = np.bincount(labels_N[np.concatenate(right[name])], minlength=len(seen_C))
        return (hits_C / np.maximum(seen_C, 1))[present_C]

    as_it_is = accuracy("")
    return [
        {"prior": name, "unknown": float(shares @ as_it_is), "known": float(shares @ accuracy(name))}
        for name, shares in priors.items()
    ]
