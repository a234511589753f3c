"""The losses of Balanced Contrastive Learning (Zhu et al., CVPR 2022), as free functions and as modules: tensors in, a
scalar out. They know of no ranks and no recipe; hand them the whole batch.

Shapes: B images of a batch, V contrastive views, C classes, D width of the contrastive features, K = V * B features,
N of them anchors (all, unless said), R of these a chunk, M = K + C columns that an anchor is compared with.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL = slice(None)
_CHUNK_ENTRIES = 4_500_000  # of the matrix that is there at a time, 18 MB: a batch of 256 with 8,142 classes is one
_CHUNK_ENTRIES_GPU = 32_000_000  # a GPU needs larger pieces to be busy
_CHUNK_ROWS = 128  # below these many anchors the matrix products become slower


class KnownGradients(torch.autograd.Function):
    """`apply(value, *inputs, *gradients)`: a value with its gradients in the inputs, which were computed with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # under create_graph alone. What is returned would have no graph, and say nothing
            raise RuntimeError("this loss has no second derivative: leave out create_graph=True")
        of_inputs = [grad * gradient for gradient in ctx.saved_tensors]
        return None, *of_inputs, *[None] * len(of_inputs)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def log_prior(class_counts_C: Tensor) -> Tensor:
    """`[C]` log of each class's share of the training images. Raises ValueError if a class has none."""
    if bool((class_counts_C <= 0).any()):
        raise ValueError("class counts must be one positive number a class")
    counts_C = class_counts_C.double()
    return (counts_C / counts_C.sum()).log()


def logit_adjusted_cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, log_prior_C: Tensor, tau: float = 1.0, **how: Any
) -> Tensor:
    """Cross-entropy of `logits + tau * log prior` (Menon et al., ICLR 2021, eq. 10; "logit compensation" in BCL), in
    float32 at least, also under autocast. `how`: what else torch's cross_entropy takes."""
    with torch.autocast(logits_BC.device.type, enabled=False):
        logits_BC = at_least_float32(logits_BC)
        return F.cross_entropy(logits_BC + tau * log_prior_C.to(logits_BC), labels_B, **how)


def balanced_contrastive_loss(
    features_BVD: Tensor, labels_B: Tensor, prototypes_CD: Tensor, temperature: float = 0.1, rows: slice = ALL
) -> Tensor:
    """The balanced contrastive loss (arXiv:2207.09052, eqs. 6-9): the mean over all V * B features.

    `features_BVD` and `prototypes_CD` are L2-normalised along D; `labels_B` are class indices below C. Every anchor
    is compared with all other features of the batch and with all prototypes. *Class complement*: the prototypes put
    every class into every batch. *Class averaging*: each class enters the denominator by its mean, not its sum.

        L_i = mean over the positives p of [ log sum_{k != i} exp(s_ik) / w_ik  -  s_ip ]
        s_ik = z_i . z_k / temperature

    w_ik is the number of columns of k's class, the anchor itself not counted; positives are the other columns of i's.
    `rows`: the images whose features are anchors. Only they are computed, still divided by V * B, so that the losses of
    disjoint rows, each computed elsewhere, add up to the loss of the batch.

    Computed in float32 at least, also under autocast; the gradients with the value, so that `create_graph=True`, for a
    second derivative, raises RuntimeError. Raises ValueError where the shapes do not fit together.
    """
    features_KD, labels_K, anchors = flat(features_BVD, labels_B, rows)
    inputs = features_KD, prototypes_CD.to(features_KD)
    with torch.no_grad(), torch.autocast(features_BVD.device.type, enabled=False):
        value, *gradients = _value_and_gradients(*inputs, labels_K, temperature, anchors)
    return KnownGradients.apply(value, *inputs, *gradients)  # pyright: ignore[reportReturnType]


def supervised_contrastive_loss(
    features_BVD: Tensor, labels_B: Tensor, temperature: float = 0.1, rows: slice = ALL
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2): BCL without averaging and complement. Anchors
    without a positive in the batch (possible when V = 1) are left out of the mean; where none has one, the loss is 0.
    `rows`: see `balanced_contrastive_loss`. Raises ValueError where the shapes do not fit together."""
    features_KD, labels_K, anchors = flat(features_BVD, labels_B, rows)
    # A class goes by its first place among the sorted labels: how many there are, a GPU would have to be asked.
    sorted_K = labels_K.sort().values
    first_K = torch.searchsorted(sorted_K, labels_K)
    sums_KD = torch.zeros_like(features_KD).index_add(0, first_K, features_KD)
    positives_K = (torch.searchsorted(sorted_K, labels_K, right=True) - first_K - 1).to(features_KD.dtype)
    anchors_ND, first_N, positives_N = features_KD[anchors], first_K[anchors], positives_K[anchors]
    similarity_NK = anchors_ND @ features_KD.T / temperature
    itself_N = torch.arange(anchors.start, anchors.stop, device=similarity_NK.device)  # not in its own denominator
    log_denominator_N = similarity_NK.scatter(1, itself_N[:, None], float("-inf")).logsumexp(1)
    of_others_N = (anchors_ND * (sums_KD[first_N] - anchors_ND)).sum(1)
    positive_N = of_others_N / temperature / positives_N.clamp(min=1)
    loss_N = torch.where(positives_N > 0, log_denominator_N - positive_N, 0.0)
    return loss_N.sum() / (positives_K > 0).sum().clamp(min=1)


def _value_and_gradients(
    features_KD: Tensor, prototypes_CD: Tensor, labels_K: Tensor, temperature: float, anchors: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """The balanced contrastive loss of the anchors and its gradients in the features and in the prototypes: in nearly
    the time of its matrix products, and in little memory. The gradient in the scores is known as soon as the scores
    are: so a chunk of anchors is compared, its share of the gradients added up, and its matrix written over by the next
    one. No [N, M] matrix is kept, none is computed twice."""
    features, classes = len(features_KD), len(prototypes_CD)
    # n, of each class: its features in the batch. Its columns are one more, the prototype (K of the paper).
    members_C = features_KD.new_zeros(classes).index_add_(0, labels_K, torch.ones_like(features_KD[:, 0]))
    members_K = members_C[labels_K]
    log_columns_M = torch.cat([members_K, members_C]).log1p_()
    grad_features_KD, grad_prototypes_CD = torch.zeros_like(features_KD), torch.zeros_like(prototypes_CD)
    total = features_KD.new_zeros(())
    entries = _CHUNK_ENTRIES if features_KD.device.type == "cpu" else _CHUNK_ENTRIES_GPU
    rows = max(_CHUNK_ROWS, entries // (features + classes))
    memory_RM = features_KD.new_empty(min(rows, anchors.stop - anchors.start), features + classes)
    for first in range(anchors.start, anchors.stop, rows):
        chunk_RD = features_KD[first : min(first + rows, anchors.stop)] / temperature
        scores_RM = memory_RM[: len(chunk_RD)]
        of_features_RK, of_prototypes_RC = scores_RM[:, :features], scores_RM[:, features:]
        torch.mm(chunk_RD, features_KD.T, out=of_features_RK)
        torch.mm(chunk_RD, prototypes_CD.T, out=of_prototypes_RC)
        scores_RM -= log_columns_M
        total += _divergence_and_gradient(scores_RM, labels_K, members_K, first)
        of_chunk_RD = grad_features_KD[first : first + len(chunk_RD)]
        of_chunk_RD.addmm_(of_features_RK, features_KD, alpha=1 / (temperature * features))
        of_chunk_RD.addmm_(of_prototypes_RC, prototypes_CD, alpha=1 / (temperature * features))
        grad_features_KD.addmm_(of_features_RK.T, chunk_RD, alpha=1 / features)  # the chunk's share as columns
        grad_prototypes_CD.addmm_(of_prototypes_RC.T, chunk_RD, alpha=1 / features)
    return total / features, grad_features_KD, grad_prototypes_CD


def _divergence_and_gradient(scores_RM: Tensor, labels_K: Tensor, members_K: Tensor, first: int) -> Tensor:
    """The sum of the losses L_i of a chunk of anchors, of which `first` is the first; `scores_RM` becomes its gradient.

    All positives of an anchor have one weight, n = |P|, so L_i = -sum_p q_ip (log softmax_p - log q_ip) with the scores
    s_ik - log w_ik and q = 1 / n on the positives. That is KL(q || softmax), and its gradient in the scores is
    softmax - q. `scores_RM` come with the weights of another class; `members_K` is n of each feature's class.
    """
    features = len(labels_K)
    of_features_RK, of_prototypes_RC = scores_RM[:, :features], scores_RM[:, features:]
    own_R1 = labels_K[first : first + len(scores_RM), None]  # where the prototype of the anchor's class is
    members_R1 = members_K[first : first + len(scores_RM), None]
    target_R1 = 1 / members_R1  # q at the prototype; at the features:
    target_RK = (own_R1 == labels_K) * target_R1
    target_RK.diagonal(first).zero_()
    # In the anchor's own class one column fewer counts, as the anchor itself does not.
    of_features_RK.addcmul_(target_RK, members_R1 * target_R1.log1p())
    of_prototypes_RC.scatter_add_(1, own_R1, target_R1.log1p())
    at_positives_R1 = of_prototypes_RC.gather(1, own_R1) * target_R1
    at_positives_R1 += torch.linalg.vecdot(of_features_RK, target_RK)[:, None]
    of_features_RK.diagonal(first).fill_(float("-inf"))
    highest_R1 = scores_RM.amax(1, keepdim=True)
    # From here on the scores are their own gradients: softmax - q. The largest softmax is that of the highest score,
    # and tells the logarithm of the sum.
    torch.softmax(scores_RM, 1, out=scores_RM)
    log_sum_R1 = highest_R1 - scores_RM.amax(1, keepdim=True).log_()
    of_features_RK -= target_RK
    of_prototypes_RC.scatter_add_(1, own_R1, -target_R1)
    return (log_sum_R1 - at_positives_R1 - members_R1.log()).sum()


def flat(features_BVD: Tensor, labels_B: Tensor, rows: slice) -> tuple[Tensor, Tensor, slice]:
    """All features as `[K, D]`, in float32 at least, their labels `[K]`, and which of them are anchors."""
    if features_BVD.ndim != 3:
        raise ValueError(f"features must be [B, V, D], not {list(features_BVD.shape)}")
    if labels_B.shape != features_BVD.shape[:1]:
        raise ValueError(f"{len(features_BVD)} images have features but labels are {list(labels_B.shape)}")
    views = features_BVD.shape[1]
    first, end, _ = rows.indices(len(labels_B))
    anchors = slice(first * views, end * views)
    return at_least_float32(features_BVD).flatten(0, 1), labels_B.repeat_interleave(views), anchors


class LogitAdjustedCrossEntropy(nn.Module):
    """See `logit_adjusted_cross_entropy`. `class_counts`: training images of each class, ValueError if 0.

    >>> loss = equipoise.LogitAdjustedCrossEntropy([90, 10])
    >>> loss(torch.zeros(1, 2), torch.tensor([1]))  # -log 0.1
    tensor(2.3026)
    """

    def __init__(self, class_counts: Sequence[int] | Tensor, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = tau
        self.log_prior_C = nn.Buffer(log_prior(torch.as_tensor(class_counts)), persistent=False)

    def forward(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return logit_adjusted_cross_entropy(logits_BC, labels_B, self.log_prior_C, self.tau)


class BalancedContrastiveLoss(nn.Module):
    """See `balanced_contrastive_loss`. Any number of views V >= 1.

    >>> prototypes_CD, labels_B = torch.eye(3), torch.tensor([0, 0, 1])
    >>> features_BVD = prototypes_CD[labels_B][:, None].repeat(1, 2, 1)  # two views of each image
    >>> equipoise.BalancedContrastiveLoss(temperature=0.5)(features_BVD, labels_B, prototypes_CD)
    tensor(0.2395)
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, features_BVD: Tensor, labels_B: Tensor, prototypes_CD: Tensor) -> Tensor:
        return balanced_contrastive_loss(features_BVD, labels_B, prototypes_CD, self.temperature)
