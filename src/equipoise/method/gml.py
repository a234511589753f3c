"""Mutual information maximisation between features and labels (GML: Suh & Seo, ICML 2023, arXiv:2305.01160): the
contrastive branch classifies a feature by its mean likeness to earlier features of each class.

The published figures were had with a teacher in the place of the momentum encoder, which is not here. And the authors'
queue holds what their encoder gives, projected anew at every step; here, as in MoCo, it holds projected features.
Shapes: B images of this rank, G images of the whole batch, Q places in the queue, C classes, D width of the features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.config.recipe import Loss
from equipoise.method.losses import at_least_float32
from equipoise.method.network import Outputs
from equipoise.method.objective import TwoBranch

_LEAST = 3  # places in the queue that each class has


def class_scores(scores_BQ: Tensor, labels_Q: Tensor, classes: int) -> Tensor:
    """`[B, C]`: the log of the mean of exp(score) over the columns of each class. Columns of -inf do not count; a class
    without others has -inf."""
    zeros_BC = scores_BQ.new_zeros(len(scores_BQ), classes)
    highest_BC = torch.full_like(zeros_BC, -torch.inf).scatter_reduce(
        1, labels_Q.expand(scores_BQ.shape), scores_BQ.detach(), "amax"
    )
    absent_BC = highest_BC == -torch.inf
    highest_BC = highest_BC.masked_fill(absent_BC, 0)
    sums_BC = zeros_BC.index_add(1, labels_Q, (scores_BQ - highest_BC[:, labels_Q]).exp())
    counts_BC = zeros_BC.index_add(1, labels_Q, (scores_BQ > -torch.inf).to(scores_BQ))
    means_BC = (sums_BC / counts_BC.clamp(min=1)).masked_fill(absent_BC, 1)  # no gradient where it would be infinite
    return (means_BC.log() + highest_BC).masked_fill(absent_BC, -torch.inf)


class Gml(TwoBranch):
    """Logit-adjusted cross-entropy and, beside it, that of the mean likeness to each class's features in a queue, which
    a momentum encoder made; its temperature is learned (Suh & Seo, ICML 2023, without a teacher)."""

    cosine, records, momentum = True, False, 0.999
    labels_Q: Tensor  # each class has places of its own, the next ones after those of the class before
    offsets_Q: Tensor
    sizes_C: Tensor
    firsts_C: Tensor
    queue_QD: Tensor
    queued_C: Tensor

    def __init__(self, loss: Loss, class_counts_C: Tensor, width: int) -> None:
        super().__init__(loss, class_counts_C, width)
        classes = len(class_counts_C)
        sizes_C = _LEAST + (max(loss.queue - _LEAST * classes, 0) * self.log_prior_C.exp()).long()
        firsts_C = sizes_C.cumsum(0) - sizes_C
        labels_Q = torch.arange(classes).repeat_interleave(sizes_C)
        self.register_buffer("sizes_C", sizes_C)
        self.register_buffer("firsts_C", firsts_C)
        self.register_buffer("labels_Q", labels_Q)
        self.register_buffer("offsets_Q", torch.arange(len(labels_Q)) - firsts_C[labels_Q])
        self.register_buffer("queue_QD", torch.zeros(len(labels_Q), width))
        self.register_buffer("queued_C", torch.zeros(classes, dtype=torch.int64))
        self.log_temperature = nn.Parameter(torch.tensor(loss.temperature, dtype=torch.float64).log())

    @torch.no_grad()
    def enqueue(self, keys_GD: Tensor, labels_G: Tensor) -> Tensor:
        """Each key takes the place of the oldest of its class. `[Q]`: for each place the image of this batch that
        filled it, or -1."""
        earlier_G = (labels_G[:, None] == labels_G).tril(-1).sum(1)
        places_G = self.firsts_C[labels_G] + (self.queued_C[labels_G] + earlier_G) % self.sizes_C[labels_G]
        images_G = torch.arange(len(labels_G), device=labels_G.device)
        owners_Q = torch.full_like(self.labels_Q, -1).scatter_reduce(0, places_G, images_G, "amax")  # the last stays
        self.queue_QD.index_copy_(0, places_G, keys_GD[owners_Q[places_G]].to(self.queue_QD))
        self.queued_C.index_add_(0, labels_G, torch.ones_like(labels_G))
        return owners_Q

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        """Of the first view's features. The keys of this batch are in the queue already, an image's own one too; but
        the temperature is learned without that, from the same features without gradient."""
        assert outputs.features_BVD is not None
        owners_Q = self.enqueue(outputs.features_BVD[:, 1], labels_G)
        absent_Q = self.offsets_Q >= self.queued_C[self.labels_Q]
        labels_B, images_G = labels_G[rows], torch.arange(len(labels_G), device=labels_G.device)
        own_BQ = images_G[rows, None] == owners_Q
        with torch.autocast(labels_G.device.type, enabled=False):
            cosines_BQ = at_least_float32(outputs.features_BVD[rows, 0])
            cosines_BQ = cosines_BQ @ self.queue_QD.T.to(cosines_BQ)
            temperature, total = self.log_temperature.exp(), cosines_BQ.new_zeros(())
            for scores_BQ, left_out in (
                (cosines_BQ / temperature.detach(), absent_Q),
                (cosines_BQ.detach() / temperature, absent_Q | own_BQ),
            ):
                scores_BC = class_scores(scores_BQ.masked_fill(left_out, -torch.inf), self.labels_Q, len(self.counts_C))
                loss_B = F.cross_entropy(scores_BC + self.log_prior_C.to(scores_BC), labels_B, reduction="none")
                total = total + loss_B.masked_fill(loss_B == torch.inf, 0).sum()  # its class has no other feature yet
            return total / len(labels_G)
