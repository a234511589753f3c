"""Methods that compare with a queue of earlier features: PaCo (Cui et al., ICCV 2021), GPaCo (TPAMI 2023), GML (Suh and
Seo, ICML 2023, arXiv:2305.01160).

GML's published figures were had with a teacher in the place of the momentum encoder, which is not here. And its
authors' queue holds what their encoder gives, projected anew at every step; here, as in MoCo, it holds projections.
Shapes: B images of this rank, G images of the whole batch, V views, K = V * G features, A views that are anchors, N = A
* B anchors, M columns, Q places in the queue, C classes, D width of the features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.config.recipe import Loss
from equipoise.method.losses import at_least_float32, flat
from equipoise.method.objective import Objective, Outputs, Terms, TwoBranch


def parametric_contrastive_loss(
    outputs: Outputs, labels_G: Tensor, rows: slice, queue: tuple[Tensor, Tensor], settings: Loss
) -> Tensor:
    """The mean over all anchors of the loss of GPaCo (arXiv:2209.12400, eq. 9), of which these `rows` have a share.

    `outputs`: logits `[B, A, C]` to which the log prior is added, and features `[G, V, D]`, of which the first A views
    are anchors. Positives are the label's logit, of weight 1 (less what label smoothing takes), and the features of the
    same class, of weight `settings.beta`. `queue`: features `[Q, D]` and their labels `[Q]`, -1 for an empty place.
    """
    features_KD, labels_K, _ = flat(outputs.features_BVD, labels_G, rows)
    views, smoothing = outputs.logits_BC.shape[1], settings.label_smoothing
    places_GV = torch.arange(len(labels_K), device=labels_K.device).unflatten(0, outputs.features_BVD.shape[:2])
    anchors_N = places_GV[rows, :views].flatten()
    columns_MD, labels_M = torch.cat([features_KD, queue[0].to(features_KD)]), torch.cat([labels_K, queue[1]])
    scores_NM = features_KD[anchors_N] @ columns_MD.T / settings.temperature
    absent_NM = (labels_M < 0).expand(scores_NM.shape).scatter(1, anchors_N[:, None], True)
    logits_NC, own_N = at_least_float32(outputs.logits_BC).flatten(0, 1), labels_K[anchors_N]
    log_sum_N1 = torch.cat([logits_NC, scores_NM.masked_fill(absent_NM, -torch.inf)], 1).logsumexp(1, keepdim=True)
    positive_NM = ((own_N[:, None] == labels_M) & ~absent_NM).to(scores_NM)
    target_NC = torch.full_like(logits_NC, smoothing / (logits_NC.shape[1] - 1))
    target_NC.scatter_(1, own_N[:, None], 1 - smoothing)
    total_N = (target_NC * (logits_NC - log_sum_N1)).sum(1)
    total_N = total_N + settings.beta * ((scores_NM - log_sum_N1) * positive_NM).sum(1)
    return -(total_N / (1 + settings.beta * positive_NM.sum(1))).sum() / (views * len(labels_G))


class GPaCo(Objective):
    """One softmax over the logits with the log prior and over the features of the batch and of a queue (Cui et al.,
    TPAMI 2023); there is no view for the classifier alone."""

    contrastive, shares_views, mixes = True, True, False

    def build(self, width: int) -> None:
        self.tau = 1.0
        self.queue_QD = nn.Buffer(torch.zeros(self.settings.queue, width))
        self.queue_labels_Q = nn.Buffer(torch.full((self.settings.queue,), -1))
        self.queued = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        adjusted = outputs._replace(logits_BC=outputs.logits_BC + self.log_prior_C.to(outputs.logits_BC))
        queue = self.queue_QD, self.queue_labels_Q
        loss = parametric_contrastive_loss(adjusted, labels_G, rows, queue, self.settings)
        # The last view of the batch takes the places of the oldest features.
        features_GD = outputs.features_BVD[:, -1].detach()
        kept = slice(max(len(labels_G) - len(self.queue_QD), 0), None)
        places_G = (self.queued + torch.arange(len(labels_G), device=labels_G.device)[kept]) % len(self.queue_QD)
        self.queue_QD.index_copy_(0, places_G, features_GD[kept].to(self.queue_QD))
        self.queue_labels_Q.index_copy_(0, places_G, labels_G[kept])
        self.queued += len(labels_G)
        return {"loss": loss}


class PaCo(GPaCo):
    """GPaCo with a momentum encoder (Cui et al., ICCV 2021): the second view, the key, passes a copy that follows the
    network, and is no anchor, but a column of the softmax and then in the queue."""

    smooths, records, momentum = False, False, 0.999


def class_scores(scores_BQ: Tensor, labels_Q: Tensor, classes: int) -> Tensor:
    """`[B, C]`: the log of the mean of exp(score) over a class's columns, but for those of -inf; of none, -inf."""
    zeros_BC = scores_BQ.new_zeros(len(scores_BQ), classes)
    classes_BQ = labels_Q.expand(scores_BQ.shape)
    highest_BC = torch.full_like(zeros_BC, -torch.inf).scatter_reduce(1, classes_BQ, scores_BQ.detach(), "amax")
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

    def build(self, width: int) -> None:
        classes = len(self.counts_C)
        # Each class has places of its own, three and its share of the others, after those of the class before.
        sizes_C = 3 + (max(self.settings.queue - 3 * classes, 0) * self.log_prior_C.exp()).long()
        self.sizes_C = nn.Buffer(sizes_C)
        self.firsts_C = nn.Buffer(sizes_C.cumsum(0) - sizes_C)
        self.labels_Q = nn.Buffer(torch.arange(classes).repeat_interleave(sizes_C))
        self.queue_QD = nn.Buffer(torch.zeros(len(self.labels_Q), width))
        self.queued_C = nn.Buffer(torch.zeros(classes, dtype=torch.int64))
        self.log_temperature = nn.Parameter(torch.tensor(self.settings.temperature, dtype=torch.float64).log())

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
        owners_Q = self.enqueue(outputs.features_BVD[:, 1], labels_G)
        own_BQ = torch.arange(len(labels_G), device=labels_G.device)[rows, None] == owners_Q
        ends_C = self.firsts_C + self.queued_C  # of the places that are filled; later it is above the class's own
        absent_Q = torch.arange(len(owners_Q), device=labels_G.device) >= ends_C[self.labels_Q]
        cosines_BQ = at_least_float32(outputs.features_BVD[rows, 0])
        cosines_BQ = cosines_BQ @ self.queue_QD.T.to(cosines_BQ)
        temperature, total = self.log_temperature.exp(), cosines_BQ.new_zeros(())
        for scores_BQ, left_out in (
            (cosines_BQ / temperature.detach(), absent_Q),
            (cosines_BQ.detach() / temperature, absent_Q | own_BQ),
        ):
            scores_BC = class_scores(scores_BQ.masked_fill(left_out, -torch.inf), self.labels_Q, len(self.counts_C))
            adjusted_BC = scores_BC + self.log_prior_C.to(scores_BC)
            loss_B = F.cross_entropy(adjusted_BC, labels_G[rows], reduction="none")
            total = total + loss_B.masked_fill(loss_B == torch.inf, 0).sum()  # its class has no other feature yet
        return total / len(labels_G)
