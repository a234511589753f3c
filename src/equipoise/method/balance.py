"""What the usual remedies against class imbalance would do to a training set, from its class counts alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from equipoise.method.methods import class_weights


def remedies(class_counts: Sequence[int], beta: float = 0.9999) -> list[tuple[str, npt.NDArray[np.float64], str]]:
    """Each remedy, a figure of each class, and what this is; for C classes of n images each, all positive.

    Class weights are scaled to mean 1; by the effective number of images (Cui et al., CVPR 2019, eq. 4) they are
    1 / (1 - beta^n). A sampler that takes a class with a probability in proportion to n^q draws an image of it
    N n^(q - 1) / sum n^q times in an epoch of N draws (Kang et al., ICLR 2020, eq. 1); q is 0 and 1/2. Logit adjustment
    moves the margin against the largest class by log(n_max / n) (Menon et al., ICLR 2021, eq. 11, with tau = 1).
    """
    n_C = np.array(class_counts, np.float64)
    inverse_C, effective_C = (class_weights(torch.from_numpy(n_C), of).numpy() for of in (1, beta))
    margin_C = np.log(n_C.max() / n_C)
    return [
        ("class weights 1/n", inverse_C, "weight in the loss, of mean 1"),
        ("  by effective number", effective_C, f"the same, beta {beta}"),
        ("class-balanced sampler", n_C.mean() / n_C, "draws of each image an epoch"),
        ("square-root sampler", n_C.sum() / np.sqrt(n_C).sum() / np.sqrt(n_C), "the same"),
        ("logit adjustment", margin_C, "margin added against the largest"),
        ("BCL", margin_C, "the same, and contrast with class means"),
    ]
