"""Random numbers that depend on (seed, epoch, image index) and on nothing else.

A generator with a state would tie the numbers to the order in which images are read, so to the number of workers
and ranks. Here each number is a hash of where it is used, computed for a whole batch at once.

The hash is the output function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied once per key and then in counter mode. Shapes: B images, G images of a whole batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from equipoise.config.recipe import Views

Array = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_PASTED = 0.5  # probability that a box is pasted at all, as in the authors' code of CutMix and CMO


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Numbers:
    """The random numbers of one view of a batch, in the order in which they are asked for. `indices_B`: places of the
    images in the training list. `stream`: one for each use of an image in an epoch."""

    def __init__(self, seed: int, epoch: int, indices_B: Whole, stream: int) -> None:
        self._key_B = _mix(indices_B.astype(np.uint64) + np.uint64(_GOLDEN))
        for part in (seed, epoch, stream):
            self._key_B = _mix(self._key_B + np.uint64((part + 1) * _GOLDEN % 2**64))
        self._used = 0

    def take(self, count: int) -> Array:
        """`[B, count]` numbers, uniform on [0, 1)."""
        counter_K = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._used += count
        return (_mix(self._key_B[:, None] + counter_K) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def next(self) -> Array:
        """`[B]` numbers, uniform on [0, 1)."""
        return self.take(1)[:, 0]

    def between(self, low: float, high: float) -> Array:
        """`[B]` numbers, uniform on [low, high)."""
        return low + (high - low) * self.next()

    def whole(self, below: int | Whole) -> Whole:
        """`[B]` whole numbers, uniform on 0 .. below - 1."""
        return (self.next() * below).astype(np.int64)

    def sign(self) -> Array:
        """`[B]` times -1 or 1."""
        return np.where(self.next() < 0.5, -1.0, 1.0)


def permutation(seed: int, epoch: int, count: int) -> Whole:
    """The order in which the `count` training images are seen in `epoch`."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def sampled_counts(class_counts: Sequence[int], sampler: str, progress: float = 0.0) -> Array:
    """`[C]`: how often a sampler draws an image of each class in an epoch, in the mean ('instance', 'square-root' or
    'class-balanced'; Kang et al., ICLR 2020, eq. 1, with q = 1, 1/2 and 0). 'progressive' goes from the first to the
    last with `progress`, the share of the epochs that lie before this one (eq. 3)."""
    if sampler == "progressive":
        first_C, last_C = (sampled_counts(class_counts, of) for of in ("instance", "class-balanced"))
        return (1 - progress) * first_C + progress * last_C
    power = {"instance": 1.0, "square-root": 0.5, "class-balanced": 0.0}[sampler]
    drawn_C = np.array(class_counts, np.float64) ** power
    return drawn_C * (sum(class_counts) / drawn_C.sum())


def draws(seed: int, epoch: int, labels_N: Whole, sampler: str, epochs: int = 1) -> Whole:
    """The N draws of `epoch` of so many, in their order: image + N * how often it was drawn before. 'instance' draws
    every image once, the others with replacement: an image that comes again then has other views."""
    count = len(labels_N)
    if sampler == "instance":
        return permutation(seed, epoch, count)
    counts_C = np.bincount(labels_N)
    shares_C = sampled_counts(counts_C.tolist(), sampler, epoch / epochs) / counts_C
    shares_N = shares_C[labels_N]
    images_N = np.random.default_rng((seed, epoch)).choice(count, count, p=shares_N / shares_N.sum())
    order = np.argsort(images_N, kind="stable")
    before = np.empty(count, np.int64)
    before[order] = np.arange(count) - np.searchsorted(images_N[order], images_N[order])
    return images_N + count * before


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
    al., ICLR 2018). 'cutmix' and 'cmo' paste a box of the second one, with p = .5: its centre is uniform, its sides are
    sqrt(1 - lambda) of the image's, and what lies outside is cut off (Yun et al., ICCV 2019)."""
    from scipy.special import betaincinv

    side, numbers = settings.size, Numbers(seed, epoch, others_G, 1)  # 0 is the stream of the second image's view
    lambda_G: Array = betaincinv(settings.mix_alpha, settings.mix_alpha, numbers.next())
    if settings.mix == "mixup":
        return np.broadcast_to([0, 0, side, side], (len(others_G), 4)), lambda_G, lambda_G
    half_G = (side * np.sqrt(1 - lambda_G)).astype(np.int64) // 2
    half_G[numbers.next() >= _PASTED] = 0
    centre_G4 = np.stack([numbers.whole(side), numbers.whole(side)] * 2, axis=1)
    boxes_G4 = (centre_G4 + half_G[:, None] * [-1, -1, 1, 1]).clip(0, side)
    area_G = (boxes_G4[:, 2] - boxes_G4[:, 0]) * (boxes_G4[:, 3] - boxes_G4[:, 1])
    return boxes_G4, np.zeros(len(others_G)), 1 - area_G / side**2
