"""Pixel operations, by OpenCV, on bytes.

Images are a contiguous stack `[N, H, W, 3]`, uint8, RGB, and never changed in place: one photograph, or all small
images of a batch that get the same operation (at 32 pixels a call costs more than its work). Each image has its own
argument, in `[N]`, in the unit of the operation. Pillow, torchvision and timm are the references; the results are
within 2 levels of 255 of theirs, on average over a photograph (`tests/views/test_operations.py`). Bicubic shears and
rotations use OpenCV's cubic (a = -0.75), which is softer than Pillow's (a = -1): on noise by up to 4.5 levels.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from equipoise.data.decode import Pixels
from equipoise.views.draws import Array

Operation = Callable[[Pixels, Array], Pixels]
Matrix = Callable[[float, int], Any]  # from an argument and the side of a square image, for `affine`

_LEVEL = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
# OpenCV rounds where the references truncate. Not quite a half, so that whole numbers stay as they are, even where
# OpenCV rounds the coefficients of a matrix (by up to a quarter of a level, so gray may get a tint of one).
_TRUNCATED = -0.49
# Matrices that take (red, green, blue, 1) to a colour: itself, its luma, white.
_COLOUR = np.eye(3, 4)
_LUMA = np.array([[0.299, 0.587, 0.114, 0]] * 3)
_WHITE = np.array([[0, 0, 0, 1]] * 3)

cv2.setNumThreads(0)  # the loader's processes run in parallel; threads inside each would compete for the cores


@lru_cache
def operation(name: str, resampling: str = "nearest", fill: tuple[float, ...] = (0, 0, 0)) -> Operation:
    """The operation of that name. `resampling` and the colour `fill` (0 to 255) are for those that move pixels."""
    if name in OF_COLOUR:
        return OF_COLOUR[name]

    def move(images: Pixels, argument_N: Array) -> Pixels:
        matrix_N23 = np.array([MATRICES[name](argument, images.shape[1]) for argument in argument_N.tolist()], float)
        return affine(images, matrix_N23, fill, resampling)

    return move


def resized_crop(image: Pixels, box: Sequence[int], size: int) -> Pixels:
    """The box (top, left, height, width) of an image as `[size, size, 3]`: within a level of Pillow's antialiased
    bilinear resize. A box of that size is a view of the image."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]
    if height == width == size:
        return crop
    if height <= size and width <= size:  # nothing to antialias
        return cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)  # pyright: ignore[reportReturnType]
    crop_13HW = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    crop_13SS = functional.interpolate(crop_13HW, (size, size), mode="bilinear", antialias=True)
    return crop_13SS[0].permute(1, 2, 0).numpy()


def flip_horizontal(images: Pixels) -> Pixels:
    return _at_once(images, lambda image: cv2.flip(image, 1)) if len(images) > 0 else images


def affine(images: Pixels, matrix_N23: Array, fill: tuple[float, ...], resampling: str) -> Pixels:
    """Pillow's `Image.transform(size, AFFINE, matrix)`, but that at the border the colour `fill` is blended in. A
    matrix takes the centre (x + 0.5, y + 0.5) of an output pixel to a point of the input."""
    x_N2, y_N2, shift_N2 = np.moveaxis(matrix_N23, 2, 0)
    # OpenCV counts from the centres of pixels.
    matrix_N23 = np.stack([x_N2, y_N2, shift_N2 + (x_N2 + y_N2) / 2 - 0.5], axis=2)
    size, flags = images.shape[2:0:-1], _INTERPOLATION[resampling] | cv2.WARP_INVERSE_MAP

    def warp(image: Pixels, matrix: Array, out: Pixels) -> None:
        cv2.warpAffine(image, matrix, size, out, flags, borderValue=fill)

    return _each(images, matrix_N23, warp)


def _each(images: Pixels, arguments: Iterable[Any], change: Callable[[Any, Any, Any], object]) -> Pixels:
    """`change` gets each image, its argument and the memory of its result."""
    made = np.empty_like(images)
    for image, argument, out in zip(images, arguments, made, strict=True):
        change(image, argument, out)
    return made


def _at_once(images: Pixels, change: Callable[[Pixels], cv2.typing.MatLike]) -> Pixels:
    """`change` gets the stack as a single image, one above the other."""
    return np.asarray(change(images.reshape(-1, images.shape[2], 3)), np.uint8).reshape(images.shape)


def _blended(images: Pixels, factor_N: Array, other_N34: Array) -> Pixels:
    """`factor_N` parts of each pixel, and one minus that of what the matrix makes of its (red, green, blue, 1)."""
    factor_N11 = factor_N[:, None, None]
    matrix_N34 = factor_N11 * _COLOUR + (1 - factor_N11) * other_N34 + _TRUNCATED * _WHITE
    return _each(images, matrix_N34, cv2.transform)


def _contrast(images: Pixels, factor_N: Array) -> Pixels:
    luma_N = np.array([cv2.mean(image)[:3] for image in images]) @ _LUMA[0, :3]
    return _blended(images, factor_N, luma_N[:, None, None] * _WHITE)


def _grayscale(images: Pixels, _: Array) -> Pixels:
    return _at_once(images, lambda image: cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _hue(images: Pixels, shift_N: Array) -> Pixels:
    """The hue turned by `shift_N`, in turns. In 8 bits, as Pillow does it: there are 256 hues."""
    hsv_NHW3 = _at_once(images, lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
    # Whole rows of pixels, not their hues alone: numpy adds contiguous bytes many at a time.
    row_N1W3 = np.zeros((len(images), 1, *images.shape[2:]), np.uint8)
    row_N1W3[..., 0] = np.rint(256 * shift_N[:, None, None]).astype(np.int64)
    hsv_NHW3 += row_N1W3  # hues wrap around
    return _at_once(hsv_NHW3, lambda image: cv2.cvtColor(image, cv2.COLOR_HSV2RGB_FULL))


def _look_up(images: Pixels, table_NV: npt.NDArray[Any]) -> Pixels:
    """Each value through its image's table of 256; or `[N, 256, 3]`, one for each channel."""
    return _each(images, np.ascontiguousarray(table_NV, np.uint8)[:, None], cv2.LUT)


def _by_table(levels: Callable[[Array], npt.NDArray[Any]]) -> Operation:
    """`levels` takes arguments `[N, 1]` to what the levels 0 to 255 become, `[N, 256]`."""
    return lambda images, argument_N: _look_up(images, levels(argument_N[:, None]))


def _autocontrast(images: Pixels, _: Array) -> Pixels:
    channels = [channel.reshape(len(images), -1) for channel in cv2.split(images.reshape(-1, images.shape[2], 3))]
    low_N31 = np.array([channel.min(axis=1) for channel in channels], float).T[:, :, None]
    high_N31 = np.array([channel.max(axis=1) for channel in channels]).T[:, :, None]
    spread_N31 = np.maximum(high_N31 - low_N31, 1)
    matrix_N34 = np.where(high_N31 > low_N31, 255 / spread_N31, 1) * _COLOUR
    matrix_N34[:, :, 3:] = np.where(high_N31 > low_N31, -low_N31 * 255 / spread_N31, 0) + _TRUNCATED
    return _each(images, matrix_N34, cv2.transform)


def _equalize(images: Pixels, _: Array) -> Pixels:
    # Whole numbers as float32, which OpenCV counts in and numpy divides fast.
    count_N3V = np.empty((len(images), 3, 256), np.float32)
    for image, count_3V in zip(images, count_N3V, strict=True):
        for channel in range(3):
            cv2.calcHist([image], [channel], None, [256], [0, 256], count_3V[channel])
    below_N3V = count_N3V.cumsum(axis=2)
    below_N3V -= count_N3V
    # A 255th of all pixels but the brightest. The table's entries for values that no pixel has do not matter.
    darker_N31 = np.where(below_N3V < images[0, ..., 0].size, below_N3V, 0).max(axis=2, keepdims=True)
    step_N31 = np.floor(darker_N31 / 255)
    below_N3V += np.floor(step_N31 / 2)
    below_N3V /= np.maximum(step_N31, 1)
    np.minimum(below_N3V, 255, out=below_N3V)
    table_N3V = np.where(step_N31 > 0, below_N3V, _LEVEL.astype(np.float32))
    return _look_up(images, table_N3V.astype(np.uint8).transpose(0, 2, 1))


def _blur(image: Pixels, sigma: float, out: Pixels) -> None:
    cv2.GaussianBlur(image, (17, 17), sigma, out)


def _sharpen(image: Pixels, factor: float, out: Pixels) -> None:
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    smooth[0], smooth[-1] = image[0], image[-1]
    smooth[:, 0], smooth[:, -1] = image[:, 0], image[:, -1]
    cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATED, out)


OF_COLOUR: dict[str, Operation] = {
    "Brightness": lambda images, factor_N: _blended(images, factor_N, 0 * _COLOUR),
    "Contrast": _contrast,
    "Color": lambda images, factor_N: _blended(images, factor_N, _LUMA),
    "Hue": _hue,
    "Grayscale": _grayscale,
    "Sharpness": lambda images, factor_N: _each(images, factor_N.tolist(), _sharpen),
    "Blur": lambda images, sigma_N: _each(images, sigma_N.tolist(), _blur),
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda images, _: ~images,
    "Posterize": _by_table(lambda bits: _LEVEL & (256 - (256 >> bits.astype(np.int64)))),
    "Solarize": _by_table(lambda threshold: np.where(threshold > _LEVEL, _LEVEL, 255 - _LEVEL)),
    "SolarizeAdd": _by_table(lambda addend: np.where(_LEVEL < 128, _LEVEL + addend, _LEVEL)),  # at most 127 + 110
}
MATRICES: dict[str, Matrix] = {
    "Rotate": lambda degrees, side: cv2.getRotationMatrix2D((side / 2, side / 2), -degrees, 1),
    "ShearX": lambda level, _: [[1, level, 0], [0, 1, 0]],
    "ShearY": lambda level, _: [[1, 0, 0], [level, 1, 0]],
    "TranslateX": lambda pixels, _: [[1, 0, pixels], [0, 1, 0]],
    "TranslateY": lambda pixels, _: [[1, 0, 0], [0, 1, pixels]],
}
