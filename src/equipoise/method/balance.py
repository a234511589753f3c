"""What the usual remedies against class imbalance would do to a training set, from its class counts alone.

Shape: C classes, of n_c images each, N in all; every function takes the C counts, all positive, and returns C numbers.
"""

import math
from collections.abc import Sequence


def inverse_frequency_weights(class_counts: Sequence[int]) -> list[float]:
    """Class weights of a loss: w_c = 1 / n_c, scaled to mean 1."""
    return _of_mean_one([1 / count for count in class_counts])


def effective_number_weights(class_counts: Sequence[int], beta: float = 0.9999) -> list[float]:
    """Class weights of a loss by the effective number of images (Cui et al., CVPR 2019, eq. 4):
    w_c = (1 - beta) / (1 - beta^n_c), scaled to mean 1."""
    return _of_mean_one([(1 - beta) / -math.expm1(count * math.log(beta)) for count in class_counts])


def draws_of_an_image(class_counts: Sequence[int], power: float) -> list[float]:
    """How often an image of each class is drawn in an epoch of N draws: N * p_c / n_c, where a sampler takes class c
    with probability p_c = n_c^power / sum_j n_j^power (Kang et al., ICLR 2020, eq. 1). power 0 is the class-balanced
    sampler, 1/2 the square-root sampler; 1 would be none."""
    images, total = sum(class_counts), sum(count**power for count in class_counts)
    return [images * count ** (power - 1) / total for count in class_counts]


def adjusted_margins(class_counts: Sequence[int]) -> list[float]:
    """By how much logit adjustment moves the margin of each class against the most frequent one:
    log(n_max / n_c) (Menon et al., ICLR 2021, eq. 11, with tau = 1)."""
    return [math.log(max(class_counts) / count) for count in class_counts]


def _of_mean_one(weights_C: Sequence[float]) -> list[float]:
    mean = sum(weights_C) / len(weights_C)
    return [weight / mean for weight in weights_C]
