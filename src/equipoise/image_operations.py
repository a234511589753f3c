"""Pixel operations on one image, in OpenCV on bytes: on a CPU several times faster than batches in torch.

Images are uint8 arrays `[H, W, 3]`, RGB, and never changed in place; the parameter is a number. The names, parameters
and results are those of `operations.py`, within 2 levels of 255 on average over an image (`test_image_operations.py`).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Pixels = npt.NDArray[np.uint8]

_LEVEL = np.arange(256, dtype=np.uint8)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
# OpenCV rounds where the references truncate. Not quite a half, so that whole numbers stay what they are.
_TRUNCATED = -0.49
# Matrices that take (red, green, blue, 1) to a colour: to its luma, and to what is left of it without.
_LUMA = np.array([[0.299, 0.587, 0.114, _TRUNCATED]] * 3, np.float32)
_CHROMA = np.eye(3, 4, dtype=np.float32) - np.array([0.299, 0.587, 0.114, 0], np.float32)
# Up to this height, pixels, what a call costs counts for more than what it does to each pixel.
_SMALL = 64

Operation = Callable[[Pixels, float], Pixels]


@lru_cache
def operation(name: str, resampling: str, fill: tuple[float, ...]) -> Operation:
    """The operation `name` of `policies.OPERATIONS`, of an image and its argument."""
    if name in _COLOUR:
        return _COLOUR[name]
    return lambda image, argument: affine(image, _MATRICES[name](argument, image.shape[0]), fill, resampling)


def resized_crop(image: Pixels, box: Sequence[int], size: int) -> Pixels:
    """The box (top, left, height, width) as `[size, size, 3]`: Pillow's antialiased bilinear resize, within a level."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]
    if height == width == size:
        return crop
    if height <= size and width <= size:  # nothing to antialias
        return cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)  # pyright: ignore[reportReturnType]
    crop_13HW = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    crop_13SS = functional.interpolate(crop_13HW, (size, size), mode="bilinear", antialias=True)
    return crop_13SS[0].permute(1, 2, 0).numpy()


def flip_horizontal(image: Pixels) -> Pixels:
    return cv2.flip(image, 1)  # pyright: ignore[reportReturnType]


def _linear(image: Pixels, factor: float, offset: float) -> Pixels:
    if len(image) <= _SMALL:
        return cv2.addWeighted(image, factor, image, 0, offset + _TRUNCATED)  # pyright: ignore[reportReturnType]
    return _scaled(image, (factor,) * 3, (offset,) * 3)


def _scaled(image: Pixels, factors: Sequence[float], offsets: Sequence[float]) -> Pixels:
    """Each channel times its factor plus its offset."""
    (a, b, c), (x, y, z) = factors, offsets
    matrix = ((a, 0, 0, x + _TRUNCATED), (0, b, 0, y + _TRUNCATED), (0, 0, c, z + _TRUNCATED))
    return cv2.transform(image, np.array(matrix, np.float32))  # pyright: ignore[reportReturnType] bytes stay bytes


def to_grayscale(image: Pixels) -> Pixels:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)  # pyright: ignore[reportReturnType]


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    return _linear(image, factor, 0)


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    red, green, blue, _ = cv2.mean(image)
    mean_luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return _linear(image, factor, (1 - factor) * mean_luma)


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    return cv2.transform(image, _LUMA + factor * _CHROMA)  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=512)
def _hues(hue: int, shape: tuple[int, ...]) -> Pixels:
    hues = np.zeros(shape, np.uint8)
    hues[..., 0] = hue
    return hues


def adjust_hue(image: Pixels, shift: float) -> Pixels:
    """In 8 bits, as Pillow does it: there are 256 hues."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv += _hues(round(256 * shift) % 256, image.shape if len(image) <= _SMALL else image.shape[1:])  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)  # pyright: ignore[reportReturnType]


def invert(image: Pixels) -> Pixels:
    return cv2.bitwise_not(image)  # pyright: ignore[reportReturnType]


def posterize(image: Pixels, bits: float) -> Pixels:
    return image & np.uint8(256 - (256 >> int(bits)))


def _lookup(image: Pixels, table: Pixels) -> Pixels:
    return cv2.LUT(image, table)  # pyright: ignore[reportReturnType]


def solarize(image: Pixels, threshold: float) -> Pixels:
    return _lookup(image, np.where(threshold > _LEVEL, _LEVEL, ~_LEVEL))


def solarize_add(image: Pixels, addend: float) -> Pixels:
    return _lookup(image, np.where(_LEVEL < 128, _LEVEL + np.uint8(addend), _LEVEL))  # at most 127 + 110


def autocontrast(image: Pixels) -> Pixels:
    limits = [cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]
    factors = [255 / (high - low) if high > low else 1 for low, high in limits]
    offsets = [-low * factor if high > low else 0 for (low, high), factor in zip(limits, factors, strict=True)]
    return _scaled(image, factors, offsets)


def equalize(image: Pixels) -> Pixels:
    # Whole numbers as float32, which OpenCV counts in and numpy divides fast.
    histogram_3V = np.array([cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)])
    brightest_3 = 255 - (histogram_3V[:, ::-1] > 0).argmax(axis=1)
    step_31 = np.floor((image.shape[0] * image.shape[1] - histogram_3V[[0, 1, 2], brightest_3]) / 255)[:, None]
    below_3V = histogram_3V.cumsum(axis=1) - histogram_3V
    table_3V = ((below_3V + np.floor(step_31 / 2)) / np.maximum(step_31, 1)).clip(max=255)
    return _lookup(image, np.where(step_31 > 0, table_3V, _LEVEL).astype(np.uint8).T[None])


def adjust_sharpness(image: Pixels, factor: float) -> Pixels:
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    smooth[0], smooth[-1] = image[0], image[-1]
    smooth[:, 0], smooth[:, -1] = image[:, 0], image[:, -1]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATED)  # pyright: ignore[reportReturnType]


def gaussian_blur(image: Pixels, sigma: float) -> Pixels:
    return cv2.GaussianBlur(image, (17, 17), sigma)  # pyright: ignore[reportReturnType]


def affine(image: Pixels, matrix_23: Sequence[Sequence[float]], fill: tuple[float, ...], resampling: str) -> Pixels:
    """As `operations.affine`; at the border, though, the fill colour is blended in rather than cut off."""
    # From the centres of pixels, (x + 0.5, y + 0.5), to OpenCV's whole numbers.
    matrix = np.array([[a, b, c + (a + b) / 2 - 0.5] for a, b, c in matrix_23])
    return cv2.warpAffine(  # pyright: ignore[reportReturnType]
        image,
        matrix,
        image.shape[1::-1],
        flags=_INTERPOLATION[resampling] | cv2.WARP_INVERSE_MAP,
        borderValue=fill,
    )


def _rotation(degrees: float, side: int) -> list[list[float]]:
    cos, sin, middle = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), side / 2
    return [
        [cos, -sin, middle - cos * middle + sin * middle],
        [sin, cos, middle - sin * middle - cos * middle],
    ]


_COLOUR: dict[str, Operation] = {
    "Brightness": adjust_brightness,
    "Color": adjust_saturation,
    "Contrast": adjust_contrast,
    "Hue": adjust_hue,
    "Sharpness": adjust_sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Blur": gaussian_blur,
    "AutoContrast": lambda image, _: autocontrast(image),
    "Equalize": lambda image, _: equalize(image),
    "Invert": lambda image, _: invert(image),
    "Grayscale": lambda image, _: to_grayscale(image),
}
# Of square images, from output to input.
_MATRICES: dict[str, Callable[[float, int], list[list[float]]]] = {
    "Rotate": _rotation,
    "ShearX": lambda level, _: [[1, level, 0], [0, 1, 0]],
    "ShearY": lambda level, _: [[1, 0, 0], [level, 1, 0]],
    "TranslateX": lambda pixels, _: [[1, 0, pixels], [0, 1, 0]],
    "TranslateY": lambda pixels, _: [[1, 0, 0], [0, 1, pixels]],
}
