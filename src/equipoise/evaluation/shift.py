"""Class priors other than the training's: what a network is worth under them, which one unlabelled images have, and
those of users, in files.

Shapes: N images, C classes, R rows at a time. Scores are logits / T - log prior of the logits: the log of p(x|y), up to
a constant of the image (docs/probabilities.md).
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason, shown
from equipoise.evaluation.metrics import Fractions, Labels
from equipoise.runs.records import ShiftRow

IMBALANCES = (2, 5, 10, 25, 50)
_ROWS = 1024  # at a time, so that the logits of a large part are not copied as a whole


def shifted_priors(train_counts_C: npt.ArrayLike) -> dict[str, Fractions]:
    """Class priors `[C]` by name, as Hong et al. (CVPR 2021, arXiv:2012.00321) shift a test part. 'forward 50':
    exponential, the class with the most training images 50 times as frequent as the one with the fewest; 'backward 50':
    the reverse; 'draw 1', ...: of a Dirichlet distribution whose parameters are 1, the same every time. A class whose
    count is 0 does not occur."""
    counts_C = np.asarray(train_counts_C)
    present = np.flatnonzero(counts_C)
    falls = np.argsort(np.argsort(-counts_C[present], kind="stable")) / max(len(present) - 1, 1)
    weights = {f"forward {factor}": factor**-falls for factor in reversed(IMBALANCES)}
    weights["uniform"] = np.ones(len(present))
    weights |= {f"backward {factor}": factor**falls for factor in IMBALANCES}
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(present)), 20)
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
    """Accuracy under each of `shifted_priors` of the classes that have images: the sum over the classes of their share
    times the accuracy on the class. 'unknown': the argmax of the logits; 'known': that of the scores + log prior."""
    seen_C = np.bincount(labels_N, minlength=len(train_counts_C))
    pieces = np.array_split(logits_NC, len(logits_NC) // _ROWS + 1)

    def accuracy(prior_C: Fractions, guesses: Iterable[Labels]) -> float:
        right_N = np.concatenate(list(guesses)) == labels_N
        return float(prior_C @ (np.bincount(labels_N[right_N], minlength=len(seen_C)) / np.maximum(seen_C, 1)))

    rows: list[ShiftRow] = []
    for name, prior_C in shifted_priors(np.where(seen_C > 0, train_counts_C, 0)).items():
        with np.errstate(divide="ignore"):
            log_prior_C = np.log(prior_C)
        known = ((of / temperature - log_prior_of_logits_C + log_prior_C).argmax(1) for of in pieces)
        unknown = (of.argmax(1) for of in pieces)
        rows.append({"prior": name, "unknown": accuracy(prior_C, unknown), "known": accuracy(prior_C, known)})
    return rows


def estimate_prior(scores_NC: npt.NDArray[np.floating[Any]]) -> Fractions:
    """`[C]` the class prior of unlabelled images: the most probable one, by the EM of Saerens et al. (Neural
    Computation 14, 2002, section 2), as if there were one image more of each class."""
    likelihoods_NC = np.exp(scores_NC - scores_NC.max(1, keepdims=True))
    images, classes = scores_NC.shape
    prior_C, change = np.full(classes, 1 / classes), 1.0
    while change > 1e-6:  # of all shares together
        before_C, images_C = prior_C, prior_C * ((1 / (likelihoods_NC @ prior_C)) @ likelihoods_NC)
        prior_C = (images_C + 1) / (images + classes)
        change = np.abs(prior_C - before_C).sum()
    return prior_C


def read_weights(file: Path) -> dict[str, float]:
    """Class name -> weight, of a CSV file of two columns, with or without a heading. Raises UserError for another file;
    `in_class_order` checks the weights."""
    try:
        pairs = [row for row in csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig"))) if row]
        if pairs and not any(letter.isdigit() for letter in pairs[0][-1]):
            del pairs[0]  # the heading
        weights = {str(name): float(weight) for name, weight in pairs}
    except (OSError, ValueError, csv.Error) as error:
        known = "--prior is uniform, train, estimate, or a CSV file of classes and their weights"
        raise UserError(f"{known}; {file} cannot be read so ({reason(error, library=True)})") from None
    if len(weights) < len(pairs):
        raise UserError(f"{file} names a class twice")
    return weights


def in_class_order(weights: Mapping[str, float], class_names: Sequence[str]) -> npt.NDArray[np.float64]:
    """The weights in the order of the classes. Raises UserError unless there is one finite number, 0 or more, for each
    class, and one above 0."""
    if differing := sorted(weights.keys() ^ set(class_names)):
        fault = "is no class of the model" if differing[0] in weights else "has no weight"
        raise UserError(f"the prior must weigh all classes, and no other: {shown(differing[0])} {fault}")
    weights_C = np.array([weights[name] for name in class_names], np.float64)
    if not np.isfinite(weights_C).all() or weights_C.min() < 0 or not weights_C.any():
        raise UserError("each weight of the prior must be a finite number, 0 or more, and one at least above 0")
    return weights_C
