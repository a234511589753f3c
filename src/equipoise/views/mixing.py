"""Two views of the classifier become one, and so do their labels: where, and by how much.

Which image comes second depends on the place in the epoch alone, and what is drawn for it on (seed, epoch, draw), so
that a mixed view is the same in any batch and process. Shapes: G images of a batch, S the side of a view.
"""

import numpy as np
from torch import Tensor

from equipoise.config.recipe import Views
from equipoise.views.draws import Array, Numbers, Whole, draws

_PROBABILITY = 0.5  # that a box is pasted at all, as in the authors' code of CutMix and CMO


def second_draws(mix: str, seed: int, epoch: int, labels_N: Whole, sampler: str, epochs: int) -> Whole:
    """Of each place of the epoch the second image, with a draw number (`draws`) that no first image has, so that its
    view is another. It is drawn as the first ones are; for CMO class-balanced, as there each image has the weight 1 / n
    of its class of n (Park et al., CVPR 2022)."""
    count = len(labels_N)
    sampler = "class-balanced" if mix == "cmo" else sampler
    # A recipe's seed is below 2^31.
    return draws(seed + 2**31, epoch, labels_N, sampler, epochs) + count**2


def mixing(settings: Views, seed: int, epoch: int, others_G: Whole) -> tuple[Whole, Array, Array]:
    """For these second images: the box that is mixed, `[G, 4]` (top, left, bottom, right), how much of the first image
    stays inside it, `[G]`, and the first one's share of the whole, `[G]`, which is its label's too: 1 without a box.

    With lambda from Beta(alpha, alpha), 'mixup' is lambda of the first and 1 - lambda of the second image (Zhang et
    al., ICLR 2018). 'cutmix' and 'cmo' paste a box of the second one, with p = .5: its centre is uniform, its sides
    are sqrt(1 - lambda) of the image's, and what lies outside is cut off (Yun et al., ICCV 2019).
    """
    from scipy.special import betaincinv

    side, numbers = settings.size, Numbers(seed, epoch, others_G, 1)  # 0 is the stream of the second image's view
    lambda_G: Array = betaincinv(settings.mix_alpha, settings.mix_alpha, numbers.next())
    if settings.mix == "mixup":
        return np.broadcast_to([0, 0, side, side], (len(others_G), 4)), lambda_G, lambda_G
    half_G = (side * np.sqrt(1 - lambda_G)).astype(np.int64) // 2
    half_G[numbers.next() >= _PROBABILITY] = 0
    centre_G4 = np.stack([numbers.whole(side), numbers.whole(side)] * 2, axis=1)
    boxes_G4 = (centre_G4 + half_G[:, None] * [-1, -1, 1, 1]).clip(0, side)
    area_G = (boxes_G4[:, 2] - boxes_G4[:, 0]) * (boxes_G4[:, 3] - boxes_G4[:, 1])
    return boxes_G4, np.zeros(len(others_G)), 1 - area_G / side**2


def mix_in(view_3SS: Tensor, other_3SS: Tensor, box: tuple[int, int, int, int], kept: float) -> None:
    """Mix the second view into the first one, both uint8, in its place; rounded to whole levels."""
    top, left, bottom, right = box
    first, second = (view[:, top:bottom, left:right] for view in (view_3SS, other_3SS))
    first.copy_((kept * first + (1 - kept) * second).round_())
