"""The methods, each by its name in a recipe. Those of a few lines are here, the others in files of their own.

Shapes: B images of this rank, G images of the whole batch, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.config.recipe import Loss, Method, Recipe
from equipoise.method.bcl import Bcl, SupCon
from equipoise.method.concutmix import ConCutMix
from equipoise.method.gml import Gml
from equipoise.method.kcl import Kcl, Tsc
from equipoise.method.losses import at_least_float32
from equipoise.method.network import COSINE_SCALE, Outputs
from equipoise.method.objective import Objective, Terms
from equipoise.method.paco import GPaCo, PaCo
from equipoise.method.proco import ProCo


class CrossEntropy(Objective):
    """Plain cross-entropy."""

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        return {"loss": self._adjusted(outputs, labels_G, rows, 0.0)}

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        smoothing, prior_C = self.settings.label_smoothing, super().log_prior_of_logits().exp()
        return ((1 - smoothing) * prior_C + smoothing / len(prior_C)).log()  # of the labels as they are smoothed


class LogitAdjusted(Objective):
    """Cross-entropy of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10); at tau 1 that is Balanced Softmax
    (Ren et al., NeurIPS 2020)."""

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        return {"loss": self._adjusted(outputs, labels_G, rows, self.settings.tau)}

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        return (1 - self.settings.tau) * super().log_prior_of_logits()


def class_weights(class_counts_C: Tensor, beta: float) -> Tensor:
    """`[C]`, in sum C: each class by 1 / its effective number of images, (1 - beta) / (1 - beta^n) (Cui et al., CVPR
    2019, eq. 4); by 1 / n at beta = 1, by 1 at 0."""
    counts_C = class_counts_C.double()
    weights_C = 1 / counts_C if beta == 1 else (1 - beta) / (1 - beta**counts_C)
    return weights_C * (len(counts_C) / weights_C.sum())


class ClassWeights(CrossEntropy):
    """Cross-entropy in which a class counts by its weight: 1 / its effective number of images (Cui et al., CVPR 2019).
    The mean is torch's, which divides by the weights of the batch's images, not by their number."""

    def __init__(self, loss: Loss, class_counts_C: Tensor, width: int = 0) -> None:
        super().__init__(loss, class_counts_C, width)
        self.register_buffer("weights_C", class_weights(class_counts_C, loss.effective_beta), persistent=False)

    weights_C: Tensor

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        logits_BC, smoothing = at_least_float32(outputs.logits_BC), self.settings.label_smoothing
        weights_C = self.weights_C.to(logits_BC)

        def losses(labels_B: Tensor) -> Tensor:
            return F.cross_entropy(logits_BC, labels_B, weights_C, reduction="none", label_smoothing=smoothing)

        return {"loss": self.mean(losses, labels_G, rows, weights_C)}

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        return super().log_prior_of_logits() + self.weights_C.double().log()


def focal_loss(logits_BC: Tensor, labels_B: Tensor, gamma: float) -> Tensor:
    """`[B]`: (1 - p_y)^gamma * cross-entropy, p_y the probability of the label (Lin et al., ICCV 2017, eq. 4)."""
    loss_B = F.cross_entropy(at_least_float32(logits_BC), labels_B, reduction="none")
    share_B = -torch.expm1(-loss_B)
    return share_B.clamp(min=1e-12) ** gamma * loss_B  # below 1, the exponent has no finite slope at 0


class Focal(Objective):
    """The focal loss (Lin et al., ICCV 2017), which weights hard images. Of the counts it knows nothing."""

    smooths = False

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        gamma = self.settings.gamma
        return {"loss": self.mean(lambda labels_B: focal_loss(outputs.logits_BC, labels_B, gamma), labels_G, rows)}


def ldam_margins(class_counts_C: Tensor, largest: float = 0.5) -> Tensor:
    """`[C]`: largest * (n_min / n)^(1/4) (Cao et al., NeurIPS 2019, eq. 13)."""
    return largest * (class_counts_C.min() / class_counts_C.double()) ** 0.25


_DEFERRED = 0.8  # of the epochs have no weights


class LdamDrw(Objective):
    """Label-distribution-aware margins: the cosine of the label's class less its margin; cross-entropy of 30 times the
    cosines, in the last fifth of the epochs weighted by effective numbers (Cao et al., NeurIPS 2019, algorithm 1)."""

    cosine, smooths, resamples = True, False, False
    margins_C: Tensor
    deferred_C: Tensor
    weights_C: Tensor

    def __init__(self, loss: Loss, class_counts_C: Tensor, width: int = 0) -> None:
        super().__init__(loss, class_counts_C, width)
        self.register_buffer("margins_C", ldam_margins(class_counts_C), persistent=False)
        self.register_buffer("deferred_C", class_weights(class_counts_C, loss.effective_beta), persistent=False)
        self.register_buffer("weights_C", torch.ones(len(class_counts_C), dtype=torch.float64))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        deferred = (epoch + 1) / epochs > _DEFERRED
        self.weights_C.copy_(self.deferred_C if deferred else torch.ones_like(self.weights_C))

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        logits_BC = at_least_float32(outputs.logits_BC)
        weights_C = self.weights_C.to(logits_BC)

        def losses(labels_B: Tensor) -> Tensor:
            margins_B1 = COSINE_SCALE * self.margins_C.to(logits_BC)[labels_B][:, None]
            less_BC = logits_BC.scatter_add(1, labels_B[:, None], -margins_B1)
            return F.cross_entropy(less_BC, labels_B, weights_C, reduction="none")

        return {"loss": self.mean(losses, labels_G, rows, weights_C)}

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        return super().log_prior_of_logits() + (progress > _DEFERRED) * self.deferred_C.double().log()


class VectorScaling(LogitAdjusted):
    """Cross-entropy of (n / n_max)^gamma * logits + tau * log prior (VS loss: Kini et al., NeurIPS 2021, eq. 3)."""

    scales_C: Tensor

    def __init__(self, loss: Loss, class_counts_C: Tensor, width: int = 0) -> None:
        super().__init__(loss, class_counts_C, width)
        self.register_buffer("scales_C", (self.counts_C / self.counts_C.max()) ** loss.gamma, persistent=False)

    def forward(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Terms:
        scaled_BC = at_least_float32(outputs.logits_BC) * self.scales_C.to(outputs.logits_BC)
        return super().forward(outputs._replace(logits_BC=scaled_BC), labels_G, rows)


METHODS: dict[Method, type[Objective]] = {
    "balanced-softmax": LogitAdjusted,
    "bcl": Bcl,
    "ce": CrossEntropy,
    "class-weights": ClassWeights,
    "concutmix": ConCutMix,
    "focal": Focal,
    "gml": Gml,
    "gpaco": GPaCo,
    "kcl": Kcl,
    "ldam-drw": LdamDrw,
    "logit-adjusted": LogitAdjusted,
    "paco": PaCo,
    "proco": ProCo,
    "supcon+la": SupCon,
    "tsc": Tsc,
    "vs": VectorScaling,
}


def objective_of(recipe: Recipe, class_counts: Sequence[float]) -> Objective:
    """The recipe's method, for classes of which so many images are drawn in an epoch."""
    return METHODS[recipe.method](
        recipe.loss, torch.as_tensor(class_counts, dtype=torch.float64), recipe.model.feature_dim
    )
