"""Which labels are probably wrong: those that a classifier which was trained on other images finds unlikely.

Shapes: N images, C classes, F width of the encoder.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.base.device import choose_device
from equipoise.base.world import ALONE
from equipoise.config.reading import load_recipe
from equipoise.data.images import ImageList, Indices
from equipoise.data.inspection import Place
from equipoise.evaluation.features import compute_features
from equipoise.method.pretrained import viewed_as_pretrained
from equipoise.runs.checkpoint import create_network

_UNLIKELY = 1 / 12  # of the probability that the images of a class have for it on average: docs/log.md


class Doubt(NamedTuple):
    """An image whose label is probably wrong, the class that is more likely, and the probabilities of both."""

    place: Place
    probability: float
    likely: str
    of_likely: float


def doubtful_labels(parts: Mapping[str, ImageList]) -> list[Doubt]:
    """The most doubtful label first, by the encoder of the recipe `frozen`. Images that cannot be read are left out.
    Raises UserError where no pretrained weights can be had."""
    recipe = viewed_as_pretrained(load_recipe("frozen", on_bad_image="skip"))
    network = create_network(recipe, 2, start=True).to(choose_device("auto"))
    units: list[Tensor] = []
    places: list[Place] = []
    for part, images in parts.items():
        features_NF, bad = compute_features(recipe, images, network, ALONE)
        rows = [row for row in range(len(images)) if row not in bad]
        units.append(F.normalize(features_NF[rows], dim=1))
        places += [Place(part, images, row) for row in rows]
    names, labels_N = np.unique([place.class_name for place in places], return_inverse=True)
    if (np.bincount(labels_N) > 1).sum() < 2:
        return []  # nothing says what else belongs to a class of one image
    shares_NC = out_of_fold(torch.cat(units).numpy(), labels_N)
    own_N, most_N = shares_NC[np.arange(len(labels_N)), labels_N].tolist(), shares_NC.max(1).tolist()
    likely_N = names[shares_NC.argmax(1)].tolist()
    return [Doubt(places[row], own_N[row], likely_N[row], most_N[row]) for row in doubtful(shares_NC, labels_N)]


def out_of_fold(features_NF: npt.NDArray[np.float32], labels_N: Indices) -> npt.NDArray[np.float64]:
    """`[N, C]` probabilities of each image from a classifier that was trained without its fold; of a class of one image
    they are 0 there."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model: Any = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(min(5, int(np.bincount(labels_N).max())), shuffle=True, random_state=0)
    with warnings.catch_warnings(action="ignore"):  # of classes with fewer images than folds
        return np.asarray(cross_val_predict(model, features_NF, labels_N, cv=folds, method="predict_proba"))


def doubtful(shares_NC: npt.NDArray[np.float64], labels_N: Indices) -> Indices:
    """The images whose label is far less likely than it is for its class on average, and less than another; the least
    likely first. Each class is measured by its own mean, as in confident learning (Northcutt et al., 2021,
    arXiv:1911.00068), which however flags a third of a long tail. Of a pair it flags one at most, of a single none."""
    own_N = shares_NC[np.arange(len(labels_N)), labels_N]
    means_C = np.bincount(labels_N, own_N) / np.bincount(labels_N)
    rows = np.flatnonzero((own_N < _UNLIKELY * means_C[labels_N]) & (shares_NC.argmax(1) != labels_N))
    return rows[np.argsort(own_N[rows], kind="stable")]
