"""Decoded images and random numbers become the views of a training batch; or one view for evaluation.

A *view* is a geometry (crop, flip) followed by operations on pixels (`operations.py`). The three kinds, from BCL's code
and MoCo v2: `cls` feeds the classifier, `sim` and `rand` the contrastive branch. All random decisions are made for a
whole batch, image by image, from `draws.Numbers`. So a view depends on (seed, epoch, image) and not on which batch or
process computes it. Shapes: B images of a batch, S the side of a view, V views.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from equipoise.config.recipe import Recipe, Views
from equipoise.data.decode import Pixels
from equipoise.method.methods import METHODS
from equipoise.views import operations
from equipoise.views.draws import Array, Numbers, Whole

_LONG_STRIP = 16  # times as long as it is wide
_EVALUATION_MARGIN = 256 / 224  # Resize(256) · CenterCrop(224)
_CONTRASTIVE_KINDS = {"sim-sim": ("sim", "sim"), "sim-rand": ("rand", "sim"), "rand-rand": ("rand", "rand")}
_CROP_ATTEMPTS = 10
# By torchvision's and timm's names.
RAND_AUGMENT = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
                "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY")  # fmt: skip
_ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")

Names = npt.NDArray[np.str_]


@dataclass(frozen=True)
class ViewSettings(Views):
    """A recipe's table `views`, and of each view its kind: 'cls', 'sim' or 'rand'."""

    kinds: tuple[str, ...] = ("cls",)


def view_settings(recipe: Recipe) -> ViewSettings:
    """The views that `recipe` trains and evaluates with: the classifier's, then those of the contrastive branch, if the
    method has one."""
    method = METHODS[recipe.method]
    contrastive = _CONTRASTIVE_KINDS[recipe.views.cl_views] if method.contrastive else ()
    return ViewSettings(**asdict(recipe.views), kinds=contrastive if method.shares_views else ("cls", *contrastive))


def small_views(images_BSS3: Pixels, settings: ViewSettings, seed: int, epoch: int, indices_B: Whole) -> Tensor:
    """All views of a batch of small images, each of the size of a view: uint8 `[V, B, 3, S, S]`. `indices_B`: their
    places in the training list."""
    views_VBSS3 = np.empty((len(settings.kinds), *images_BSS3.shape), np.uint8)
    for stream, kind in enumerate(settings.kinds):
        numbers = Numbers(seed, epoch, indices_B, stream)
        digits = settings.policy == "digits"
        view_BSS3 = _move_digits(images_BSS3, kind, numbers) if digits else _crop(images_BSS3, kind, numbers)
        # Operation by operation: for one small image, a call costs more than its work.
        for operation_B, argument_B, fill in _pixel_operations(kind, settings, numbers):
            for name in set(operation_B.tolist()) - {""}:
                operation, rows_B = operations.operation(*name.split(), fill=fill), operation_B == name
                view_BSS3[rows_B] = operation(view_BSS3[rows_B], argument_B[rows_B])
        views_VBSS3[stream] = view_BSS3 if digits or kind != "cls" else _cut_out(view_BSS3, numbers)
    return torch.from_numpy(views_VBSS3).permute(0, 1, 4, 2, 3)


def photo_views(photos: Sequence[Pixels], settings: ViewSettings, seed: int, epoch: int, indices_B: Whole) -> Tensor:
    """The same of photographs of any size, each uint8 `[H, W, 3]`."""
    heights_B, widths_B = np.array([photo.shape[:2] for photo in photos]).T
    views_VBSS3 = np.empty((len(settings.kinds), len(photos), settings.size, settings.size, 3), np.uint8)
    for stream, kind in enumerate(settings.kinds):
        numbers = Numbers(seed, epoch, indices_B, stream)
        boxes_B4 = random_boxes(numbers, heights_B, widths_B, smallest_share=settings.smallest_crop).tolist()
        flips_B = numbers.next() < 0.5
        chosen = _pixel_operations(kind, settings, numbers)
        # Image by image: its bytes stay in the processor's cache.
        for row, photo in enumerate(photos):
            view_1SS3 = np.ascontiguousarray(operations.resized_crop(photo, boxes_B4[row], settings.size))[None]
            if flips_B[row]:
                view_1SS3 = operations.flip_horizontal(view_1SS3)
            for operation_B, argument_B, fill in chosen:
                if name := str(operation_B[row]):
                    operation = operations.operation(*name.split(), fill=fill)
                    view_1SS3 = operation(view_1SS3, argument_B[row : row + 1])
            views_VBSS3[stream, row] = view_1SS3[0]
    return torch.from_numpy(views_VBSS3).permute(0, 1, 4, 2, 3)


def short_side(size: int) -> int:
    """To how many pixels the evaluation view resizes the short side before it takes the centre."""
    return round(size * _EVALUATION_MARGIN)


def evaluation_view(photo: Pixels, size: int) -> Pixels:
    """Short side to 256/224 of `size`, then the centre `[size, size, 3]`: Pillow's antialiased bilinear resize."""
    height, width = photo.shape[:2]
    short = short_side(size)
    # The long side is truncated, as torchvision does it.
    new_width, new_height = (int(short * side / min(height, width)) for side in (width, height))
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    image = Image.fromarray(photo)
    if max(height, width) > _LONG_STRIP * min(height, width):
        # Resized whole, it could fill the memory. Its centre alone is the same within one level of 255.
        x, y = width / new_width, height / new_height
        box = left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + size, left : left + size]


def random_boxes(numbers: Numbers, heights_B: Whole, widths_B: Whole, smallest_share: float) -> Whole:
    """`[B, 4]` top, left, height and width of the crops of torchvision's RandomResizedCrop.
    Area uniform in [`smallest_share`, 1] of the image's, log aspect ratio uniform in ±log(4/3); the first of ten
    attempts that fits, or else the largest centred crop with an aspect ratio within those limits."""
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


def _crop(images_BSS3: Pixels, kind: str, numbers: Numbers) -> Pixels:
    """For 'cls' torchvision's RandomCrop of the image with a black margin (4 pixels at a side of 32), for the others
    its RandomResizedCrop; then a flip."""
    side = images_BSS3.shape[1]
    sides_B = np.full(len(images_BSS3), side)
    if kind == "cls":
        margin = side // 8
        images_BSS3 = np.pad(images_BSS3, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        top_B, left_B = numbers.whole(2 * margin + 1), numbers.whole(2 * margin + 1)
        boxes_B4 = np.stack([top_B, left_B, sides_B, sides_B], axis=1)
    else:
        boxes_B4 = random_boxes(numbers, sides_B, sides_B, smallest_share=0.2)
    boxed = zip(images_BSS3, boxes_B4.tolist(), strict=True)
    crops_BSS3 = np.stack([operations.resized_crop(image, box, side) for image, box in boxed])
    flipped_B = numbers.next() < 0.5
    crops_BSS3[flipped_B] = operations.flip_horizontal(crops_BSS3[flipped_B])
    return crops_BSS3


def _move_digits(images_BSS3: Pixels, kind: str, numbers: Numbers) -> Pixels:
    """Slant, turn, shift and scale as hands do; more for the contrastive views. Never a flip: it makes other signs."""
    side = images_BSS3.shape[1]
    strength = 1.0 if kind == "cls" else 1.5
    turn_B = np.deg2rad(numbers.between(-10, 10)) * strength
    slant_B = numbers.between(-0.15, 0.15) * strength
    zoom_B = np.exp(numbers.between(-0.12, 0.12) * strength)
    shift_x_B, shift_y_B = (numbers.between(-0.08, 0.08) * strength * side for _ in range(2))
    # From an output pixel to an input pixel, about the centre.
    cos_B, sin_B, middle = np.cos(turn_B) / zoom_B, np.sin(turn_B) / zoom_B, side / 2
    a, b, d, e = cos_B, sin_B + slant_B * cos_B, -sin_B, cos_B - slant_B * sin_B
    to_x_B3 = np.stack([a, b, middle - a * middle - b * middle + shift_x_B], axis=1)
    to_y_B3 = np.stack([d, e, middle - d * middle - e * middle + shift_y_B], axis=1)
    return operations.affine(images_BSS3, np.stack([to_x_B3, to_y_B3], axis=1), (0, 0, 0), "bilinear")


def _cut_out(images_BSS3: Pixels, numbers: Numbers) -> Pixels:
    """Cutout (DeVries & Taylor, arXiv:1708.04552), in place: a black square of half the side, clipped at the border."""
    side = images_BSS3.shape[1]
    half = side // 4
    centres_y, centres_x = numbers.whole(side).tolist(), numbers.whole(side).tolist()
    for image, y, x in zip(images_BSS3, centres_y, centres_x, strict=True):
        image[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return images_BSS3


class BatchOperation(NamedTuple):
    """One operation for each image of a batch: its name, with the resampling ('Rotate bicubic') or not, '' for none;
    and its argument, in the unit of the operation. `fill`: a colour (0 to 255), for those that move pixels."""

    operation_B: Names
    argument_B: Array
    fill: tuple[float, ...] = (0, 0, 0)


def _pixel_operations(kind: str, settings: ViewSettings, numbers: Numbers) -> list[BatchOperation]:
    """The operations between a view's geometry and Cutout."""
    if settings.policy == "digits":
        return [] if kind == "cls" else jitter(numbers, (0.4, 0.4, 0, 0), probability=0.8)
    if settings.policy == "cifar" and kind == "cls":
        return auto_augment(numbers, settings.size)
    if kind == "cls":
        chosen = jitter(numbers, (0.4, 0.4, 0.4, 0), probability=1.0)
        return chosen + rand_augment(numbers, settings) if settings.randaug else chosen
    chosen = jitter(numbers, (0.4, 0.4, 0.4, 0.1), probability=0.8)
    chosen.append(some(numbers, "Grayscale", 0.2))
    if settings.blur:
        chosen.append(some(numbers, "Blur", 0.5, numbers.between(0.1, 2.0)))  # as in MoCo v2
    return chosen + rand_augment(numbers, settings) if kind == "rand" else chosen


def jitter(numbers: Numbers, amounts: Sequence[float], probability: float) -> list[BatchOperation]:
    """torchvision's ColorJitter, on a share of the images: the operations in an order of each image's own. `amounts`:
    of brightness, contrast, saturation and hue. An operation without an amount is left out."""
    amounts_4, middles_4 = np.array(amounts), np.array([1, 1, 1, 0])
    names_4 = np.where(amounts_4 > 0, ["Brightness", "Contrast", "Color", "Hue"], "")
    low_4, high_4 = middles_4 - amounts_4, middles_4 + amounts_4
    chosen_B = numbers.next() < probability
    order_4B = numbers.take(4).argsort(axis=1).T
    values_B4 = low_4 + (high_4 - low_4) * numbers.take(4)
    image_B = np.arange(len(chosen_B))
    return [BatchOperation(np.where(chosen_B, names_4[of_B], ""), values_B4[image_B, of_B]) for of_B in order_4B]


def some(numbers: Numbers, name: str, probability: float, argument_B: Array | float = 0.0) -> BatchOperation:
    """One operation, on a share of the images."""
    operation_B = np.where(numbers.next() < probability, name, "")
    return BatchOperation(operation_B, np.broadcast_to(argument_B, len(operation_B)))


def _argument_of_each(arguments: dict[str, Array], name_B: Names) -> Array:
    """Of each image the argument of its own operation; 0 for one that takes none."""
    names = enumerate(name_B.tolist())
    return np.array([arguments[name][row] if name in arguments else 0.0 for row, name in names])


def rand_augment(numbers: Numbers, settings: Views) -> list[BatchOperation]:
    """timm's RandAugment, by default `rand-n2-m10-mstd0.5`: `randaug_n` operations out of 15, each applied with p = .5.
    The magnitude is normal(`randaug_m`, .5), clipped to [0, 10]; geometry fills with the mean colour; resampling is
    bilinear or bicubic at random."""
    fill = tuple(round(255 * value) for value in settings.mean)
    chosen: list[BatchOperation] = []
    for _ in range(settings.randaug_n):
        name_B = np.array(RAND_AUGMENT)[numbers.whole(len(RAND_AUGMENT))]
        applied_B = numbers.next() < 0.5
        # At least 2**-53: the normal quantile of 0 is -inf.
        normal_B = torch.special.ndtri(torch.from_numpy(np.maximum(numbers.next(), 2.0**-53))).numpy()
        level_B = (settings.randaug_m + 0.5 * normal_B).clip(0, 10) / 10
        arguments = rand_augment_arguments(level_B, numbers.sign() * level_B, settings.size)
        resampled_B = np.char.add(name_B, np.where(numbers.next() < 0.5, " bicubic", " bilinear"))
        argument_B = _argument_of_each(arguments, name_B)
        chosen.append(BatchOperation(np.where(applied_B, resampled_B, ""), argument_B, fill))
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


@cache
def cifar_policies() -> tuple[Names, Array, Array]:
    """Of the 25 sub-policies that were found for CIFAR-10 (Cubuk et al., CVPR 2019, table 7) the two operations, their
    probabilities, and their levels in [0, 1], `[25, 2]` each."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # a second of import, needed here alone

    policies: Any = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    table_P23 = np.array([[(name, p, (level or 0) / 9) for name, p, level in pair] for pair in policies], object)
    names, probabilities, levels = np.moveaxis(table_P23, 2, 0)
    return names.astype(str), probabilities.astype(float), levels.astype(float)


def auto_augment(numbers: Numbers, side: int) -> list[BatchOperation]:
    """torchvision's AutoAugment with the CIFAR-10 policy: one sub-policy an image, its two operations in turn."""
    names_P2, probabilities_P2, levels_P2 = cifar_policies()
    policy_B = numbers.whole(len(names_P2))
    chosen: list[BatchOperation] = []
    for step in range(2):
        name_B, level_B = names_P2[policy_B, step], levels_P2[policy_B, step]
        applied_B = numbers.next() < probabilities_P2[policy_B, step]
        arguments = auto_augment_arguments(level_B, numbers.sign() * level_B, side)
        chosen.append(BatchOperation(np.where(applied_B, name_B, ""), _argument_of_each(arguments, name_B)))
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
