"""Random numbers become decisions: which piece of an image is taken, and which operations change it.

All is decided for a whole batch at once, image by image. `operations.py` carries the decisions out; `views.py` says
which policy makes which view.

Shapes: B images of a batch, K random numbers of an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

NUMBERS_PER_VIEW = 64
_CROP_ATTEMPTS = 10

# By torchvision's and timm's names; the first 15 are RandAugment's.
# fmt: off
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Hue", "Grayscale", "Blur",
)
# fmt: on
RAND_AUGMENT = OPERATIONS[:15]
GEOMETRY = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})
_ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")
RESAMPLINGS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class BatchOperation:
    """One operation for each image of a batch: its place in OPERATIONS (-1 for none) and its argument, in the unit of
    the operation. `resampling_B` (place in RESAMPLINGS) and `fill` (colour, 0 to 255) are for those that move pixels.
    """

    operation_B: Whole
    argument_B: Array
    resampling_B: Whole
    fill: tuple[float, ...] = (0, 0, 0)


def _where(applied_B: npt.NDArray[np.bool_], operation: str | Whole, argument_B: Array) -> BatchOperation:
    """An operation on some images of the batch, with the nearest pixel and a black fill."""
    place = OPERATIONS.index(operation) if isinstance(operation, str) else operation
    return BatchOperation(np.where(applied_B, place, -1), argument_B, np.zeros(len(applied_B), np.int64))


class Numbers:
    """The random numbers of one view of a batch, handed out in the order in which the policy asks."""

    def __init__(self, numbers_BK: Array) -> None:
        self._numbers_BK = numbers_BK
        self._used = 0

    def next(self) -> Array:
        """`[B]` numbers, uniform on [0, 1)."""
        return self.take(1)[:, 0]

    def take(self, count: int) -> Array:
        """`[B, count]` numbers, uniform on [0, 1)."""
        self._used += count
        assert self._used <= NUMBERS_PER_VIEW, "a view asks for more random numbers than it has"
        return self._numbers_BK[:, self._used - count : self._used]

    def between(self, low: float, high: float) -> Array:
        """`[B]` numbers, uniform on [low, high)."""
        return low + (high - low) * self.next()

    def whole(self, below: int | Whole) -> Whole:
        """`[B]` whole numbers, uniform on 0 .. below - 1."""
        return (self.next() * below).astype(np.int64)

    def sign(self) -> Array:
        """`[B]` times -1 or 1."""
        return np.where(self.next() < 0.5, -1.0, 1.0)


def random_boxes(numbers: Numbers, heights_B: Whole, widths_B: Whole, smallest_share: float) -> Whole:
    """`[B, 4]` top, left, height and width of the crops of torchvision's RandomResizedCrop.

    Area uniform in [`smallest_share`, 1] of the image's, log aspect ratio uniform in ±log(4/3); the first of ten
    attempts that fits, or else the largest centred crop with an aspect ratio within those limits.
    """
    shares, ratios = numbers.take(_CROP_ATTEMPTS), numbers.take(_CROP_ATTEMPTS)
    areas = (heights_B * widths_B)[:, None] * (smallest_share + (1 - smallest_share) * shares)
    ratios = np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratios)
    box_widths, box_heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (
        (box_widths > 0) & (box_heights > 0) & (box_widths <= widths_B[:, None]) & (box_heights <= heights_B[:, None])
    )
    first = fits.argmax(axis=1)[:, None]
    box_width = np.take_along_axis(box_widths, first, axis=1)[:, 0].astype(np.int64)
    box_height = np.take_along_axis(box_heights, first, axis=1)[:, 0].astype(np.int64)
    top = numbers.whole(heights_B - box_height + 1)
    left = numbers.whole(widths_B - box_width + 1)

    none = ~fits.any(axis=1)
    central_width = np.minimum(widths_B, np.rint(heights_B * 4 / 3)).astype(np.int64)
    central_height = np.minimum(heights_B, np.rint(widths_B / (3 / 4))).astype(np.int64)
    box_width, box_height = np.where(none, central_width, box_width), np.where(none, central_height, box_height)
    top = np.where(none, (heights_B - box_height) // 2, top)
    left = np.where(none, (widths_B - box_width) // 2, left)
    return np.stack([top, left, box_height, box_width], axis=1)


def jitter(
    numbers: Numbers, brightness: float, contrast: float, saturation: float, hue: float, probability: float
) -> list[BatchOperation]:
    """torchvision's ColorJitter, on a share of the images: the operations in an order of each image's own."""
    ranges = {
        "Brightness": (1 - brightness, 1 + brightness),
        "Contrast": (1 - contrast, 1 + contrast),
        "Color": (1 - saturation, 1 + saturation),
        "Hue": (-hue, hue),
    }
    chosen_B = numbers.next() < probability
    order_B4 = numbers.take(len(ranges)).argsort(axis=1)
    values_4B = np.stack([numbers.between(low, high) for low, high in ranges.values()])
    # An operation without a range is left out.
    operation_4 = np.array([OPERATIONS.index(name) if low < high else -1 for name, (low, high) in ranges.items()])
    image_B = np.arange(len(chosen_B))
    return [_where(chosen_B, operation_4[which_B], values_4B[which_B, image_B]) for which_B in order_B4.T]


def grayscale(numbers: Numbers, probability: float) -> BatchOperation:
    """torchvision's RandomGrayscale."""
    chosen_B = numbers.next() < probability
    return _where(chosen_B, "Grayscale", np.zeros(len(chosen_B)))


def blur(numbers: Numbers) -> BatchOperation:
    """The Gaussian blur of MoCo v2: half of the images, sigma 0.1 to 2."""
    sigma_B = numbers.between(0.1, 2.0)
    return _where(numbers.next() < 0.5, "Blur", sigma_B)


# ---------------------------------------------------------------------------------------------- RandAugment


def rand_augment(
    numbers: Numbers, side: int, mean: Sequence[float], count: int = 2, magnitude: float = 10
) -> list[BatchOperation]:
    """timm's RandAugment, `rand-n2-m10-mstd0.5`: `count` operations out of 15, each applied with p = .5.

    The magnitude is normal(`magnitude`, .5), clipped to [0, 10]; geometry fills with the mean colour (`mean`, of 1);
    resampling is bilinear or bicubic at random. `side`: that of the images, pixels.
    """
    fill = tuple(round(255 * value) for value in mean)
    chosen: list[BatchOperation] = []
    for _ in range(count):
        which_B = numbers.whole(len(RAND_AUGMENT))
        applied_B = numbers.next() < 0.5
        # At least 2**-53: the normal quantile of 0 is -inf.
        normal_B = torch.special.ndtri(torch.from_numpy(np.maximum(numbers.next(), 2.0**-53))).numpy()
        level_B = (magnitude + 0.5 * normal_B).clip(0, 10) / 10
        sign_B, bicubic_B = numbers.sign(), numbers.next() < 0.5
        argument_B = np.zeros_like(level_B)
        for index, name in enumerate(RAND_AUGMENT):
            of_name = which_B == index
            argument_B[of_name] = rand_augment_argument(name, level_B[of_name], sign_B[of_name], side)
        resampling_B = np.where(bicubic_B, RESAMPLINGS.index("bicubic"), RESAMPLINGS.index("bilinear"))
        chosen.append(BatchOperation(np.where(applied_B, which_B, -1), argument_B, resampling_B, fill))
    return chosen


def rand_augment_argument(name: str, level_B: Array, sign_B: Array, side: int) -> Array:
    """timm's mapping from a level in [0, 1] to the operation's argument."""
    if name in _ENHANCEMENTS:
        return 0.1 + 1.8 * level_B
    arguments: dict[str, Callable[[], Array]] = {
        "Posterize": lambda: np.floor(4 * level_B),  # bits kept
        "Solarize": lambda: np.floor(256 * level_B),
        "SolarizeAdd": lambda: np.floor(110 * level_B),
        "Rotate": lambda: 30 * level_B * sign_B,
        "ShearX": lambda: 0.3 * level_B * sign_B,
        "ShearY": lambda: 0.3 * level_B * sign_B,
        "TranslateX": lambda: 0.45 * side * level_B * sign_B,
        "TranslateY": lambda: 0.45 * side * level_B * sign_B,
    }
    return arguments.get(name, lambda: np.zeros_like(level_B))()


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
        applied_B, sign_B = numbers.next(), numbers.sign()
        operation_B, magnitude_B = _SUB_POLICIES[policy_B, step], _MAGNITUDES[policy_B, step]
        argument_B = np.zeros_like(magnitude_B)
        for index in np.unique(operation_B).tolist():
            of_name = operation_B == index
            argument_B[of_name] = auto_augment_argument(OPERATIONS[index], magnitude_B[of_name], sign_B[of_name], side)
        chosen.append(_where(applied_B < _PROBABILITIES[policy_B, step], operation_B, argument_B))
    return chosen


def auto_augment_argument(name: str, magnitude_B: Array, sign_B: Array, side: int) -> Array:
    """torchvision's mapping from a magnitude in [0, 1] to the operation's argument."""
    if name in _ENHANCEMENTS:
        return 1 + 0.9 * magnitude_B * sign_B
    arguments: dict[str, Callable[[], Array]] = {
        "Posterize": lambda: 8 - np.rint(4 * magnitude_B),
        "Solarize": lambda: 255 * (1 - magnitude_B),
        "Rotate": lambda: 30 * magnitude_B * sign_B,
        "ShearX": lambda: 0.3 * magnitude_B * sign_B,
        "ShearY": lambda: 0.3 * magnitude_B * sign_B,
        # Whole pixels, and the other way round than in timm.
        "TranslateX": lambda: -np.trunc(150 / 331 * side * magnitude_B * sign_B),
        "TranslateY": lambda: -np.trunc(150 / 331 * side * magnitude_B * sign_B),
    }
    return arguments.get(name, lambda: np.zeros_like(magnitude_B))()
