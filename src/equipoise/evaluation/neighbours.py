"""The training images nearest to others in the encoder's feature space: beside a mistake, a wrong label shows at once.

Shapes: M images asked about, K neighbours of each, B images of a batch, F width of the encoder.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.base.device import exact_float32
from equipoise.base.world import ALONE, World
from equipoise.data.images import Indices
from equipoise.evaluation.predictions import Table
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint
from equipoise.views.loader import Batches

_BATCH = 32
_MISTAKES, _NEIGHBOURS = 12, 4  # that the report shows

Nearest = tuple[Tensor, Tensor]  # cosines [M, K], the highest first, and rows of the training part


@torch.inference_mode()
def nearest(network: TwoBranchNetwork, train: Batches, asked_MF: Tensor, k: int, world: World = ALONE) -> Nearest:
    """The `k` images of `train` whose features have the highest cosines with those asked about; of equal ones, the
    first of the list. The ranks share the images."""
    asked_MF = F.normalize(asked_MF, dim=1)
    best = torch.empty(len(asked_MF), 0), torch.empty(len(asked_MF), 0, dtype=torch.int64)
    share = np.arange(len(train))[world.rank :: world.size]
    with exact_float32():
        for batch, rows in train.evaluation_of(share, _BATCH):
            cosines_MB = asked_MF @ F.normalize(network.encode(batch.images_VB3SS[0]), dim=1).T
            rows_MB = torch.from_numpy(rows).expand(len(asked_MF), -1)
            best = _highest([best, (cosines_MB.cpu(), rows_MB)], k)
    return _highest(world.gather_objects(best), k)


def _highest(found: Sequence[Nearest], k: int) -> Nearest:
    cosines, rows = (torch.cat(columns, dim=1) for columns in zip(*found, strict=True))
    order_MK = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
    return cosines.gather(1, order_MK), rows.gather(1, order_MK)


@torch.inference_mode()
def explain_mistakes(
    checkpoint: Checkpoint, parts: Mapping[str, Batches], observed: Table, device: torch.device, world: World
) -> None:
    """Add to what rank 0 `observed` of the part that speaks for the run: the rows of its surest mistakes
    (`mistakes_M`) and, for each, of the nearest training images (`neighbours_MK`). All ranks call it. Nothing is added
    where the parts lack `train`, or images could not be read, so that which row is which image is not known."""
    part = "test" if "test" in parts else "validation"
    if "train" not in parts or part not in parts:
        return
    rows_M = world.first_makes(lambda: _surest_mistakes(observed, part, len(parts[part])))
    if not len(rows_M):
        return
    network = checkpoint.build().to(device)
    with exact_float32():
        asked = [network.encode(batch.images_VB3SS[0]) for batch, _ in parts[part].evaluation_of(rows_M, _BATCH)]
    _, neighbours_MK = nearest(network, parts["train"], torch.cat(asked), _NEIGHBOURS, world)
    observed |= {f"{part}/mistakes_M": rows_M, f"{part}/neighbours_MK": neighbours_MK.numpy()}


def _surest_mistakes(observed: Table, part: str, images: int) -> Indices:
    labels_N, predicted_N, sure_N = (observed[f"{part}/{key}_N"] for key in ("labels", "predicted", "confidence"))
    wrong = np.flatnonzero(labels_N != predicted_N) if len(labels_N) == images else np.empty(0, np.int64)
    return wrong[np.argsort(-sure_N[wrong], kind="stable")][:_MISTAKES]
