"""A network and a list become predictions.

Shapes: N images of the list, B of a batch, C classes, K the classes ranked of each image, T strengths of the prior.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from equipoise.base.device import exact_float32, start_reading
from equipoise.base.errors import SharedError, UserError
from equipoise.base.world import ALONE, World
from equipoise.evaluation.metrics import TAUS, Predictions
from equipoise.views.loader import Batches

_BATCH = 256
_RANKED = 5

Arrays = tuple[npt.NDArray[Any], ...]


@torch.inference_mode()
def predict(
    network: nn.Module,
    batches: Batches,
    log_prior_C: Tensor | None = None,
    keep_logits: bool = False,
    observe: Callable[[Tensor, Tensor], None] | None = None,
    world: World = ALONE,
) -> Predictions:
    """Predictions in the order of the list, from the raw logits of one view: no prior is added. With several ranks,
    each computes its batches and all have the whole. The network is left in evaluation mode.

    In float32 whatever the network was trained in, so that a metric depends on the weights and not on the device. With
    `log_prior_C`, what `logits - tau * log prior` would predict is kept too. The logits themselves are kept only if
    asked for: those of a large test set fill gigabytes. `observe` is called with labels and logits of each batch.
    Raises UserError where no image can be read, or the logits are not finite.
    """
    network.eval()
    with exact_float32():
        # An error of one rank is raised on all: the others would else wait for its batches.
        rows = world.each_makes(lambda: _predict_share(network, batches, log_prior_C, keep_logits, observe))
    in_order = world.gather_in_turn(rows)
    if not sum(len(row[0]) for row in in_order):
        raise SharedError("none of the images to score can be read; repair them")
    labels_N, ranked_NK, confidence_N, *further = (np.concatenate(column) for column in zip(*in_order, strict=True))
    logits_NC = further.pop() if keep_logits else None
    adjusted = dict(zip(TAUS, further[0].T, strict=True)) if further else {}
    return Predictions(labels_N, ranked_NK, confidence_N.astype(np.float64), adjusted, logits_NC)


def _predict_share(
    network: nn.Module,
    batches: Batches,
    log_prior_C: Tensor | None,
    keep_logits: bool,
    observe: Callable[[Tensor, Tensor], None] | None,
) -> list[Arrays]:
    """Of each of this rank's batches: labels, ranked classes, confidence, and what else `predict` is asked for."""
    rows: list[Arrays] = []
    pending: list[Callable[[], tuple[Tensor, ...]]] = []
    for batch in batches.evaluation(_BATCH):
        logits_BC: Tensor = network(batch.images_VB3SS[0]).float()
        if observe is not None:
            observe(batch.labels_G, logits_BC)
        # Of equal logits the first class comes first, here and in argmax.
        ranked_BC = logits_BC.sort(dim=1, descending=True, stable=True).indices
        found = [logits_BC.isfinite().all(), batch.labels_G, ranked_BC[:, :_RANKED], logits_BC.softmax(1).amax(1)]
        if log_prior_C is not None:
            prior_C = log_prior_C.to(logits_BC)
            found.append(torch.stack([(logits_BC - tau * prior_C).argmax(1) for tau in TAUS], dim=1))
        if keep_logits:
            found.append(logits_BC)
        pending.append(start_reading(*found))
        if len(pending) > 1:  # the batch before is waited for while a GPU computes this one
            rows.append(_arrays(pending.pop(0)()))
    return rows + [_arrays(read()) for read in pending]


def _arrays(read: tuple[Tensor, ...]) -> Arrays:
    """The arrays of a batch. Raises UserError where its logits are not finite."""
    finite, *found = read
    if not finite:
        raise UserError("the network's logits are not finite numbers, so nothing can be scored; use an earlier one")
    return tuple(tensor.numpy().copy() for tensor in found)  # pinned memory, which a GPU reads, is scarce
