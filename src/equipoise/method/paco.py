"""Parametric contrastive learning (PaCo: Cui et al., ICCV 2021), and its generalised form without a momentum encoder
(GPaCo: TPAMI 2023): the classes' logits and the features of the batch and of a queue are columns of one softmax.

Shapes: B images of this rank, G images of the whole batch, V views, K = V * G features, A views that are anchors, N = A
* B anchors, M columns, Q places in the queue, C classes, D width of the features.
"""

import math

import torch
from torch import Tensor

from equipoise.config.recipe import Loss
from equipoise.method.losses import at_least_float32, flat
from equipoise.method.network import Outputs
from equipoise.method.objective import Objective, Terms


def parametric_contrastive_loss(
    outputs: Outputs,
    labels_G: Tensor,
    rows: slice,
    queue: tuple[Tensor, Tensor],
    settings: Loss,
    gamma: float = 1.0,
) -> Tensor:
    """The mean over all anchors of the loss of GPaCo (arXiv:2209.12400, eq. 9), of which these `rows` have a share.

    `outputs`: logits `[B, A, C]` to which the log prior is added, and features `[G, V, D]`, of which the first A views
    are anchors. Positives are the label's logit, of weight 1 (less what label smoothing takes), and the features of the
    same class, of weight `settings.beta`; `gamma` weights features in the denominator. `queue`: features `[Q, D]` and
    their labels `[Q]`, -1 for an empty place.
    """
    assert outputs.features_BVD is not None
    features_KD, labels_K, _ = flat(outputs.features_BVD, labels_G, rows)
    views = outputs.logits_BC.shape[1]
    places_GV = torch.arange(len(labels_K), device=labels_K.device).unflatten(0, outputs.features_BVD.shape[:2])
    anchors_N = places_GV[rows, :views].flatten()
    with torch.autocast(features_KD.device.type, enabled=False):
        columns_MD, labels_M = torch.cat([features_KD, queue[0].to(features_KD)]), torch.cat([labels_K, queue[1]])
        scores_NM = features_KD[anchors_N] @ columns_MD.T / settings.temperature
        absent_NM = (labels_M < 0).expand(scores_NM.shape).scatter(1, anchors_N[:, None], True)
        logits_NC, own_N = at_least_float32(outputs.logits_BC).flatten(0, 1), labels_K[anchors_N]
        among_NM = scores_NM.masked_fill(absent_NM, -torch.inf) + math.log(gamma)
        log_sum_N1 = torch.cat([logits_NC, among_NM], 1).logsumexp(1, keepdim=True)
        positive_NM = ((own_N[:, None] == labels_M) & ~absent_NM).to(scores_NM)
        smoothing = settings.label_smoothing
        target_NC = torch.full_like(logits_NC, smoothing / (logits_NC.shape[1] - 1))
        target_NC.scatter_(1, own_N[:, None], 1 - smoothing)
        total_N = (target_NC * (logits_NC - log_sum_N1)).sum(1)
        total_N = total_N + settings.beta * ((scores_NM - log_sum_N1) * positive_NM).sum(1)
        return -(total_N / (1 + settings.beta * positive_NM.sum(1))).sum() / (views * len(labels_G))


class GPaCo(Objective):
    """One softmax over the logits with the log prior and over the features of the batch and of a queue (Cui et al.,
    TPAMI 2023); there is no view for the classifier alone."""

    contrastive, shares_views, mixes = True, True, False
    queue_QD: Tensor
    queue_labels_Q: Tensor
    queued: Tensor

    def __init__(self, loss: Loss, class_counts_C: Tensor, width: int) -> None:
        super().__init__(loss, class_counts_C, width)
        self.register_buffer("queue_QD", torch.zeros(loss.queue, width))
        self.register_buffer("queue_labels_Q", torch.full((loss.queue,), -1))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        assert outputs.features_BVD is not None
        adjusted = outputs._replace(logits_BC=outputs.logits_BC + self.log_prior_C.to(outputs.logits_BC))
        queue = self.queue_QD, self.queue_labels_Q
        loss = parametric_contrastive_loss(adjusted, labels_G, rows, queue, self.settings)
        self._enqueue(outputs.features_BVD[:, -1].detach(), labels_G)
        return {"loss": loss}

    def _enqueue(self, features_GD: Tensor, labels_G: Tensor) -> None:
        """The last view of the batch takes the places of the oldest features."""
        kept = slice(max(len(labels_G) - len(self.queue_QD), 0), None)
        places_G = (self.queued + torch.arange(len(labels_G), device=labels_G.device)[kept]) % len(self.queue_QD)
        self.queue_QD.index_copy_(0, places_G, features_GD[kept].to(self.queue_QD))
        self.queue_labels_Q.index_copy_(0, places_G, labels_G[kept])
        self.queued += len(labels_G)

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        return torch.zeros_like(self.log_prior_C, dtype=torch.float64)


class PaCo(GPaCo):
    """GPaCo with a momentum encoder (Cui et al., ICCV 2021): the second view, the key, passes a copy that follows the
    network, and is no anchor, but a column of the softmax and then in the queue."""

    smooths, records, momentum = False, False, 0.999
