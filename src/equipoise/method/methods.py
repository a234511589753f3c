"""The methods, each by its name in a recipe. Those of a few lines are here, the others in files of their own.

Shapes: B images of this rank, G images of the whole batch, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.config.recipe import Method, Recipe
from equipoise.method.bcl import Bcl, ConCutMix, SupCon
from equipoise.method.kcl import Kcl, Tsc
from equipoise.method.losses import at_least_float32
from equipoise.method.objective import COSINE_SCALE, Objective, Outputs
from equipoise.method.proco import ProCo
from equipoise.method.queues import Gml, GPaCo, PaCo


class CrossEntropy(Objective):
    """Plain cross-entropy."""

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        smoothing, prior_C = self.settings.label_smoothing, super().log_prior_of_logits().exp()
        return ((1 - smoothing) * prior_C + smoothing / len(prior_C)).log()  # of the labels as they are smoothed


class LogitAdjusted(Objective):
    """Cross-entropy of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10); at tau 1 that is Balanced Softmax
    (Ren et al., NeurIPS 2020)."""

    adjusts = True


def class_weights(class_counts_C: Tensor, beta: float) -> Tensor:
    """`[C]`, in sum C: each class by 1 / its effective number of images, (1 - beta) / (1 - beta^n) (Cui et al., CVPR
    2019, eq. 4); by 1 / n at beta = 1, by 1 at 0."""
    counts_C = class_counts_C.double()
    weights_C = 1 / counts_C if beta == 1 else (1 - beta) / (1 - beta**counts_C)
    return weights_C * (len(counts_C) / weights_C.sum())


class ClassWeights(CrossEntropy):
    """Cross-entropy in which a class counts by its weight: 1 / its effective number of images (Cui et al., CVPR 2019).
    The mean is torch's, which divides by the weights of the batch's images, not by their number."""

    def build(self, width: int) -> None:
        self.weights_C = nn.Buffer(class_weights(self.counts_C, self.settings.effective_beta), persistent=False)

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        return super().log_prior_of_logits() + self.get_buffer("weights_C").double().log()


class Focal(Objective):
    """The focal loss (Lin et al., ICCV 2017), which weights hard images: (1 - p_y)^gamma * cross-entropy, p_y the
    probability of the label. Of the counts it knows nothing."""

    smooths = False

    def losses(self, logits_BC: Tensor, labels_B: Tensor, weights_C: Tensor | None) -> Tensor:
        loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
        share_B = -torch.expm1(-loss_B)
        return share_B.clamp(min=1e-12) ** self.settings.gamma * loss_B  # below 1, no finite slope at 0


class LdamDrw(Objective):
    """Label-distribution-aware margins: the cosine of the label's class less its margin; cross-entropy of 30 times the
    cosines, in the last fifth of the epochs weighted by effective numbers (Cao et al., NeurIPS 2019, algorithm 1)."""

    cosine, smooths, resamples = True, False, False
    plain = 0.8  # of the epochs have no weights

    def build(self, width: int) -> None:
        self.margins_C = nn.Buffer(0.5 * (self.counts_C.min() / self.counts_C) ** 0.25, persistent=False)  # eq. 13
        self.deferred_C = nn.Buffer(class_weights(self.counts_C, self.settings.effective_beta), persistent=False)
        self.weights_C = nn.Buffer(torch.ones_like(self.deferred_C))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        deferred = (epoch + 1) / epochs > self.plain
        self.get_buffer("weights_C").copy_(self.deferred_C if deferred else torch.ones_like(self.deferred_C))

    def losses(self, logits_BC: Tensor, labels_B: Tensor, weights_C: Tensor | None) -> Tensor:
        margins_B1 = COSINE_SCALE * self.margins_C.to(logits_BC)[labels_B][:, None]
        return super().losses(logits_BC.scatter_add(1, labels_B[:, None], -margins_B1), labels_B, weights_C)

    def log_prior_of_logits(self, progress: float = 1.0) -> Tensor:
        return super().log_prior_of_logits() + (progress > self.plain) * self.deferred_C.double().log()


class VectorScaling(LogitAdjusted):
    """Cross-entropy of (n / n_max)^gamma * logits + tau * log prior (VS loss: Kini et al., NeurIPS 2021, eq. 3)."""

    def build(self, width: int) -> None:
        self.scales_C = nn.Buffer((self.counts_C / self.counts_C.max()) ** self.settings.gamma, persistent=False)

    def classification(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        scaled_BC = at_least_float32(outputs.logits_BC) * self.scales_C.to(outputs.logits_BC)
        return super().classification(outputs._replace(logits_BC=scaled_BC), labels_G, rows)


def remedies(class_counts: Sequence[int], beta: float = 0.9999) -> list[tuple[str, Tensor, str]]:
    """What the usual remedies against class imbalance would do to a training set with n images of each class: each
    remedy, a figure of each class, and what this is. A sampler that takes a class with a probability in proportion to
    n^q draws an image of it N n^(q - 1) / sum n^q times in an epoch of N draws (Kang et al., ICLR 2020, eq. 1); q is 0
    and 1/2. Logit adjustment moves the margin against the largest class by log(n_max / n) (Menon et al., eq. 11)."""
    n_C = torch.tensor(class_counts, dtype=torch.float64)
    margin_C = (n_C.max() / n_C).log()
    return [
        ("class weights 1/n", class_weights(n_C, 1), "weight in the loss, of mean 1"),
        ("  by effective number", class_weights(n_C, beta), f"the same, beta {beta}"),
        ("class-balanced sampler", n_C.mean() / n_C, "draws of each image an epoch"),
        ("square-root sampler", n_C.sum() / n_C.sqrt().sum() / n_C.sqrt(), "the same"),
        ("logit adjustment", margin_C, "margin added against the largest"),
        ("BCL", margin_C, "the same, and contrast with class means"),
    ]


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
    counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
    return METHODS[recipe.method](recipe.loss, counts_C, recipe.model.feature_dim)
