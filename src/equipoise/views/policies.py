"""Random numbers become decisions: which piece of an image is taken, and which operations change it.

All is decided for a whole batch at once, image by image. `operations.py` carries the decisions out; `views.py` says
which policy makes which view.

Shapes: B images of a batch, K random numbers of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from equipoise.config.recipe import Views
from equipoise.views.draws import Array, Numbers, Whole

_CROP_ATTEMPTS = 10

# By torchvision's and timm's names; the first 15 are RandAugment's.
# fmt: off
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Hue", "Grayscale", "Blur",
)
# fmt: on
RAND_AUGMENT = OPERATIONS[:15]
_ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")
RESAMPLINGS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class BatchOperation:
    """One operation for each image of a batch: its place in OPERATIONS (-1 for none) and its argument, in the unit of
    the operation. `resampling_B` (place in RESAMPLINGS) and `fill` (colour, 0 to 255) are for those that move pixels.
    """

    operation_B: Whole
    argument_B: Array
    resampling_B: Whole | int = 0
    fill: tuple[float, ...] = (0, 0, 0)


def random_boxes(numbers: Numbers, heights_B: Whole, widths_B: Whole, smallest_share: float) -> Whole:
    """`[B, 4]` top, left, height and width of the crops of torchvision's RandomResizedCrop.

    Area uniform in [`smallest_share`, 1] of the image's, log aspect ratio uniform in ±log(4/3); the first of ten
    attempts that fits, or else the largest centred crop with an aspect ratio within those limits.
    """
    shares, ratios = numbers.take(_CROP_ATTEMPTS), numbers.take(_CROP_ATTEMPTS)
    areas = (heights_B * widths_B)[:, None] * (smallest_share + (1 - smallest_share) * shares)
    ratios = np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratios)
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (heights > 0) & (widths <= widths_B[:, None]) & (heights <= heights_B[:, None])
    first = np.arange(len(fits)), fits.argmax(axis=1)
    none = ~fits.any(axis=1)
    width = np.where(none, np.minimum(widths_B, np.rint(heights_B * 4 / 3)), widths[first]).astype(np.int64)
    height = np.where(none, np.minimum(heights_B, np.rint(widths_B / (3 / 4))), heights[first]).astype(np.int64)
    free_height, free_width = heights_B - height, widths_B - width
    top = np.where(none, free_height // 2, numbers.whole(free_height + 1))
    left = np.where(none, free_width // 2, numbers.whole(free_width + 1))
    return np.stack([top, left, height, width], axis=1)


def jitter(numbers: Numbers, amounts: Sequence[float], probability: float) -> list[BatchOperation]:
    """torchvision's ColorJitter, on a share of the images: the operations in an order of each image's own. `amounts`:
    of brightness, contrast, saturation and hue. An operation without an amount is left out."""
    amounts_4, middles_4 = np.array(amounts), np.array([1, 1, 1, 0])
    operations_4 = np.array([OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color", "Hue")])
    operations_4[amounts_4 == 0] = -1
    low_4, high_4 = middles_4 - amounts_4, middles_4 + amounts_4
    chosen_B = numbers.next() < probability
    order_B4 = numbers.take(4).argsort(axis=1)
    values_B4 = low_4 + (high_4 - low_4) * numbers.take(4)
    image_B = np.arange(len(chosen_B))
    return [
        BatchOperation(np.where(chosen_B, operations_4[which_B], -1), values_B4[image_B, which_B])
        for which_B in order_B4.T
    ]


def grayscale(numbers: Numbers, probability: float) -> BatchOperation:
    """torchvision's RandomGrayscale."""
    operation_B = np.where(numbers.next() < probability, OPERATIONS.index("Grayscale"), -1)
    return BatchOperation(operation_B, np.zeros(len(operation_B)))


def blur(numbers: Numbers) -> BatchOperation:
    """The Gaussian blur of MoCo v2: half of the images, sigma 0.1 to 2."""
    sigma_B = numbers.between(0.1, 2.0)
    return BatchOperation(np.where(numbers.next() < 0.5, OPERATIONS.index("Blur"), -1), sigma_B)


def _argument_of_each(arguments: dict[str, Array], operation_B: Whole) -> Array:
    """Of each image the argument of its own operation; 0 for one that takes none."""
    argument_OB = np.zeros((len(OPERATIONS), len(operation_B)))
    for name, argument_B in arguments.items():
        argument_OB[OPERATIONS.index(name)] = argument_B
    return argument_OB[operation_B, np.arange(len(operation_B))]


# ---------------------------------------------------------------------------------------------- RandAugment


def rand_augment(numbers: Numbers, settings: Views) -> list[BatchOperation]:
    """timm's RandAugment, by default `rand-n2-m10-mstd0.5`: `randaug_n` operations out of 15, each applied with p = .5.

    The magnitude is normal(`randaug_m`, .5), clipped to [0, 10]; geometry fills with the mean colour; resampling is
    bilinear or bicubic at random.
    """
    fill = tuple(round(255 * value) for value in settings.mean)
    chosen: list[BatchOperation] = []
    for _ in range(settings.randaug_n):
        which_B = numbers.whole(len(RAND_AUGMENT))
        applied_B = numbers.next() < 0.5
        # At least 2**-53: the normal quantile of 0 is -inf.
        normal_B = torch.special.ndtri(torch.from_numpy(np.maximum(numbers.next(), 2.0**-53))).numpy()
        level_B = (settings.randaug_m + 0.5 * normal_B).clip(0, 10) / 10
        arguments = rand_augment_arguments(level_B, numbers.sign() * level_B, settings.size)
        argument_B = _argument_of_each(arguments, which_B)
        resampling_B = np.where(numbers.next() < 0.5, RESAMPLINGS.index("bicubic"), RESAMPLINGS.index("bilinear"))
        chosen.append(BatchOperation(np.where(applied_B, which_B, -1), argument_B, resampling_B, fill))
    return chosen


def rand_augment_arguments(level_B: Array, signed_B: Array, side: int) -> dict[str, Array]:
    """timm's mapping from levels in [0, 1], and these with a random sign, to the arguments of the operations."""
    return {
        **dict.fromkeys(_ENHANCEMENTS, 0.1 + 1.8 * level_B),
        "Posterize": np.floor(4 * level_B),  # bits kept
        "Solarize": np.floor(256 * level_B),
        "SolarizeAdd": np.floor(110 * level_B),
        "Rotate": 30 * signed_B,
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * signed_B),
        **dict.fromkeys(("TranslateX", "TranslateY"), 0.45 * side * signed_B),
    }


# ---------------------------------------------------------------------------------------------- AutoAugment

# The 25 sub-policies found for CIFAR-10 (Cubuk et al., CVPR 2019, table 7): operation, probability, magnitude 0-9.
# fmt: off
AUTO_AUGMENT = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)), (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)), (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)), (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)), (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)), (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)), (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)), (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)), (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)), (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)), (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)), (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)), (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
# fmt: on
_SUB_POLICIES = np.array([[OPERATIONS.index(name) for name, _, _ in pair] for pair in AUTO_AUGMENT])
_PROBABILITIES = np.array([[probability for _, probability, _ in pair] for pair in AUTO_AUGMENT])
_MAGNITUDES = np.array([[magnitude / 9 for _, _, magnitude in pair] for pair in AUTO_AUGMENT])


def auto_augment(numbers: Numbers, side: int) -> list[BatchOperation]:
    """torchvision's AutoAugment with the CIFAR-10 policy: one sub-policy an image, its two operations in turn."""
    policy_B = numbers.whole(len(AUTO_AUGMENT))
    chosen: list[BatchOperation] = []
    for step in range(2):
        operation_B, level_B = _SUB_POLICIES[policy_B, step], _MAGNITUDES[policy_B, step]
        applied_B = numbers.next() < _PROBABILITIES[policy_B, step]
        arguments = auto_augment_arguments(level_B, numbers.sign() * level_B, side)
        argument_B = _argument_of_each(arguments, operation_B)
        chosen.append(BatchOperation(np.where(applied_B, operation_B, -1), argument_B))
    return chosen


def auto_augment_arguments(level_B: Array, signed_B: Array, side: int) -> dict[str, Array]:
    """torchvision's mapping from levels in [0, 1], and these with a random sign, to the arguments of the operations."""
    return {
        **dict.fromkeys(_ENHANCEMENTS, 1 + 0.9 * signed_B),
        "Posterize": 8 - np.rint(4 * level_B),
        "Solarize": 255 * (1 - level_B),
        "Rotate": 30 * signed_B,
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * signed_B),
        # Whole pixels, and the other way round than in timm.
        **dict.fromkeys(("TranslateX", "TranslateY"), -np.trunc(150 / 331 * side * signed_B)),
    }
