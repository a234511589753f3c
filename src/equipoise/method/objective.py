"""What a method trains with: the loss of a batch, and what it needs for it.

Shapes: B images of this rank, G images of the whole batch, V contrastive views, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from equipoise.config.recipe import Loss
from equipoise.method.losses import ALL, log_prior, logit_adjusted_cross_entropy
from equipoise.method.network import Outputs

Terms = dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Base of all methods. Persistent buffers are its state: a checkpoint keeps them. They follow from the whole batch,
    so are the same on every rank, and are changed in place, as a recorded step reads the same memory every time.
    Parameters are trained like the network's, without weight decay."""

    contrastive: ClassVar[bool] = False  # it needs two further views of each image, and a projection
    shares_views: ClassVar[bool] = False  # those two views train the classifier too, which has none of its own
    prototypes: ClassVar[bool] = False
    cosine: ClassVar[bool] = False  # it needs a cosine classifier
    smooths: ClassVar[bool] = True  # it takes label smoothing
    resamples: ClassVar[bool] = True  # it takes other samplers than 'instance'
    mixes: ClassVar[bool] = True  # its classification loss is a `mean`, and so takes mixed images
    must_mix: ClassVar[bool] = False  # it is another method without them
    records: ClassVar[bool] = True  # its step can be recorded as a CUDA graph
    momentum: ClassVar[float] = 0.0  # above 0: features of the last view are those of a copy that follows the network
    seed: int = 0  # of the next step: what it draws at random follows from this, on all ranks alike
    mixed: tuple[Tensor, ...] = ()  # of the batch: of each image the second label, and the share of the first, `[G]`
    log_prior_C: Tensor
    counts_C: Tensor

    def __init__(self, loss: Loss, class_counts_C: Tensor, width: int = 0) -> None:
        """`loss`: the recipe's table. `class_counts_C`: images of each class that are drawn in an epoch.
        `width`: of the contrastive features."""
        super().__init__()
        self.settings = loss
        self.momentum_copy: nn.Sequential | None = None  # of the network; it is saved with the rest
        self.register_buffer("counts_C", class_counts_C.double(), persistent=False)
        self.register_buffer("log_prior_C", log_prior(class_counts_C), persistent=False)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called once before the first step of each epoch (from 0) of so many."""

    @abstractmethod
    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        """Named terms, of which `loss` is the total. Of several ranks, each has the part of its `rows` of the batch: a
        sum over these images, divided by G. The parts add up.

        `outputs` has the logits of these rows, `[B, C]` (`[B, V, C]` where views are shared), and the features of the
        whole batch, `[G, V, D]`.
        """

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        """`[C]`, float64: log of the class prior, up to a constant, under which the softmax of the raw logits is the
        posterior: p, where the loss leaves logits and images alone. `progress`: the share of the epochs that are done.
        """
        return self.log_prior_C.double()

    def _adjusted(self, outputs: Outputs, labels_G: Tensor, rows: slice, tau: float) -> Tensor:
        """The share that these rows have of the batch's logit-adjusted cross-entropy."""
        logits_BC, how = outputs.logits_BC, (self.log_prior_C, tau, "none", self.settings.label_smoothing)
        return self.mean(lambda labels_B: logit_adjusted_cross_entropy(logits_BC, labels_B, *how), labels_G, rows)

    def mean(
        self, losses: Callable[[Tensor], Tensor], labels_G: Tensor, rows: slice, weights_C: Tensor | None = None
    ) -> Tensor:
        """The share that these rows have of the batch's mean of `losses`, which makes of labels `[B]` losses `[B]`;
        with `weights_C`, divided by the sum of the labels' weights, as in torch. Mixed images have both labels, each by
        its share."""

        def summed(made: Callable[[Tensor], Tensor], rows: slice) -> Tensor:
            if not self.mixed:
                return made(labels_G[rows]).sum()
            others_B, shares_B = (of_G[rows] for of_G in self.mixed)
            return (shares_B * made(labels_G[rows]) + (1 - shares_B) * made(others_B)).sum()

        return summed(losses, rows) / (len(labels_G) if weights_C is None else summed(weights_C.__getitem__, ALL))


class TwoBranch(Objective):
    """alpha * logit-adjusted cross-entropy + beta * a contrastive loss of the two further views."""

    contrastive = True

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        classification = self._adjusted(outputs, labels_G, rows, self.settings.tau)
        contrastive = self.contrast(outputs, labels_G, rows)
        total = self.settings.alpha * classification + self.settings.beta * contrastive
        return {"loss": total, "classification": classification, "contrastive": contrastive}

    @abstractmethod
    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        """The contrastive loss of these rows, divided by G."""

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        """Training makes softmax(logits + tau * log p) estimate the posterior under the prior p of what is drawn, so
        that logits = log-likelihood + (1 - tau) * log p: the prior is uniform at tau = 1."""
        return (1 - self.settings.tau) * super().log_prior_of_logits()
