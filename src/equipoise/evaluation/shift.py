"""Class priors other than the training's: what a network is worth under them, and which one unlabelled images have.

Shapes: N images, C classes, R rows at a time. Scores are logits / T - log prior of the logits: the log of p(x|y), up to
a constant of the image (docs/probabilities.md).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError
from equipoise.evaluation.metrics import Fractions, Labels, Predictions
from equipoise.runs.checkpoint import figures_of, load_checkpoint
from equipoise.runs.records import ShiftRow

IMBALANCES = (2, 5, 10, 25, 50)
DRAWS = 20
_ROWS = 1024  # at a time, so that the logits of a large part are not copied as a whole
_CHANGE = 1e-6  # of all shares together, below which EM has arrived


def shifted_priors(train_counts_C: npt.ArrayLike) -> dict[str, Fractions]:
    """Class priors `[C]` by name, as Hong et al. (CVPR 2021, arXiv:2012.00321) shift a test part.

    'forward 50': exponential, the class with the most training images 50 times as frequent as the one with the fewest;
    'backward 50': the reverse; 'draw 1', ...: of a Dirichlet distribution whose parameters are 1, the same every time.
    A class whose count is 0 does not occur.
    """
    counts_C = np.asarray(train_counts_C)
    present = np.flatnonzero(counts_C)
    falls = np.argsort(np.argsort(-counts_C[present], kind="stable")) / max(len(present) - 1, 1)
    weights = {f"forward {factor}": factor**-falls for factor in reversed(IMBALANCES)}
    weights["uniform"] = np.ones(len(present))
    weights |= {f"backward {factor}": factor**falls for factor in IMBALANCES}
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(present)), DRAWS)
    weights |= {f"draw {number}": of_draw for number, of_draw in enumerate(drawn, 1)}
    priors = {name: np.zeros(len(counts_C)) for name in weights}
    for name, of_present in weights.items():
        priors[name][present] = of_present / of_present.sum()
    return priors


def label_shift(
    logits_NC: npt.NDArray[np.float32],
    labels_N: Labels,
    train_counts_C: Sequence[int],
    log_prior_of_logits_C: Fractions,
    temperature: float = 1.0,
) -> list[ShiftRow]:
    """Accuracy under each of `shifted_priors` of the classes that have images.

    The accuracy under a prior is the sum over the classes of its share times the accuracy on the class: nothing is
    resampled. 'unknown': the argmax of the logits; 'known': that of the scores + log prior.
    """
    seen_C = np.bincount(labels_N, minlength=len(train_counts_C))
    priors = shifted_priors(np.where(seen_C > 0, train_counts_C, 0))
    with np.errstate(divide="ignore"):
        log_priors = {name: np.log(prior_C) for name, prior_C in priors.items()}
    hits = {name: np.zeros(len(seen_C)) for name in ("unknown", *priors)}
    for start in range(0, len(logits_NC), _ROWS):
        rows_RC, labels_R = logits_NC[start : start + _ROWS], labels_N[start : start + _ROWS]
        scores_RC = rows_RC / temperature - log_prior_of_logits_C
        guesses = {name: (scores_RC + log_prior_C).argmax(1) for name, log_prior_C in log_priors.items()}
        for name, guess_R in {"unknown": rows_RC.argmax(1), **guesses}.items():
            hits[name] += np.bincount(labels_R[guess_R == labels_R], minlength=len(seen_C))

    def accuracy(prior_C: Fractions, guess: str) -> float:
        return float(prior_C @ (hits[guess] / np.maximum(seen_C, 1)))

    return [
        {"prior": name, "unknown": accuracy(prior_C, "unknown"), "known": accuracy(prior_C, name)}
        for name, prior_C in priors.items()
    ]


def label_shift_of(path: Path, train_counts_C: Sequence[int], predictions: Predictions) -> list[ShiftRow]:
    """`label_shift` of predictions with logits, of the checkpoint at `path` and its temperature. Raises UserError where
    the training counts are not known."""
    if not train_counts_C:
        raise UserError(f"{path} does not say how many training images each class had, by which --label-shift orders")
    checkpoint, (labels_N, logits_NC) = load_checkpoint(path), (predictions.labels_N, predictions.logits_NC)
    assert logits_NC is not None
    figures, log_prior_C = figures_of(path, checkpoint), checkpoint.log_prior_of_logits().numpy()
    temperature = (figures and figures["temperature"]) or 1.0
    return label_shift(logits_NC, labels_N, train_counts_C, log_prior_C, temperature)


def estimate_prior(scores_NC: npt.NDArray[np.floating[Any]]) -> Fractions:
    """`[C]` the class prior of unlabelled images: the most probable one, by the EM of Saerens et al. (Neural
    Computation 14, 2002, section 2), as if there were one image more of each class."""
    likelihoods_NC = np.exp(scores_NC - scores_NC.max(1, keepdims=True))
    images, classes = scores_NC.shape
    prior_C, change = np.full(classes, 1 / classes), 1.0
    while change > _CHANGE:
        before_C, images_C = prior_C, prior_C * ((1 / (likelihoods_NC @ prior_C)) @ likelihoods_NC)
        prior_C = (images_C + 1) / (images + classes)
        change = np.abs(prior_C - before_C).sum()
    return prior_C
