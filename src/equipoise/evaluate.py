"""A network and a list become predictions."""

import numpy as np
import numpy.typing as npt
import torch

from equipoise.loader import Batches
from equipoise.model import TwoBranchNetwork

_BATCH = 256


@torch.inference_mode()
def predict(network: TwoBranchNetwork, batches: Batches) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Predictions and labels `[N]`, in the order of the list.

    The argmax of the raw logits of one view, in float32 whatever the network was trained in, so that a figure
    depends on the weights and not on the device. No prior is added.
    """
    training = network.training
    network.eval()
    predictions: list[npt.NDArray[np.int64]] = []
    labels: list[npt.NDArray[np.int64]] = []
    for batch in batches.evaluation(_BATCH):
        logits_BC = network(batch.images_VB3SS[0])
        predictions.append(logits_BC.argmax(1).cpu().numpy())
        labels.append(batch.labels_B.cpu().numpy())
    network.train(training)
    return np.concatenate(predictions), np.concatenate(labels)
