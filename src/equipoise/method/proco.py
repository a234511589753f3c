"""Probabilistic Contrastive Learning (Du et al., T-PAMI 2024, arXiv:2403.06726): the contrastive branch compares with a
von Mises-Fisher distribution of the features of each class, as if all features that it could draw were in the batch.

Shapes: B images of this rank, G images of the whole batch, V contrastive views, C classes, D width of the features.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.method.losses import KnownGradients, at_least_float32
from equipoise.method.objective import Outputs, TwoBranch

_LARGEST_KAPPA = 1e5
_CHUNK_ENTRIES = 100_000  # whose intermediate values stay in a core's cache
_LEAST_ORDER = 32.0  # from which the expansion below is exact to 1e-14


def log_bessel_difference(order: float, square_C: Tensor, added_BC: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, C]`: by how much f(kappa) = log I(kappa) - order * log(kappa), for the modified Bessel function I of the
    first kind, is larger where kappa^2 is `square_C` + `added_BC` than where it is `square_C`. And f'(kappa) / kappa at
    the former; f' is the ratio of I of order + 1 to I.

    By the uniform expansion for large orders (DLMF 10.41.3); a small order is reached from a larger one by the
    recurrence DLMF 10.29.1, downwards, where it is stable. With the power of kappa divided out, nothing overflows;
    the difference of large values is never taken, so that float32 is exact to 1e-6."""
    above = max(math.ceil(_LEAST_ORDER - order), 0)
    top = order + above
    root_C, series_C, ratio_C = _expansion(top, square_C)
    root_BC, series_BC, ratio_BC = _expansion(top, square_C + added_BC)
    further_BC = added_BC / (root_BC + root_C)
    product_BC = (series_BC / series_C).square_() * root_C / root_BC
    for between in range(above):
        below_C, below_BC = (
            2 * (top - between) + square * ratio
            for square, ratio in ((square_C, ratio_C), (square_C + added_BC, ratio_BC))
        )
        product_BC *= (below_BC / below_C).square_()
        ratio_C, ratio_BC = 1 / below_C, 1 / below_BC
    difference_BC = further_BC - top * torch.log1p(further_BC / (top + root_C)) + 0.5 * product_BC.log_()
    return difference_BC, ratio_BC


def _expansion(order: float, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The root of order^2 + kappa^2; the series in t, their quotient; and f'(kappa) / kappa."""
    root = (order * order + square).sqrt_()
    t = order / root
    coefficients = _coefficients(order, torch.finfo(square.dtype).eps)
    series, slope = torch.full_like(t, coefficients[-1]), torch.zeros_like(t)
    for coefficient in reversed(coefficients[:-1]):  # Horner's rule, for the derivative too
        slope.mul_(t).add_(series)
        series.mul_(t).add_(coefficient)
    return root, series, 1 / (order + root) - (0.5 + slope / series * t) / root**2


@cache
def _coefficients(order: float, eps: float) -> list[float]:
    """Of the polynomial in t, the sum of u_k(t) / order^k (DLMF 10.41.9), as far as its terms are above eps."""
    from numpy.polynomial import Polynomial

    t, total = Polynomial([0, 1]), Polynomial([1])
    term = total
    for number in range(1, 40):
        term = 0.5 * t**2 * (1 - t**2) * term.deriv() + ((1 - 5 * t**2) * term).integ() / 8
        added = term / order**number
        if abs(added(torch.linspace(0, 1, 101).numpy())).max() < eps:
            break
        total += added
    return total.coef.tolist()


class ProCo(TwoBranch):
    """Logit-adjusted cross-entropy and, beside it, that of the scores of vMF distributions, which are estimated over
    the epoch before and this one (Du et al., T-PAMI 2024)."""

    def build(self, width: int) -> None:
        random = torch.Generator().manual_seed(0)
        start_CD = 0.9 * F.normalize(torch.randn(len(self.counts_C), width, generator=random), dim=1)
        self.start_CD = nn.Buffer(start_CD, persistent=False)
        self.means_2CD = nn.Buffer(start_CD.repeat(2, 1, 1))  # in use, and of this epoch alone
        self.counts_2C = nn.Buffer(torch.zeros(2, len(self.counts_C)))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if epoch:
            self.means_2CD.copy_(torch.stack([self.means_2CD[1], self.start_CD]))
            self.counts_2C.copy_(torch.stack([self.counts_2C[1], torch.zeros_like(self.counts_2C[0])]))

    def kappa(self) -> Tensor:
        """`[C]`: the concentrations, from the lengths of the means, as in the authors' code; at most 1e5."""
        length_C = self.means_2CD[0].norm(dim=1)
        kappa_C = self.means_2CD.shape[2] * length_C / (1 - length_C**2)
        return torch.where(kappa_C < 0, _LARGEST_KAPPA, kappa_C).clamp(max=_LARGEST_KAPPA)

    @torch.no_grad()
    def update(self, features_GD: Tensor, labels_G: Tensor) -> None:
        """Take a batch into the means of its classes."""
        self.counts_2C.index_add_(1, labels_G, torch.ones_like(self.counts_2C[:, :1]).expand(2, len(labels_G)))
        for means_CD, counts_C in zip(self.means_2CD, self.counts_2C, strict=True):
            change_GD = (features_GD - means_CD[labels_G]) / counts_C[labels_G, None]
            means_CD.index_add_(0, labels_G, change_GD.to(means_CD))

    def scores(self, features_BD: Tensor) -> Tensor:
        """`[B, C]`: the log of the mean of exp(z . z' / temperature) over the features z' of a class. The derivative in
        the cosine of z with the mean direction is computed with it."""
        means_CD = self.means_2CD[0].to(features_BD.dtype, copy=True)  # as they are before the next view
        cosines_BC = features_BD @ means_CD.T / means_CD.norm(dim=1)
        scores_BC, slopes_BC = torch.empty_like(cosines_BC), torch.empty_like(cosines_BC)
        kappa_C, scale, order = self.kappa().to(cosines_BC), 1 / self.settings.temperature, means_CD.shape[1] / 2 - 1
        rows = max(_CHUNK_ENTRIES // len(kappa_C) if cosines_BC.device.type == "cpu" else len(cosines_BC), 1)
        for first in range(0, len(cosines_BC), rows):
            chunk = slice(first, first + rows)
            # The features have length 1: |kappa * mean direction + z / temperature|^2 is kappa^2 and what is added.
            added_BC = 2 * scale * kappa_C * cosines_BC.detach()[chunk] + scale**2
            scores_BC[chunk], ratio_BC = log_bessel_difference(order, kappa_C**2, added_BC)
            slopes_BC[chunk] = ratio_BC * (scale * kappa_C)
        return KnownGradients.apply(scores_BC, cosines_BC, slopes_BC)  # pyright: ignore[reportReturnType]

    def contrast(self, outputs: Outputs, labels_G: Tensor, rows: slice) -> Tensor:
        total = outputs.logits_BC.new_zeros(())
        for features_GD in at_least_float32(outputs.features_BVD).unbind(1):
            self.update(features_GD.detach(), labels_G)
            scores_BC = self.scores(features_GD[rows]) + self.log_prior_C.to(features_GD)
            total = total + F.cross_entropy(scores_BC, labels_G[rows], reduction="sum")
        return total / (outputs.features_BVD.shape[1] * len(labels_G))
