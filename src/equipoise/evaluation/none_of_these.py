"""Whether an image shows none of the classes: its features are then unlike the mean features of every class.

The likeness of an image is the highest cosine between its features and the mean of a class's, each of length 1. That is
the Mahalanobis distance to the nearest class mean (Lee et al., NeurIPS 2018, eqs. 1-2) without its covariance, with
which strange images were harder to tell: docs/log.md.

Shapes: B images of a batch, N images, S strange images, C classes, F width of the encoder.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.base.device import exact_float32
from equipoise.base.errors import SharedError
from equipoise.base.world import ALONE, World
from equipoise.evaluation.predictions import to_npz
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.folder import BEST, KNOWN, LAST
from equipoise.runs.records import NoneOfThese
from equipoise.views.loader import Batches

_KEPT = 0.95  # of the images of these classes that are yet to come are like enough to a class
_LEAST = 20  # images of a class, below which the class counts less: else one image of it would set the threshold
_BATCH = 32

Likenesses = npt.NDArray[np.float32]


class KnownClasses(nn.Module):
    """Features `[B, F]` become likenesses `[B]`. An image below the `threshold` shows none of the classes."""

    def __init__(self, means_CF: Tensor, threshold: float = 0.0) -> None:
        """`means_CF` have length 1."""
        super().__init__()
        self.means_CF = nn.Buffer(means_CF.float(), persistent=False)
        self.threshold = threshold

    def forward(self, hidden_BF: Tensor) -> Tensor:
        return (F.normalize(hidden_BF, dim=1) @ self.means_CF.T).amax(1)


def know_classes(
    means_CF: Tensor, network: TwoBranchNetwork, validation: Batches, world: World = ALONE
) -> KnownClasses | None:
    """The classes with these mean features, and the threshold that validation images choose; None where they are too
    few for one. All ranks call it."""
    known = KnownClasses(means_CF).to(next(network.parameters()).device)
    labels_N, likeness_N = likenesses(known, network, validation, world)
    chosen = choose_threshold(labels_N, likeness_N)
    if chosen is None:
        return None
    known.threshold = chosen
    return known


def choose_threshold(labels_N: npt.NDArray[np.int64], likeness_N: Likenesses) -> float | None:
    """The highest likeness that keeps 95 % of further images like these: split conformal prediction (Papadopoulos et
    al., ECML 2002) counts the further image among them, as one that is refused. None where it alone is more than 5 %:
    of classes alike, below 19 images. Classes of 20 and more count alike: rare ones, whose means are of few images,
    would else be refused."""
    order = likeness_N.argsort()
    weights_N = 1 / np.bincount(labels_N).clip(_LEAST)[labels_N[order]]
    refused_N = weights_N.cumsum() - weights_N + weights_N.max()  # if the threshold is this image's likeness
    allowed = np.flatnonzero(refused_N <= (1 - _KEPT) * (weights_N.sum() + weights_N.max()) + 1e-9)
    return float(likeness_N[order][allowed[-1]]) if len(allowed) else None


@torch.inference_mode()
def likenesses(
    known: KnownClasses, network: TwoBranchNetwork, batches: Batches, world: World = ALONE
) -> tuple[npt.NDArray[np.int64], Likenesses]:
    """The labels and likenesses `[N]` of the images that can be read, in their order. All ranks call it. Raises
    UserError where none can."""
    network.eval()

    def share() -> list[tuple[npt.NDArray[np.int64], Likenesses]]:
        batches_VB = ((batch.labels_G, batch.images_VB3SS[0]) for batch in batches.evaluation(_BATCH))
        return [(labels.cpu().numpy(), known(network.encode(images)).cpu().numpy()) for labels, images in batches_VB]

    with exact_float32():
        in_order = world.gather_in_turn(world.each_makes(share))
    labels_N, likeness_N = map(np.concatenate, zip(*in_order, strict=True))
    if not len(labels_N):
        raise SharedError("none of the images to compare can be read; name others")
    return labels_N, likeness_N


def tell_apart(
    labels_N: npt.NDArray[np.int64], of_N: Likenesses, of_S: Likenesses, threshold: float, passed_over: int = 0
) -> NoneOfThese:
    """How well likenesses tell images of the classes from strange ones. The false positive rate is the share of strange
    images above the threshold that 95 % of the others pass."""
    from sklearn.metrics import roc_auc_score

    kept_C = np.bincount(labels_N, of_N >= threshold) / np.maximum(np.bincount(labels_N), 1)
    return {
        "images": len(of_S),
        "passed_over": passed_over,
        "auroc": float(roc_auc_score(np.repeat([1, 0], [len(of_N), len(of_S)]), np.concatenate([of_N, of_S]))),
        "fpr95": float((of_S >= np.quantile(of_N, 1 - _KEPT, method="lower")).mean()),
        "threshold": threshold,
        "kept": float(kept_C[np.unique(labels_N)].mean()),
        "refused": float((of_S < threshold).mean()),
    }


def write_known(file: Path, known: KnownClasses, step: int) -> None:
    """Write what `read_known` reads: the classes as a run's checkpoint `file`, after so many steps, knows them."""
    if file.name in (LAST, BEST):  # others may have the same step
        to_npz(file.with_name(KNOWN), {"means_CF": known.means_CF.cpu().numpy(), "about": [known.threshold, step]})


def read_known(file: Path, step: int) -> KnownClasses | None:
    """None where nothing was written, or that of another step; or it is damaged, so that it is found out anew."""
    try:
        with np.load(file.with_name(KNOWN)) as arrays:  # which executes nothing in it
            means_CF, (threshold, of_step) = torch.from_numpy(arrays["means_CF"]), arrays["about"].tolist()
    except Exception:  # numpy, zipfile and zlib raise errors of many kinds
        return None
    return KnownClasses(means_CF, threshold) if of_step == step and file.name in (LAST, BEST) else None
