"""A network and a list become predictions.

Shapes: N images of the list, B of a batch, C classes, K the classes ranked of each image.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from equipoise.errors import UserError
from equipoise.loader import Batches
from equipoise.metrics import TAUS, Predictions

_BATCH = 256
_RANKED = 5


@torch.inference_mode()
def predict(
    network: nn.Module, batches: Batches, log_prior_C: Tensor | None = None, keep_logits: bool = False
) -> Predictions:
    """Predictions in the order of the list, from the raw logits of one view: no prior is added.

    In float32 whatever the network was trained in, so that a figure depends on the weights and not on the device. With
    `log_prior_C`, what `logits - tau * log prior` would predict is kept too. The logits themselves are kept only if
    asked for: of a large test set they fill gigabytes.
    """
    training = network.training
    network.eval()
    rows: list[tuple[npt.NDArray[np.generic], ...]] = []
    logits: list[npt.NDArray[np.float32]] = []
    prior_TC: Tensor | None = None
    try:
        for batch in batches.evaluation(_BATCH):
            logits_BC: Tensor = network(batch.images_VB3SS[0]).float()
            if not bool(logits_BC.isfinite().all()):
                raise UserError(
                    "the network's logits are not finite numbers: no figure is to be had; use an earlier one"
                )
            # Of equal logits the first class comes first, here and in argmax.
            ranked_BC = logits_BC.sort(dim=1, descending=True, stable=True).indices
            confidence_B = logits_BC.softmax(1).amax(1)
            found = [batch.labels_B, ranked_BC[:, :_RANKED], confidence_B]
            if log_prior_C is not None:
                if prior_TC is None:
                    prior_TC = torch.tensor(TAUS, device=logits_BC.device)[:, None] * log_prior_C.to(logits_BC)
                found.append(torch.stack([(logits_BC - prior_C).argmax(1) for prior_C in prior_TC], dim=1))
            rows.append(tuple(tensor.cpu().numpy() for tensor in found))
            if keep_logits:
                logits.append(logits_BC.cpu().numpy())
    finally:
        network.train(training)
    if not sum(len(row[0]) for row in rows):
        raise UserError("none of the images to score can be read; repair them")
    labels_N, ranked_NK, confidence_N, *adjusted = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Predictions(
        labels_N=labels_N.astype(np.int64),
        ranked_NK=ranked_NK.astype(np.int64),
        confidence_N=confidence_N.astype(np.float64),
        adjusted={tau: adjusted[0][:, index].astype(np.int64) for index, tau in enumerate(TAUS)} if adjusted else {},
        logits_NC=np.concatenate(logits) if keep_logits else None,
    )
