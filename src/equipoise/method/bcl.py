"""The supervised contrastive loss beside a classifier, its balanced form, and that with mixed images.

Shapes: B images of this rank, G images of the whole batch, V contrastive views, C classes, D width of the features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.method.losses import at_least_float32, balanced_contrastive_loss, supervised_contrastive_loss
from equipoise.method.objective import Outputs, TwoBranch

# What the authors of ConCutMix set. They mix half of the batches, here it is half of the images.
_NEAREST = 30  # classes, and of fewer than a hundred three in ten: so for each of their data sets
_SCALE = 0.2 / 255  # for each class: they set 2/255 for 10 classes, 20/255 for 100, 200/255 for 1,000


class SupCon(TwoBranch):
    """Logit-adjusted cross-entropy and, beside it, the supervised contrastive loss (Khosla et al., NeurIPS 2020): BCL
    without averaging and complement."""

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        return supervised_contrastive_loss(outputs.features_BVD, labels_G, self.settings.temperature, rows)


class Bcl(TwoBranch):
    """Balanced Contrastive Learning (Zhu et al., CVPR 2022)."""

    prototypes = True

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        temperature = self.settings.temperature
        return balanced_contrastive_loss(outputs.features_BVD, labels_G, outputs.prototypes_CD, temperature, rows)


def near_labels(projected_BD: Tensor, prototypes_CD: Tensor, nearest: int) -> Tensor:
    """`[B, C]`, rows that sum to 1: of the `nearest` prototypes, shares by 1 / distance; 0 for the others."""
    distances_BC = torch.cdist(projected_BD, prototypes_CD)
    near = distances_BC.topk(nearest, dim=1, largest=False)
    return torch.zeros_like(distances_BC).scatter_(1, near.indices, F.normalize(1 / near.values, p=1, dim=1))


def leaning(labels_BC: Tensor, counts_C: Tensor) -> Tensor:
    """`[B]`: the weight of `near_labels` beside `labels_BC`: the log of the images that the mixed classes have, over
    the mean log count of a class, times 0.2 / 255: about a thousandth, so that labels hardly move."""
    return _SCALE * len(counts_C) * (labels_BC @ counts_C).log() / counts_C.log().sum().clamp(min=1)


class ConCutMix(Bcl):
    """BCL whose classifier learns from images with a box of another one pasted, drawn from all classes alike; their
    labels lean, by a thousandth, to the classes that are near (Pan et al., IEEE TIP 2024, arXiv:2407.04911)."""

    smooths, must_mix = False, True
    plain = 0.5  # of the epochs have plain labels: so for CIFAR, for larger sets they take 0.6 to 0.8

    def build(self, width: int) -> None:
        self.leans = nn.Buffer(torch.zeros(()))  # 1 in the second half of the epochs

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.leans.fill_(epoch > self.plain * epochs)

    def classification(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        if not self.mixed:
            return super().classification(outputs, labels_G, rows)
        labels_B, logits_BC = labels_G[rows], at_least_float32(outputs.logits_BC)
        others_B, shares_B = (of_G[rows] for of_G in self.mixed)
        label_BC = torch.zeros_like(logits_BC)
        for labels, shares in ((labels_B, shares_B), (others_B, 1 - shares_B)):
            label_BC.scatter_add_(1, labels[:, None], shares[:, None].to(logits_BC))
        projected_BD, prototypes_CD = (at_least_float32(of) for of in outputs.projected)
        nearest = min(_NEAREST, -(-3 * len(prototypes_CD) // 10))
        near_BC = near_labels(projected_BD[: len(labels_B)], prototypes_CD, nearest)
        weight_B = leaning(label_BC, self.counts_C.to(logits_BC)) * (shares_B < 1) * self.leans
        label_BC = torch.lerp(label_BC, near_BC.to(logits_BC), weight_B.to(logits_BC)[:, None])
        logs_BC = (logits_BC + self.tau * self.log_prior_C.to(logits_BC)).log_softmax(1)
        return -(label_BC * logs_BC).sum() / len(labels_G)
