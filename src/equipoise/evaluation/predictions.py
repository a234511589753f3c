"""A network and a list become predictions.

Shapes: N images of the list, B of a batch, C classes, K the classes ranked of each image.
"""

from collections.abc import Callable

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
    each computes its batches and all have the whole.

    In float32 whatever the network was trained in, so that a figure depends on the weights and not on the device. With
    `log_prior_C`, what `logits - tau * log prior` would predict is kept too. The logits themselves are kept only if
    asked for: of a large test set they fill gigabytes. `observe` is called with labels and logits of each batch.
    Raises UserError where no image can be read, or the logits are not finite.
    """
    # A bad image, or a network that has gone wrong, is every rank's error: else the others would wait.
    with exact_float32():
        rows = world.each_makes(lambda: _predict_share(network, batches, log_prior_C, keep_logits, observe))
    in_order = world.gather_in_turn(rows)
    if not sum(len(row[0]) for row in in_order):
        raise SharedError("none of the images to score can be read; repair them")
    labels_N, ranked_NK, confidence_N, *further = (np.concatenate(column) for column in zip(*in_order, strict=True))
    logits_NC = further.pop() if keep_logits else None
    return Predictions(
        labels_N=labels_N.astype(np.int64),
        ranked_NK=ranked_NK.astype(np.int64),
        confidence_N=confidence_N.astype(np.float64),
        adjusted={tau: further[0][:, index].astype(np.int64) for index, tau in enumerate(TAUS)} if further else {},
        logits_NC=logits_NC,
    )


def _predict_share(
    network: nn.Module,
    batches: Batches,
    log_prior_C: Tensor | None,
    keep_logits: bool,
    observe: Callable[[Tensor, Tensor], None] | None,
) -> list[tuple[npt.NDArray[np.generic], ...]]:
    """Of each of this rank's batches: labels, ranked classes, confidence, and what else `predict` is asked for."""
    training = network.training
    network.eval()
    rows: list[tuple[npt.NDArray[np.generic], ...]] = []
    prior_TC: Tensor | None = None
    pending: Callable[[], tuple[Tensor, ...]] | None = None
    try:
        for batch in batches.evaluation(_BATCH):
            logits_BC: Tensor = network(batch.images_VB3SS[0]).float()
            if observe is not None:
                observe(batch.labels_G, logits_BC)
            # Of equal logits the first class comes first, here and in argmax.
            ranked_BC = logits_BC.sort(dim=1, descending=True, stable=True).indices
            confidence_B = logits_BC.softmax(1).amax(1)
            found = [logits_BC.isfinite().all(), batch.labels_G, ranked_BC[:, :_RANKED], confidence_B]
            if log_prior_C is not None:
                if prior_TC is None:
                    prior_TC = torch.tensor(TAUS, device=logits_BC.device)[:, None] * log_prior_C.to(logits_BC)
                found.append(torch.stack([(logits_BC - prior_C).argmax(1) for prior_C in prior_TC], dim=1))
            if keep_logits:
                found.append(logits_BC)
            # The batch before is waited for while a GPU computes this one.
            rows.extend(_read(pending))
            pending = start_reading(*found)
        rows.extend(_read(pending))
    finally:
        network.train(training)
    return rows


def _read(
    pending: Callable[[], tuple[Tensor, ...]] | None,
) -> list[tuple[npt.NDArray[np.generic], ...]]:
    """The arrays of a batch, where there is one. Raises UserError where its logits are not finite."""
    if pending is None:
        return []
    finite, *found = pending()
    if not finite:
        raise UserError("the network's logits are not finite numbers: no figure is to be had; use an earlier one")
    return [tuple(tensor.numpy().copy() for tensor in found)]  # memory that a GPU can read is scarce
