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
from equipoise.evaluation.features import open_encoded_batches
from equipoise.method.pretrained import viewed_as_pretrained
from equipoise.runs.checkpoint import create_network

_BATCH = 256
_FOLDS = 5
_UNLIKELY = 1 / 12  # of the probability that the images of a class have for it on average: docs/log.md


class Doubt(NamedTuple):
    """An image whose label is probably wrong, the class that is more likely, and the probabilities of both."""

    place: Place
    probability: float
    likely: str
    of_likely: float


def doubtful_labels(parts: Mapping[str, ImageList]) -> list[Doubt]:
    """The most doubtful label first. Images that cannot be read are left out. Raises UserError where no pretrained
    weights can be had."""
    features_NF, places = _encoded(parts)
    if not places:
        return []
    names, labels_N = np.unique([place.class_name for place in places], return_inverse=True)
    if (np.bincount(labels_N) > 1).sum() < 2:
        return []  # nothing says what else belongs to a class of one image
    shares_NC = out_of_fold(features_NF, labels_N)
    doubts: list[Doubt] = []
    for row in doubtful(shares_NC, labels_N):
        likely, shares_C = int(shares_NC[row].argmax()), shares_NC[row].tolist()
        doubts.append(Doubt(places[row], shares_C[labels_N[row]], str(names[likely]), shares_C[likely]))
    return doubts


def _encoded(parts: Mapping[str, ImageList]) -> tuple[npt.NDArray[np.float32], list[Place]]:
    """Unit features of all images that can be read, from the encoder of the recipe `frozen`."""
    recipe = load_recipe("frozen", on_bad_image="skip")
    recipe, device = viewed_as_pretrained(recipe), choose_device("auto")
    network = create_network(recipe, 2, start=True).to(device)
    features: list[Tensor] = []
    places: list[Place] = []
    for part, images in parts.items():
        batches = open_encoded_batches(recipe, images, network, device, ALONE)
        batches.prepare()
        for batch, rows in batches.evaluation_of(np.arange(len(images)), _BATCH):
            features.append(F.normalize(batch.images_VB3SS[0], dim=1).cpu())
            places += [Place(part, images, row) for row in rows.tolist()]
    return torch.cat([*features, torch.empty(0, network.width)]).numpy(), places


def out_of_fold(features_NF: npt.NDArray[np.float32], labels_N: Indices) -> npt.NDArray[np.float64]:
    """`[N, C]` probabilities of each image from a classifier that was trained without its fold; of a class of one image
    they are 0 there."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model: Any = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(min(_FOLDS, int(np.bincount(labels_N).max())), shuffle=True, random_state=0)
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
