"""A batch becomes gradients: the forward pass, the gather over ranks, the losses, the backward pass.

Shapes: B images of this rank, G images of the whole batch, V contrastive views, C classes, D width of the features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.base.device import start_reading
from equipoise.base.world import World
from equipoise.config.recipe import Recipe
from equipoise.method.losses import (
    balanced_contrastive_loss,
    log_prior,
    logit_adjusted_cross_entropy,
    supervised_contrastive_loss,
)
from equipoise.method.network import Outputs, TwoBranchNetwork
from equipoise.training.graph import StepGraph, Terms
from equipoise.views.loader import Batch


class Step:
    """Computes the gradients of one batch into the network's parameters; with several ranks, those of the batch that
    they hold together, on every rank."""

    def __init__(
        self,
        recipe: Recipe,
        network: TwoBranchNetwork,
        class_counts: Sequence[int],
        device: torch.device,
        precision: str,
        world: World,
    ) -> None:
        self._recipe, self._device, self._precision, self._world = recipe, device, precision, world
        self._log_prior_C = log_prior(torch.tensor(class_counts)).to(device, torch.float32)
        if recipe.compile:
            network.encoder.compile()  # in its place: the names of its weights stay
        self._forward: nn.Module = _Forward(network, recipe.micro_batch)
        # Recorded steps were not tried together with these.
        untried = recipe.deterministic or recipe.micro_batch or recipe.compile or world.size > 1
        recorded = recipe.cuda_graph and device.type == "cuda" and not untried
        self._graph = StepGraph(self._losses, network, recipe.batch_size) if recorded else None
        if world.size > 1:
            parallel = nn.parallel.DistributedDataParallel(self._forward, gradient_as_bucket_view=True)
            parallel.broadcast_buffers = False  # each rank's are its own while training: see World.first_buffers
            self._forward = parallel

    def __call__(self, batch: Batch, votes: Sequence[int] = ()) -> tuple[dict[str, float], list[float]]:
        """The loss terms of the whole batch, and the sum over ranks of the votes. The gradients are there, the weights
        have not moved."""
        if self._graph is not None and self._graph.takes(batch):
            terms, backward = self._graph.forward(batch), self._graph.backward
        else:
            terms = self._losses(batch)
            # The losses of all ranks add up to the batch's, but DistributedDataParallel takes the mean of their
            # gradients.
            backward = (terms["loss"] * self._world.size).backward
        # Sent to the host before the backward pass is queued: a GPU goes on with that while the terms are looked at.
        own = torch.stack([*terms.values()]).detach()
        asked = torch.tensor(votes, dtype=own.dtype, pin_memory=own.device.type == "cuda")
        read = start_reading(self._world.sum(torch.cat([own, asked.to(own.device, non_blocking=True)])))
        backward()
        numbers: list[float] = read()[0].tolist()
        return dict(zip(terms, numbers, strict=False)), numbers[len(terms) :]

    def _losses(self, batch: Batch) -> Terms:
        images, own = len(batch.labels_G), batch.rows
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            logits_BC, features_BVD, prototypes_CD = self._forward(batch.images_VB3SS)
        # A rank without images of its own has computed others, so that every rank does the same: they do not count.
        count = own.stop - own.start
        if features_BVD is not None:
            features_BVD = self._world.gather_rows(features_BVD[:count], images)
        outputs = Outputs(logits_BC[:count], features_BVD, prototypes_CD)
        return loss_terms(self._recipe, self._log_prior_C, outputs, batch.labels_G, own)


class _Forward(nn.Module):
    """What DistributedDataParallel wraps: it exchanges gradients only of calls of `forward`."""

    def __init__(self, network: TwoBranchNetwork, micro_batch: int) -> None:
        super().__init__()
        self.network = network
        self.micro_batch = micro_batch

    def forward(self, images_VB3SS: Tensor) -> Outputs:
        return self.network.training_outputs(images_VB3SS, self.micro_batch)


def loss_terms(recipe: Recipe, log_prior_C: Tensor, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
    """The objective of the recipe's method: its named terms, of which `loss` is the total. Of several ranks, each has
    the part of its `rows` of the batch; the parts add up.

    `outputs` has the logits of these rows, `[B, C]`, and the features of the whole batch, `[G, V, D]`.

    bcl: alpha * logit-adjusted cross-entropy + beta * balanced contrastive loss. supcon+la: the same with the
    supervised contrastive loss. The others have one term, with weight 1.
    """
    loss, method = recipe.loss, recipe.method
    logits_BC, labels_B = outputs.logits_BC, labels_G[rows]
    if method == "ce":
        return {"loss": F.cross_entropy(logits_BC, labels_B, reduction="sum") / len(labels_G)}
    adjusted = logit_adjusted_cross_entropy(logits_BC, labels_B, log_prior_C, loss.tau, reduction="sum")
    classification = adjusted / len(labels_G)
    if method == "logit-adjusted":
        return {"loss": classification}
    features_GVD, prototypes_CD = outputs.features_BVD, outputs.prototypes_CD
    assert features_GVD is not None
    if method == "bcl":
        assert prototypes_CD is not None
        contrastive = balanced_contrastive_loss(features_GVD, labels_G, prototypes_CD, loss.temperature, rows)
    else:
        contrastive = supervised_contrastive_loss(features_GVD, labels_G, loss.temperature, rows)
    total = loss.alpha * classification + loss.beta * contrastive
    return {"loss": total, "classification": classification, "contrastive": contrastive}
