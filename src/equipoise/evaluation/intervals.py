"""95 % intervals of accuracies over test images: how far other images would move them, not how far other seeds.

Shapes: N images, C classes, V values that an image can have, G accuracies, R replicates.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from equipoise.evaluation.metrics import Fractions, Labels, Predictions, figure_weights

_Z, _REPLICATES = NormalDist().inv_cdf(0.975), 2000
_CLASSES = 64  # resampled at a time, so that thousands of classes take little memory


def wilson(shares: Fractions | float, images: Labels | int) -> Fractions:
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
    """`intervals` and `per_class_intervals` of `PartMetrics`. Top-1 and each class have Wilson's, means over classes
    the bootstrap's; but where fewer than two classes have both right and wrong images, resampling shows next to
    nothing, and the mean has Wilson's for as many images as its classes have together."""
    labels_N = predictions.labels_N
    images_C = np.bincount(labels_N, minlength=classes)
    hits_C = np.bincount(labels_N[predictions.ranked_NK[:, 0] == labels_N], minlength=classes)
    shares_C, mixed_C = hits_C / np.maximum(images_C, 1), (hits_C > 0) & (hits_C < images_C)
    weights = figure_weights(images_C, train_counts_C)
    bounds = bootstrap(np.stack([images_C - hits_C, hits_C], 1), np.array([0.0, 1.0]), weights)
    for figure, of_C in weights.items():
        if figure == "top1" or mixed_C[of_C > 0].sum() < 2:
            bounds[figure] = wilson(float(np.average(shares_C, weights=of_C)), int(images_C[of_C > 0].sum()))
    of_classes = zip(wilson(shares_C, np.maximum(images_C, 1)).round(4).tolist(), images_C, strict=True)
    return {figure: of.round(4).tolist() for figure, of in bounds.items()}, [of if n else None for of, n in of_classes]
