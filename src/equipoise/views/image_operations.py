"""Pixel operations in OpenCV, on bytes: on a CPU several times faster than batches in torch.

Images are a contiguous stack `[N, H, W, 3]`, uint8, RGB, never changed in place: one photograph, or all small images of
a batch that are in for the same operation, since at 32 pixels a call costs more than its work. Each has its own
parameter, in `[N]`. The names, parameters and results are those of `operations.py`, within 2 levels of 255 on average
over a photograph (`test_image_operations.py`). Bicubic shears and turns are by OpenCV's cubic (a = -0.75), which is a
little softer than Pillow's (a = -1): on noise by up to 4.5 levels.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]
Operation = Callable[[Pixels, Array], Pixels]
Step = tuple[str, Operation, Array]  # its name, and its argument [1]

_LEVEL = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
# OpenCV rounds where the references truncate. Not quite a half, so that whole numbers stay what they are; but for what
# OpenCV's own rounding of a matrix's coefficients does, up to a quarter of a level: gray may get a tint of one.
_TRUNCATED = -0.49
# Matrices that take (red, green, blue, 1) to a colour: itself, its luma, white.
_COLOUR = np.eye(3, 4)
_LUMA = np.array([[0.299, 0.587, 0.114, 0]] * 3)
_WHITE = np.array([[0, 0, 0, 1]] * 3)

cv2.setNumThreads(0)  # the loader's processes are the parallelism; threads inside each would fight for the cores


@lru_cache
def operation(name: str, resampling: str, fill: tuple[float, ...]) -> Operation:
    """The operation `name` of `policies.OPERATIONS`, of a stack of images and their arguments."""
    if name in _OF_COLOUR:
        return _OF_COLOUR[name]
    if name in _AXES:
        return lambda images, argument_N: _translate(images, argument_N, _AXES[name], fill, resampling)
    return lambda images, argument_N: _affine(images, argument_N, _MATRICES[name], fill, resampling)


def resized_crop(image: Pixels, box: Sequence[int], size: int) -> Pixels:
    """The box (top, left, height, width) of an image as `[size, size, 3]`: Pillow's antialiased bilinear resize, within
    a level."""
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
    return _stack(cv2.flip(_tall(images), 1), images) if len(images) > 0 else images


def _tall(images: Pixels) -> Pixels:
    """The stack as a single image, one above the other."""
    return images.reshape(-1, images.shape[2], 3)


def _stack(tall: cv2.typing.MatLike, like: Pixels) -> Pixels:
    """And back."""
    return np.asarray(tall, np.uint8).reshape(like.shape)


def in_turn(image: Pixels, steps: Sequence[Step]) -> Pixels:
    """A photograph `[1, H, W, 3]` through several operations.

    Brightness, contrast and saturation are each a * colour + b * luma + c. One after the other they are that again, but
    for what is clipped in between; and a factor of at most 1 clips nothing. Such are done in one pass over the pixels.
    """
    together, clips = _UNCHANGED, False
    for name, operation, argument_1 in steps:
        if name not in _LINEAR or clips:
            image, together, clips = _linear(image, together), _UNCHANGED, False
        if name not in _LINEAR:
            image = operation(image, argument_1)
            continue
        a, b, c = together
        luma = (a + b) * _mean_luma(image[0]) + c if name == "Contrast" else 0
        of_colour, of_luma, add = _LINEAR[name](float(argument_1[0]), luma)
        together = of_colour * a, of_colour * b + of_luma * (a + b), (of_colour + of_luma) * c + add + _TRUNCATED
        clips = float(argument_1[0]) > 1
    return _linear(image, together)


def _linear(image: Pixels, together: tuple[float, float, float]) -> Pixels:
    if together is _UNCHANGED:
        return image
    a, b, c = together
    return _transform(image, (a * _COLOUR + b * _LUMA + c * _WHITE)[None])


def _linear_operation(name: str) -> Operation:
    def operation(images: Pixels, factor_N: Array) -> Pixels:
        luma_N = np.array([_mean_luma(image) for image in images]) if name == "Contrast" else np.zeros(1)
        a, b, c = (part[:, None, None] for part in np.broadcast_arrays(*_LINEAR[name](factor_N, luma_N)))
        return _transform(images, a * _COLOUR + b * _LUMA + (c + _TRUNCATED) * _WHITE)

    return operation


def _mean_luma(image: Pixels) -> float:
    red, green, blue, _ = cv2.mean(image)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _transform(images: Pixels, matrix_N34: Array) -> Pixels:
    """Each pixel (red, green, blue, 1) times the matrix of its image, rounded."""
    made = np.empty_like(images)
    for image, matrix, out in zip(images, matrix_N34, made, strict=True):
        cv2.transform(image, matrix, out)
    return made


def to_grayscale(images: Pixels, _: Array) -> Pixels:
    luma = cv2.cvtColor(_tall(images), cv2.COLOR_RGB2GRAY)
    return _stack(cv2.cvtColor(luma, cv2.COLOR_GRAY2RGB), images)


def adjust_hue(images: Pixels, shift_N: Array) -> Pixels:
    """In 8 bits, as Pillow does it: there are 256 hues."""
    hsv = cv2.cvtColor(_tall(images), cv2.COLOR_RGB2HSV_FULL)
    # Whole rows of pixels, not their hues alone: bytes that lie together are added many at a time.
    row_N1W3 = np.zeros((len(images), 1, *images.shape[2:]), np.uint8)
    row_N1W3[..., 0] = np.rint(256 * shift_N[:, None, None]).astype(np.int64)
    moved = _stack(hsv, images)
    moved += row_N1W3  # hues wrap around
    return _stack(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), images)


def invert(images: Pixels, _: Array) -> Pixels:
    return ~images


def posterize(images: Pixels, bits_N: Array) -> Pixels:
    return images & (256 - (256 >> bits_N.astype(np.int64))).astype(np.uint8)[:, None, None, None]


def _look_up(images: Pixels, table_NV: npt.NDArray[np.integer]) -> Pixels:
    """Each value through its image's table of 256; or `[N, 256, 3]`, one for each channel."""
    made = np.empty_like(images)
    for image, table, out in zip(images, np.ascontiguousarray(table_NV, np.uint8)[:, None], made, strict=True):
        cv2.LUT(image, table, out)
    return made


def solarize(images: Pixels, threshold_N: Array) -> Pixels:
    return _look_up(images, np.where(threshold_N[:, None] > _LEVEL, _LEVEL, 255 - _LEVEL))


def solarize_add(images: Pixels, addend_N: Array) -> Pixels:
    addend_N1 = addend_N.astype(np.int64)[:, None]
    return _look_up(images, np.where(_LEVEL < 128, _LEVEL + addend_N1, _LEVEL))  # at most 127 + 110


def autocontrast(images: Pixels, _: Array) -> Pixels:
    channels = [channel.reshape(len(images), -1) for channel in cv2.split(_tall(images))]
    low_N31 = np.array([channel.min(axis=1) for channel in channels], float).T[:, :, None]
    high_N31 = np.array([channel.max(axis=1) for channel in channels]).T[:, :, None]
    spread_N31 = np.maximum(high_N31 - low_N31, 1)
    matrix_N34 = np.where(high_N31 > low_N31, 255 / spread_N31, 1) * _COLOUR
    matrix_N34[:, :, 3:] = np.where(high_N31 > low_N31, -low_N31 * 255 / spread_N31, 0) + _TRUNCATED
    return _transform(images, matrix_N34)


def equalize(images: Pixels, _: Array) -> Pixels:
    # Whole numbers as float32, which OpenCV counts in and numpy divides fast.
    count_N3V = np.empty((len(images), 3, 256), np.float32)
    for image, count_3V in zip(images, count_N3V, strict=True):
        for channel in range(3):
            cv2.calcHist([image], [channel], None, [256], [0, 256], count_3V[channel])
    below_N3V = count_N3V.cumsum(axis=2)
    below_N3V -= count_N3V
    # A 255th of all pixels but the brightest. What becomes of values that no pixel has does not matter.
    darker_N31 = np.where(below_N3V < images[0, ..., 0].size, below_N3V, 0).max(axis=2, keepdims=True)
    step_N31 = np.floor(darker_N31 / 255)
    below_N3V += np.floor(step_N31 / 2)
    below_N3V /= np.maximum(step_N31, 1)
    np.minimum(below_N3V, 255, out=below_N3V)
    table_N3V = np.where(step_N31 > 0, below_N3V, _LEVEL.astype(np.float32))
    return _look_up(images, table_N3V.astype(np.uint8).transpose(0, 2, 1))


def adjust_sharpness(images: Pixels, factor_N: Array) -> Pixels:
    made = np.empty_like(images)
    for image, factor, out in zip(images, factor_N.tolist(), made, strict=True):
        smooth = cv2.filter2D(image, -1, _SMOOTH)
        smooth[0], smooth[-1] = image[0], image[-1]
        smooth[:, 0], smooth[:, -1] = image[:, 0], image[:, -1]
        cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATED, out)
    return made


def gaussian_blur(images: Pixels, sigma_N: Array) -> Pixels:
    made = np.empty_like(images)
    for image, sigma, out in zip(images, sigma_N.tolist(), made, strict=True):
        cv2.GaussianBlur(image, (17, 17), sigma, out)
    return made


def _affine(
    images: Pixels, argument_N: Array, matrix_of: "_MatrixOf", fill: tuple[float, ...], resampling: str
) -> Pixels:
    """As `operations.affine`; at the border, though, the fill colour is blended in rather than cut off."""
    flags, made = _INTERPOLATION[resampling] | cv2.WARP_INVERSE_MAP, np.empty_like(images)
    for image, argument, out in zip(images, argument_N.tolist(), made, strict=True):
        # From the centres of pixels, (x + 0.5, y + 0.5), to OpenCV's whole numbers.
        matrix = np.array([[a, b, c + (a + b) / 2 - 0.5] for a, b, c in matrix_of(argument, len(image))])
        cv2.warpAffine(image, matrix, image.shape[1::-1], out, flags, borderValue=fill)
    return made


def _translate(images: Pixels, pixels_N: Array, axis: int, fill: tuple[float, ...], resampling: str) -> Pixels:
    """Along a column (`axis` 0) or a row (1), as Pillow does it; in a fifth of the time of `_affine`."""
    made = np.empty_like(images)
    made[...] = np.array(
        [fill] * images.shape[2], np.uint8
    )  # a whole row: three bytes at a time would take as long as the rest
    for image, pixels, out in zip(images, pixels_N.tolist(), made, strict=True):
        # Place x becomes what is `part` of the way from x + whole to the next one; if its middle lies in the image.
        whole = math.floor(pixels + 0.5 if resampling == "nearest" else pixels)
        begin = max(0, math.ceil(-0.5 - pixels))
        end = max(begin, min(image.shape[axis], math.ceil(image.shape[axis] - 0.5 - pixels)))
        margins = (2, 2, 0, 0) if axis == 0 else (0, 0, 2, 2)
        moved = cv2.copyMakeBorder(image, *margins, cv2.BORDER_REPLICATE)
        if resampling != "nearest":
            taps = np.array([_TAPS[resampling](pixels - whole)])
            kernel, anchor = (taps.T, (0, 1)) if axis == 0 else (taps, (1, 0))
            moved = cv2.filter2D(moved, -1, kernel, anchor=anchor, delta=_TRUNCATED)
        out.swapaxes(0, axis)[begin:end] = moved.swapaxes(0, axis)[begin + whole + 2 : end + whole + 2]
    return made


def _rotation(degrees: float, side: int) -> list[list[float]]:
    cos, sin, middle = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), side / 2
    return [
        [cos, -sin, middle - cos * middle + sin * middle],
        [sin, cos, middle - sin * middle - cos * middle],
    ]


# Factor and mean luma of the image (numbers, or an array of those of several) to a, b and c of
# a * colour + b * luma + c.
_UNCHANGED = (1.0, 0.0, 0.0)
_LINEAR: dict[str, Callable[[Any, Any], tuple[Any, Any, Any]]] = {
    "Brightness": lambda factor, _: (factor, 0, 0),
    "Contrast": lambda factor, luma: (factor, 0, (1 - factor) * luma),
    "Color": lambda factor, _: (factor, 1 - factor, 0),
}
_OF_COLOUR: dict[str, Operation] = {
    **{name: _linear_operation(name) for name in _LINEAR},
    "Hue": adjust_hue,
    "Sharpness": adjust_sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Blur": gaussian_blur,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
    "Grayscale": to_grayscale,
}
# Of an argument and the side of square images: from output to input.
_MatrixOf = Callable[[float, int], list[list[float]]]
_MATRICES: dict[str, _MatrixOf] = {
    "Rotate": _rotation,
    "ShearX": lambda level, _: [[1, level, 0], [0, 1, 0]],
    "ShearY": lambda level, _: [[1, 0, 0], [level, 1, 0]],
}
_AXES = {"TranslateX": 1, "TranslateY": 0}
# Weights of a place's neighbours before, at, after and beyond it, of one that is `part` of the way to the third.
_TAPS: dict[str, Callable[[float], tuple[float, ...]]] = {
    "bilinear": lambda part: (0, 1 - part, part, 0),
    "bicubic": lambda part: (
        -part * (1 - part) ** 2,
        (1 - part) * (1 + part - part**2),
        part * (1 + part - part**2),
        -(1 - part) * part**2,
    ),
}
