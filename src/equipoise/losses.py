"""The losses of Balanced Contrastive Learning (Zhu et al., CVPR 2022), as free functions and as modules.

Pure: tensors in, a scalar out. They know of no ranks and no recipe; hand them the whole batch.

Shapes: B images of a batch, V contrastive views, C classes, D width of the contrastive features, K = V * B features,
N of them anchors (all, unless said), M = K + C columns that an anchor is compared with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL = slice(None)


def log_prior(class_counts_C: Tensor) -> Tensor:
    """`[C]` log of each class's share of the training images. Raises ValueError if a class has none."""
    if class_counts_C.ndim != 1 or bool((class_counts_C <= 0).any()):
        raise ValueError("class counts must be one positive number a class")
    counts = class_counts_C.double()
    return (counts / counts.sum()).log()


def logit_adjusted_cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, log_prior_C: Tensor, tau: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `logits + tau * log prior` (Menon et al., ICLR 2021, eq. 10; "logit compensation" in BCL).

    Computed in float32 at least, also under autocast. Returns the mean over the batch, or its sum (`reduction`).
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        logits_BC = _at_least_float32(logits_BC)
        return F.cross_entropy(logits_BC + tau * log_prior_C.to(logits_BC), labels_B, reduction=reduction)


def balanced_contrastive_loss(
    features_BVD: Tensor, labels_B: Tensor, prototypes_CD: Tensor, temperature: float = 0.1, rows: slice = ALL
) -> Tensor:
    """The balanced contrastive loss (arXiv:2207.09052, eqs. 6-9): the mean over all V * B features.

    `features_BVD` and `prototypes_CD` are L2-normalised along D; `labels_B` are class indices below C. Every anchor
    is compared with all other features of the batch and with all prototypes. *Class complement*: the prototypes put
    every class into every batch. *Class averaging*: each class enters the denominator by its mean, not its sum.

    `rows`: the images whose features are anchors. Only they are computed, still divided by V * B, so that the losses of
    disjoint rows, each computed elsewhere, add up to the loss of the batch.

    Computed in float32 at least, also under autocast. Raises ValueError where the shapes do not fit together.
    """
    _check_shapes(features_BVD, labels_B)
    classes, width = prototypes_CD.shape
    if width != features_BVD.shape[2]:
        raise ValueError(f"features have width {features_BVD.shape[2]} but prototypes {width}")
    with torch.autocast(features_BVD.device.type, enabled=False):
        features_KD, labels_K, itself_N = _flat(features_BVD, labels_B, rows)
        columns_MD = torch.cat([features_KD, _at_least_float32(prototypes_CD)])
        labels_M = torch.cat([labels_K, torch.arange(classes, device=labels_K.device)])
        count_C = torch.bincount(labels_M, minlength=classes).to(features_KD.dtype)  # K_j of the paper
        anchors_ND, labels_N = features_KD[itself_N], labels_K[itself_N]
        count_N, count_M = count_C[labels_N], count_C[labels_M]

        similarity_NM = anchors_ND @ columns_MD.T / temperature
        same_class_NM = labels_N[:, None] == labels_M
        weight_NM = torch.where(same_class_NM, count_N[:, None] - 1, count_M)
        log_denominator_N = _exclude_self(similarity_NM - weight_NM.log(), itself_N).logsumexp(1)

        # The mean similarity to the positives, by way of the class sums: no [N, M] mask, no [N, M] product.
        sums_CD = torch.zeros_like(prototypes_CD, dtype=features_KD.dtype).index_add(0, labels_M, columns_MD)
        positive_N = _sum_of_others(sums_CD[labels_N], anchors_ND) / temperature / (count_N - 1)
        return (log_denominator_N - positive_N).sum() / len(features_KD)


def supervised_contrastive_loss(
    features_BVD: Tensor, labels_B: Tensor, temperature: float = 0.1, rows: slice = ALL
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2): BCL without averaging and complement.

    Anchors without a positive in the batch (possible when V = 1) are left out of the mean; where none has one, the
    loss is 0. `rows`: see `balanced_contrastive_loss`. Computed in float32 at least. Raises ValueError where the
    shapes do not fit together.
    """
    _check_shapes(features_BVD, labels_B)
    with torch.autocast(features_BVD.device.type, enabled=False):
        features_KD, labels_K, itself_N = _flat(features_BVD, labels_B, rows)
        _, class_K, count_J = labels_K.unique(return_inverse=True, return_counts=True)  # J classes present
        sums_JD = features_KD.new_zeros(len(count_J), features_KD.shape[1]).index_add(0, class_K, features_KD)
        positives_K = (count_J[class_K] - 1).to(features_KD.dtype)
        anchors_ND, class_N, positives_N = features_KD[itself_N], class_K[itself_N], positives_K[itself_N]

        similarity_NK = anchors_ND @ features_KD.T / temperature
        log_denominator_N = _exclude_self(similarity_NK, itself_N).logsumexp(1)
        positive_N = _sum_of_others(sums_JD[class_N], anchors_ND) / temperature / positives_N.clamp(min=1)
        loss_N = torch.where(positives_N > 0, log_denominator_N - positive_N, 0.0)
        return loss_N.sum() / (positives_K > 0).sum().clamp(min=1)


class LogitAdjustedCrossEntropy(nn.Module):
    """`LogitAdjustedCrossEntropy(class_counts, tau=1.0)(logits_BC, labels_B) -> scalar`.

    `class_counts`: training images of each class. See `logit_adjusted_cross_entropy`.
    Raises ValueError if a class count is not positive.
    """

    log_prior_C: Tensor

    def __init__(self, class_counts: Sequence[int] | Tensor, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = tau
        self.register_buffer("log_prior_C", log_prior(torch.as_tensor(class_counts)), persistent=False)

    def forward(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return logit_adjusted_cross_entropy(logits_BC, labels_B, self.log_prior_C, self.tau)


class BalancedContrastiveLoss(nn.Module):
    """`BalancedContrastiveLoss(temperature)(features_BVD, labels_B, prototypes_CD) -> scalar`.

    Any number of views V >= 1. See `balanced_contrastive_loss`. Raises ValueError if temperature is not positive.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.temperature = temperature

    def forward(self, features_BVD: Tensor, labels_B: Tensor, prototypes_CD: Tensor) -> Tensor:
        return balanced_contrastive_loss(features_BVD, labels_B, prototypes_CD, self.temperature)


def _check_shapes(features_BVD: Tensor, labels_B: Tensor) -> None:
    if features_BVD.ndim != 3:
        raise ValueError(f"features must be [B, V, D], not {list(features_BVD.shape)}")
    if labels_B.shape != features_BVD.shape[:1]:
        raise ValueError(f"{len(features_BVD)} images have features but labels are {list(labels_B.shape)}")


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _flat(features_BVD: Tensor, labels_B: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """All features as `[K, D]`, in float32 at least, their labels `[K]`, and which of them are anchors `[N]`."""
    views = features_BVD.shape[1]
    first, end, _ = rows.indices(len(labels_B))
    itself_N = torch.arange(first * views, max(first, end) * views, device=labels_B.device)
    return _at_least_float32(features_BVD).flatten(0, 1), labels_B.repeat_interleave(views), itself_N


def _exclude_self(scores_NM: Tensor, itself_N: Tensor) -> Tensor:
    """An anchor is a column too: it is no part of its own denominator."""
    return scores_NM.scatter(1, itself_N[:, None], float("-inf"))


def _sum_of_others(class_sum_ND: Tensor, anchors_ND: Tensor) -> Tensor:
    """`[N]` sum of the products of each anchor with the other members of its class."""
    return (anchors_ND * (class_sum_ND - anchors_ND)).sum(1)
