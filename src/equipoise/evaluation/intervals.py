"""95 % intervals of accuracies over test images: how far other images would move them, not how far other seeds.

Shapes: N images, C classes, V values that an image can have, G accuracies, R replicates.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from equipoise.evaluation.metrics import Fractions, Labels, Predictions, figure_weights

_Z, _REPLICATES = NormalDist().inv_cdf(0.975), 2000
_CLASSES = 64  # resampled at a time, so that thousands of classes take little memory


def wilson(shares: Fractions | float, images: Labels | float) -> Fractions:
    """Wilson's score interval (JASA 1927) of `shares` of so many `images`, both `[...]`: `[..., 2]`, low and high."""
    scale = 1 + _Z**2 / images
    centres = (shares + _Z**2 / (2 * images)) / scale
    halves = _Z * np.sqrt(shares * (1 - shares) / images + (_Z / (2 * images)) ** 2) / scale
    return np.stack([centres - halves, centres + halves], -1).clip(0, 1)


def bootstrap(counts_CV: Labels, values_V: Fractions, weights: Mapping[str, Labels]) -> dict[str, Fractions]:
    """Percentile intervals `[2]` of weighted means over classes of the mean value of their images, resampled within
    the class, from a fixed seed. `counts_CV`: how many images of a class have the value.

    Images of one class and value are alike: resampling is a multinomial draw a class. Of n images n - 1 are drawn: only
    so is the variance unbiased (Rao and Wu, JASA 1988); n draws of n = 3 show two thirds. One image shows none.
    """
    generator = np.random.default_rng(0)
    weights_GC = np.stack([of_C / of_C.sum() for of_C in weights.values()])
    means_GR = np.zeros((len(weights), _REPLICATES))
    for start in range(0, len(counts_CV), _CLASSES):
        rows = slice(start, start + _CLASSES)
        images_C1 = counts_CV[rows].sum(1, keepdims=True)
        drawn_C1, shares_CV = np.maximum(images_C1 - 1, 1), counts_CV[rows] / np.maximum(images_C1, 1)
        draws_CRV = generator.multinomial(drawn_C1, shares_CV[:, None], (len(drawn_C1), _REPLICATES))
        means_GR += weights_GC[:, rows] @ (draws_CRV @ values_V / drawn_C1)
    return dict(zip(weights, np.percentile(means_GR, [2.5, 97.5], axis=1).T, strict=True))


def intervals(
    predictions: Predictions, train_counts_C: Sequence[int], classes: int
) -> tuple[dict[str, list[float]], list[list[float] | None]]:
    """`intervals` and `per_class_intervals` of `PartMetrics`, all Wilson's: of a class for its images; of a mean with
    weights q for 1 / sum(q^2 / n) images, as it varies like the share of so many where all classes are alike. For top-1
    these are all images. How often the truth is covered: `test_intervals.py`."""
    labels_N = predictions.labels_N
    images_C = np.bincount(labels_N, minlength=classes)
    hits_C = np.bincount(labels_N[predictions.ranked_NK[:, 0] == labels_N], minlength=classes)
    shares_C, divisors_C = hits_C / np.maximum(images_C, 1), np.maximum(images_C, 1)
    bounds: dict[str, list[float]] = {}
    for figure, of_C in figure_weights(images_C, train_counts_C).items():
        weights_C = of_C / of_C.sum()
        alike = 1 / float((weights_C**2 / divisors_C).sum())
        bounds[figure] = wilson(float(weights_C @ shares_C), alike).round(4).tolist()
    of_classes = zip(wilson(shares_C, divisors_C).round(4).tolist(), images_C, strict=True)
    return bounds, [of if images else None for of, images in of_classes]
