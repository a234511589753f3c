"""What a method trains with: the loss of a batch, and what it needs for it.

Shapes: B images of this rank, G images of the whole batch, V contrastive views, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.config.recipe import Loss
from equipoise.method.losses import ALL, at_least_float32, log_prior, logit_adjusted_cross_entropy

COSINE_SCALE = 30.0  # of a cosine classifier's logits
Terms = dict[str, Tensor]


class Outputs(NamedTuple):
    """`features_BVD` is empty without a contrastive branch, `prototypes_CD` where that has no prototypes. Where there
    is a momentum copy, the last view's features are the copy's. `projected`, where there are prototypes: view 0's
    features `[B, D]` and the prototypes before they are normalised, without gradient."""

    logits_BC: Tensor
    features_BVD: Tensor = torch.empty(0)
    prototypes_CD: Tensor = torch.empty(0)
    projected: tuple[Tensor, ...] = ()


class Objective(nn.Module):
    """Base of all methods, by itself cross-entropy. Persistent buffers are its state: a checkpoint keeps them. They
    follow from the whole batch, so are the same on every rank, and are changed in place, as a recorded step reads the
    same memory every time. Parameters are trained like the network's, without weight decay."""

    contrastive: ClassVar[bool] = False  # it needs two further views of each image, and a projection
    shares_views: ClassVar[bool] = False  # those two views train the classifier too, which has none of its own
    prototypes: ClassVar[bool] = False
    cosine: ClassVar[bool] = False  # it needs a cosine classifier
    adjusts: ClassVar[bool] = False  # its cross-entropy is of logits + tau * log prior
    smooths: ClassVar[bool] = True  # it takes label smoothing
    resamples: ClassVar[bool] = True  # it takes other samplers than 'instance'
    mixes: ClassVar[bool] = True  # its classification loss is that of `losses`, and so takes mixed images
    must_mix: ClassVar[bool] = False  # it is another method without them
    records: ClassVar[bool] = True  # its step can be recorded as a CUDA graph
    momentum: ClassVar[float] = 0.0  # above 0: features of the last view are those of a copy that follows the network
    seed: int = 0  # of the next step: what it draws at random follows from this, on all ranks alike
    mixed: tuple[Tensor, ...] = ()  # of the batch: of each image the second label, and the share of the first, `[G]`
    weights_C: Tensor | None  # how much a label of each class counts; None: all alike

    def __init__(self, loss: Loss, class_counts_C: Tensor, width: int = 0) -> None:
        """`loss`: the recipe's table. `class_counts_C`: images of each class that are drawn in an epoch.
        `width`: of the contrastive features."""
        super().__init__()
        self.settings = loss
        self.tau = loss.tau if self.adjusts else 0.0
        self.momentum_copy: nn.Sequential | None = None  # of the network; it is saved with the rest
        self.counts_C = nn.Buffer(class_counts_C.double(), persistent=False)
        self.log_prior_C = nn.Buffer(log_prior(class_counts_C), persistent=False)
        self.register_buffer("weights_C", None)
        self.build(width)

    def build(self, width: int) -> None:
        """Make the buffers and parameters of the method's own. Called once."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called once before the first step of each epoch (from 0) of so many."""

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        """Named terms, of which `loss` is the total. Of several ranks, each has the part of its `rows` of the batch: a
        sum over these images, divided by G. The parts add up. `outputs` has the logits of these rows, `[B, C]` (`[B, V,
        C]` where views are shared), and the features of the whole batch, `[G, V, D]`."""
        return {"loss": self.classification(outputs, labels_G, rows)}

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        """`[C]`, float64: log of the class prior, up to a constant, under which the softmax of the raw logits is the
        posterior. Training makes softmax(logits + tau * log p) estimate that under the prior p of what is drawn, so
        that logits = log-likelihood + (1 - tau) * log p. `progress`: the share of the epochs that are done."""
        return (1 - self.tau) * self.log_prior_C.double()

    def losses(self, logits_BC: Tensor, labels_B: Tensor, weights_C: Tensor | None) -> Tensor:
        """`[B]`: of each image, times the weight of its label. The logits are in float32 at least."""
        how = {"weight": weights_C, "reduction": "none", "label_smoothing": self.settings.label_smoothing}
        return logit_adjusted_cross_entropy(logits_BC, labels_B, self.log_prior_C, self.tau, **how)

    def classification(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        """The share that these rows have of the batch's mean of `losses`; with weights, divided by the sum of those of
        the labels, as in torch. Mixed images have both labels, each by its share."""
        logits_BC = at_least_float32(outputs.logits_BC)
        weights_C = None if self.weights_C is None else self.weights_C.to(logits_BC)

        def summed(of: Callable[[Tensor], Tensor], rows: slice) -> Tensor:
            if not self.mixed:
                return of(labels_G[rows]).sum()
            others_B, shares_B = (of_G[rows] for of_G in self.mixed)
            return (shares_B * of(labels_G[rows]) + (1 - shares_B) * of(others_B)).sum()

        total = summed(lambda labels_B: self.losses(logits_BC, labels_B, weights_C), rows)
        return total / (len(labels_G) if weights_C is None else summed(weights_C.__getitem__, ALL))


class TwoBranch(Objective, ABC):
    """alpha * logit-adjusted cross-entropy + beta * a contrastive loss of the two further views."""

    contrastive = adjusts = True

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        classification = self.classification(outputs, labels_G, rows)
        contrastive = self.contrast(outputs, labels_G, rows)
        total = self.settings.alpha * classification + self.settings.beta * contrastive
        return {"loss": total, "classification": classification, "contrastive": contrastive}

    @abstractmethod
    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        """The contrastive loss of these rows, divided by G."""
