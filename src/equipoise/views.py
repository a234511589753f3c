"""Decoded images and their random numbers become the views of a training batch; or one view for evaluation.

A *view* is a geometry (crop, flip) followed by operations on pixels. The three kinds, from BCL's code and MoCo v2:
`cls` feeds the classifier, `sim` and `rand` the contrastive branch. What is random is decided here for a whole
batch, image by image, from `draws.uniforms`; what is done to the pixels is in `operations.py`. So a view depends on
(seed, epoch, image) and not on which batch, process or device computes it.

Small images (policies `digits` and `cifar`) stay in memory and are cropped as one batch. Photographs differ in
size: each is cropped by itself, to one size; from there on they are a batch too.

Shapes: B images of a batch, S the side of a view, V views, K random numbers of an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from equipoise import operations as op
from equipoise.draws import uniforms

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

_NUMBERS_PER_VIEW = 64
_CROP_ATTEMPTS = 10
_LONG_STRIP = 16  # times as long as it is wide
_EVALUATION_MARGIN = 256 / 224  # Resize(256) · CenterCrop(224)


@dataclass(frozen=True)
class ViewSettings:
    """`policy`: 'digits', 'cifar' or 'photos'. `kinds`: each view's, of 'cls', 'sim', 'rand'. `mean` (of 1) fills
    what RandAugment's geometry leaves empty. `randaug`: RandAugment in the view 'cls' of photographs; its number of
    operations and magnitude, there and in 'rand'."""

    policy: str
    kinds: tuple[str, ...]
    size: int
    blur: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    randaug: bool = True
    randaug_n: int = 2
    randaug_m: float = 10.0


def view_kinds(cl_views: str, contrastive: bool) -> tuple[str, ...]:
    """The kind of each view: the classifier's, then those of the contrastive branch ('sim-rand': rand before sim)."""
    if not contrastive:
        return ("cls",)
    return (
        "cls",
        *{"sim-sim": ("sim", "sim"), "sim-rand": ("rand", "sim"), "rand-rand": ("rand", "rand")}[cl_views],
    )


def small_views(
    images_B3SS: Tensor, settings: ViewSettings, seed: int, epoch: int, indices_B: npt.NDArray[np.int64]
) -> Tensor:
    """All views of a batch of small images: uint8 `[B, 3, S, S]` to uint8 `[V, B, 3, S, S]`, on the same device."""
    views: list[Tensor] = []
    for stream, kind in enumerate(settings.kinds):
        numbers = _Numbers(uniforms(seed, epoch, indices_B, stream, _NUMBERS_PER_VIEW))
        view = (_digit_geometry if settings.policy == "digits" else _cifar_geometry)(images_B3SS, kind, numbers)
        views.append(_recolour(view, kind, settings, numbers))
    return torch.stack(views)


def photo_views(
    photos: Sequence[Pixels], settings: ViewSettings, seed: int, epoch: int, indices_B: npt.NDArray[np.int64]
) -> Tensor:
    """All views of a batch of photographs of any size, each uint8 `[H, W, 3]`: uint8 `[V, B, 3, S, S]`."""
    heights_B = np.array([photo.shape[0] for photo in photos])
    widths_B = np.array([photo.shape[1] for photo in photos])
    views: list[Tensor] = []
    for stream, kind in enumerate(settings.kinds):
        numbers = _Numbers(uniforms(seed, epoch, indices_B, stream, _NUMBERS_PER_VIEW))
        boxes = random_boxes(numbers, heights_B, widths_B, smallest_share=0.08)
        flip_B = numbers.next() < 0.5
        crops = [
            _crop_photo(photo, box, settings.size, bool(flip))
            for photo, box, flip in zip(photos, np.stack(boxes, axis=1).tolist(), flip_B, strict=True)
        ]
        views.append(_recolour(torch.stack(crops), kind, settings, numbers))
    return torch.stack(views)


def short_side(size: int) -> int:
    """To how many pixels the evaluation view resizes the short side before it takes the centre."""
    return round(size * _EVALUATION_MARGIN)


def evaluation_view(photo: Pixels, size: int) -> Pixels:
    """Short side to 256/224 of `size`, then the centre `[size, size, 3]`: Pillow's antialiased bilinear resize."""
    height, width = photo.shape[:2]
    short = short_side(size)
    # The long side is truncated, as torchvision does it.
    new_height, new_width = (
        (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    )
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    image = Image.fromarray(photo)
    if max(height, width) > _LONG_STRIP * min(height, width):
        # The whole of it resized could fill the memory. Its centre alone is the same within one level of 255.
        step = width / new_width, height / new_height
        right, bottom = min((left + size) * step[0], width), min((top + size) * step[1], height)
        box = (left * step[0], top * step[1], right, bottom)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + size, left : left + size]


# ---------------------------------------------------------------------------------------------- randomness


class _Numbers:
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
        assert self._used <= _NUMBERS_PER_VIEW, "a view asks for more random numbers than it has"
        return self._numbers_BK[:, self._used - count : self._used]

    def between(self, low: float, high: float) -> Array:
        """`[B]` numbers, uniform on [low, high)."""
        return low + (high - low) * self.next()

    def whole(self, below: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`[B]` whole numbers, uniform on 0 .. below - 1."""
        return (self.next() * below).astype(np.int64)

    def sign(self) -> Array:
        """`[B]` times -1 or 1."""
        return np.where(self.next() < 0.5, -1.0, 1.0)


def random_boxes(
    numbers: _Numbers,
    heights_B: npt.NDArray[np.int64],
    widths_B: npt.NDArray[np.int64],
    smallest_share: float,
) -> tuple[npt.NDArray[np.int64], ...]:
    """Top, left, height and width `[B]` of the crops of torchvision's RandomResizedCrop.

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
    box_width, box_height = (
        np.where(none, central_width, box_width),
        np.where(none, central_height, box_height),
    )
    top = np.where(none, (heights_B - box_height) // 2, top)
    left = np.where(none, (widths_B - box_width) // 2, left)
    return top, left, box_height, box_width


# ---------------------------------------------------------------------------------------------- geometry


def _crop_photo(photo: Pixels, box: list[int], size: int, flip: bool) -> Tensor:
    """`[3, size, size]`: Pillow's antialiased bilinear resize of the box, which torch does within one level of 255."""
    top, left, height, width = box
    crop_1HW3 = torch.from_numpy(photo)[None, top : top + height, left : left + width]
    crop = functional.interpolate(crop_1HW3.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(-1) if flip else crop


def _cifar_geometry(images_B3SS: Tensor, kind: str, numbers: _Numbers) -> Tensor:
    batch, _, side, _ = images_B3SS.shape
    if kind == "cls":
        padding = side // 8  # 4 at 32 pixels
        top, left = numbers.whole(2 * padding + 1), numbers.whole(2 * padding + 1)
        cropped = op.shift_crop(images_B3SS, *_tensors(images_B3SS, top, left), padding=padding)
    else:
        sides = np.full(batch, side)
        boxes = random_boxes(numbers, sides, sides, smallest_share=0.2)
        cropped = op.resized_crop(images_B3SS, *_tensors(images_B3SS, *boxes), size=side)
    return op.flip_horizontal(cropped, _tensors(images_B3SS, numbers.next() < 0.5)[0])


def _digit_geometry(images_B3SS: Tensor, kind: str, numbers: _Numbers) -> Tensor:
    """Slant, turn, shift and scale as hands do; more for the contrastive views. Never a flip: it makes other signs."""
    side = images_B3SS.shape[-1]
    strength = 1.0 if kind == "cls" else 1.5
    turn = np.deg2rad(numbers.between(-10, 10)) * strength
    slant = numbers.between(-0.15, 0.15) * strength
    zoom = np.exp(numbers.between(-0.12, 0.12) * strength)
    shift_x, shift_y = (numbers.between(-0.08, 0.08) * strength * side for _ in range(2))
    # Output pixel to input pixel, about the centre.
    cos, sin, middle = np.cos(turn) / zoom, np.sin(turn) / zoom, side / 2
    a, b, d, e = cos, sin + slant * cos, -sin, cos - slant * sin
    rows = np.stack(
        [
            np.stack([a, b, middle - a * middle - b * middle + shift_x], axis=1),
            np.stack([d, e, middle - d * middle - e * middle + shift_y], axis=1),
        ],
        axis=1,
    )
    return op.affine(images_B3SS, *_tensors(images_B3SS, rows), fill_3=(0, 0, 0), interpolation="bilinear")


# ---------------------------------------------------------------------------------------------- pixels


def _recolour(view: Tensor, kind: str, settings: ViewSettings, numbers: _Numbers) -> Tensor:
    """Everything of a view that follows its geometry."""
    if settings.policy == "digits":
        return view if kind == "cls" else _jitter(view, numbers, 0.4, 0.4, 0.0, 0.0, probability=0.8)
    if settings.policy == "cifar" and kind == "cls":
        return _cutout(auto_augment(view, numbers), numbers)
    if kind == "cls":
        view = _jitter(view, numbers, 0.4, 0.4, 0.4, 0.0, probability=1.0)
        return _rand_augmented(view, settings, numbers) if settings.randaug else view
    view = _jitter(view, numbers, 0.4, 0.4, 0.4, 0.1, probability=0.8)
    view = _on(view, numbers.next() < 0.2, op.to_grayscale)
    if settings.blur:
        sigma, chosen = numbers.between(0.1, 2.0), numbers.next() < 0.5
        view = _on(view, chosen, op.gaussian_blur, sigma)
    return _rand_augmented(view, settings, numbers) if kind == "rand" else view


def _rand_augmented(view: Tensor, settings: ViewSettings, numbers: _Numbers) -> Tensor:
    return rand_augment(view, numbers, settings.mean, settings.randaug_n, settings.randaug_m)


def _tensors(like: Tensor, *arrays: npt.NDArray[np.generic]) -> list[Tensor]:
    """Parameters on the images' device; float64 becomes float32."""
    return [
        torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array).to(
            like.device, non_blocking=True
        )
        for array in arrays
    ]


def _on(
    images: Tensor, chosen_B: npt.NDArray[np.bool_], operation: Callable[..., Tensor], *parameters_B: Array
) -> Tensor:
    """`operation` with each image's parameters, on the chosen images. Chosen on the CPU: a device is not waited for."""
    rows = np.flatnonzero(chosen_B)
    if len(rows) == 0:
        return images
    parameters = _tensors(images, *(parameter[rows] for parameter in parameters_B))
    if len(rows) == len(images):
        return operation(images, *parameters)
    rows_on_device = torch.from_numpy(rows).to(images.device, non_blocking=True)
    return images.index_copy(0, rows_on_device, operation(images[rows_on_device], *parameters))


def _jitter(
    images: Tensor,
    numbers: _Numbers,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float,
) -> Tensor:
    """torchvision's ColorJitter, on a share of the images: the operations in an order of each image's own."""
    jitters = [
        (op.adjust_brightness, 1 - brightness, 1 + brightness),
        (op.adjust_contrast, 1 - contrast, 1 + contrast),
        (op.adjust_saturation, 1 - saturation, 1 + saturation),
        (op.adjust_hue, -hue, hue),
    ]
    chosen = numbers.next() < probability
    order_B4 = numbers.take(len(jitters)).argsort(axis=1)
    values = [numbers.between(low, high) for _, low, high in jitters]
    for turn in range(len(jitters)):
        for which, (operation, low, high) in enumerate(jitters):
            if low < high:
                images = _on(images, chosen & (order_B4[:, turn] == which), operation, values[which])
    return images


def _cutout(images: Tensor, numbers: _Numbers) -> Tensor:
    side = images.shape[-1]
    centre_y, centre_x = numbers.whole(side), numbers.whole(side)
    return op.cutout(images, *_tensors(images, centre_y, centre_x), length=side // 2)  # 16 at 32 pixels


def _named_operation(
    images: Tensor, argument_B: Tensor, *, name: str, fill: Sequence[float], resample: op.Interpolation
) -> Tensor:
    """An operation of AutoAugment or RandAugment by its name, with its argument in the operation's own unit."""
    side = images.shape[-1]
    colour: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "Brightness": op.adjust_brightness,
        "Color": op.adjust_saturation,
        "Contrast": op.adjust_contrast,
        "Sharpness": op.adjust_sharpness,
        "Posterize": lambda pixels, bits: op.posterize(pixels, bits.long()),
        "Solarize": op.solarize,
        "SolarizeAdd": op.solarize_add,
        "AutoContrast": lambda pixels, _: op.autocontrast(pixels),
        "Equalize": lambda pixels, _: op.equalize(pixels),
        "Invert": lambda pixels, _: op.invert(pixels),
    }
    if name in colour:
        return colour[name](images, argument_B)
    nothing = torch.zeros_like(argument_B)
    matrix = {
        "Rotate": lambda: op.rotation(argument_B, side, side),
        "ShearX": lambda: op.shear_x(argument_B),
        "ShearY": lambda: op.shear_y(argument_B),
        "TranslateX": lambda: op.translation(argument_B, nothing),
        "TranslateY": lambda: op.translation(nothing, argument_B),
    }[name]()
    return op.affine(images, matrix, fill, resample)


# ---------------------------------------------------------------------------------------------- RandAugment

# fmt: off
_RAND_AUGMENT = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)
# fmt: on
_ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")


def rand_augment(
    images: Tensor, numbers: _Numbers, mean: Sequence[float], count: int = 2, magnitude: float = 10
) -> Tensor:
    """timm's RandAugment, `rand-n2-m10-mstd0.5`: `count` operations out of 15, each applied with p = .5.

    The magnitude is normal(`magnitude`, .5), clipped to [0, 10]; what geometry leaves empty is the mean colour;
    resampling is bilinear or bicubic at random.
    """
    fill = [round(255 * value) for value in mean]
    for _ in range(count):
        which = numbers.whole(len(_RAND_AUGMENT))
        applied = numbers.next() < 0.5
        # At least 2**-53: the normal quantile of 0 is -inf.
        normal = torch.special.ndtri(torch.from_numpy(np.maximum(numbers.next(), 2.0**-53))).numpy()
        level = (magnitude + 0.5 * normal).clip(0, 10) / 10
        sign, bicubic = numbers.sign(), numbers.next() < 0.5
        resamplings: tuple[tuple[op.Interpolation, npt.NDArray[np.bool_]], ...] = (
            ("bilinear", ~bicubic),
            ("bicubic", bicubic),
        )
        for index, name in enumerate(_RAND_AUGMENT):
            argument = _rand_augment_argument(name, level, sign, images.shape[-1])
            for resample, chosen in resamplings:
                operation = partial(_named_operation, name=name, fill=fill, resample=resample)
                images = _on(images, applied & (which == index) & chosen, operation, argument)
    return images


def _rand_augment_argument(name: str, level_B: Array, sign_B: Array, side: int) -> Array:
    """timm's mapping from a level in [0, 1] to what the operation takes."""
    if name in _ENHANCEMENTS:
        return 0.1 + 1.8 * level_B
    return {
        "Posterize": lambda: np.floor(4 * level_B),  # bits kept
        "Solarize": lambda: np.floor(256 * level_B),
        "SolarizeAdd": lambda: np.floor(110 * level_B),
        "Rotate": lambda: 30 * level_B * sign_B,
        "ShearX": lambda: 0.3 * level_B * sign_B,
        "ShearY": lambda: 0.3 * level_B * sign_B,
        "TranslateX": lambda: 0.45 * side * level_B * sign_B,
        "TranslateY": lambda: 0.45 * side * level_B * sign_B,
    }.get(name, lambda: np.zeros_like(level_B))()


# ---------------------------------------------------------------------------------------------- AutoAugment

# The 25 sub-policies found for CIFAR-10 (Cubuk et al., CVPR 2019, table 7): operation, probability, magnitude 0-9.
AUTO_AUGMENT = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)


def auto_augment(images: Tensor, numbers: _Numbers) -> Tensor:
    """torchvision's AutoAugment with the CIFAR-10 policy: one sub-policy an image, its two operations in turn."""
    which = numbers.whole(len(AUTO_AUGMENT))
    for step in range(2):
        applied, sign = numbers.next(), numbers.sign()
        operations = [sub_policy[step] for sub_policy in AUTO_AUGMENT]
        names = np.array([name for name, _, _ in operations])[which]
        chosen = applied < np.array([probability for _, probability, _ in operations])[which]
        magnitude = np.array([magnitude for _, _, magnitude in operations])[which] / 9
        for name in np.unique(names[chosen]).tolist():
            argument = _auto_augment_argument(name, magnitude, sign, images.shape[-1])
            operation = partial(_named_operation, name=name, fill=(0, 0, 0), resample="nearest")
            images = _on(images, chosen & (names == name), operation, argument)
    return images


def _auto_augment_argument(name: str, magnitude_B: Array, sign_B: Array, side: int) -> Array:
    """torchvision's mapping from a magnitude in [0, 1] to what the operation takes."""
    if name in _ENHANCEMENTS:
        return 1 + 0.9 * magnitude_B * sign_B
    return {
        "Posterize": lambda: 8 - np.rint(4 * magnitude_B),
        "Solarize": lambda: 255 * (1 - magnitude_B),
        "Rotate": lambda: 30 * magnitude_B * sign_B,
        "ShearX": lambda: 0.3 * magnitude_B * sign_B,
        "ShearY": lambda: 0.3 * magnitude_B * sign_B,
        # Whole pixels, and the other way round than in timm.
        "TranslateX": lambda: -np.trunc(150 / 331 * side * magnitude_B * sign_B),
        "TranslateY": lambda: -np.trunc(150 / 331 * side * magnitude_B * sign_B),
    }.get(name, lambda: np.zeros_like(magnitude_B))()
