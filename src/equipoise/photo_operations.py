"""Pixel operations on one photograph: OpenCV on bytes, several times faster at 224 pixels than the same in torch.

Images are uint8 arrays `[H, W, 3]`, RGB, and never changed in place; the parameter is a number. The names, parameters
and results are those of `operations.py`, within 2 levels of 255 on average over an image (`test_photo_operations.py`).
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

_LEVEL = np.arange(256)
_SAME = np.eye(3)
_LUMA = np.array([0.299, 0.587, 0.114])
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
# OpenCV rounds where the references truncate. Not quite a half, so that whole numbers stay what they are.
_TRUNCATED = -0.49
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def apply(image: Pixels, name: str, argument: float, resampling: str, fill: Sequence[float]) -> Pixels:
    """The operation `name` of `policies.OPERATIONS`."""
    if name in _COLOUR:
        return _COLOUR[name](image, argument)
    return affine(image, _MATRICES[name](argument, image.shape[0]), fill, resampling)


def _mixed(image: Pixels, matrix_33: npt.NDArray[np.float64], offset: float | npt.NDArray[np.float64] = 0.0) -> Pixels:
    """Each pixel's colour through a matrix, plus an offset."""
    matrix_34 = np.empty((3, 4), np.float32)
    matrix_34[:, :3], matrix_34[:, 3] = matrix_33, offset + _TRUNCATED
    return cv2.transform(image, matrix_34)  # pyright: ignore[reportReturnType] bytes stay bytes


def _gray(image: Pixels) -> Pixels:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # pyright: ignore[reportReturnType]


def to_grayscale(image: Pixels) -> Pixels:
    return cv2.cvtColor(_gray(image), cv2.COLOR_GRAY2RGB)  # pyright: ignore[reportReturnType]


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATED)  # pyright: ignore[reportReturnType]


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    return _mixed(image, factor * _SAME, (1 - factor) * cv2.mean(_gray(image))[0])


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    return _mixed(image, factor * _SAME + (1 - factor) * _LUMA)


def adjust_hue(image: Pixels, shift: float) -> Pixels:
    """In 8 bits, as Pillow does it: there are 256 hues."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    added = np.zeros_like(hsv[0])
    added[:, 0] = round(256 * shift) % 256
    hsv += added  # the hue wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)  # pyright: ignore[reportReturnType]


def invert(image: Pixels) -> Pixels:
    return cv2.bitwise_not(image)  # pyright: ignore[reportReturnType]


def posterize(image: Pixels, bits: float) -> Pixels:
    return image & np.uint8(256 - (256 >> int(bits)))


def _lookup(image: Pixels, table: npt.NDArray[np.int64]) -> Pixels:
    return cv2.LUT(image, table.astype(np.uint8))  # pyright: ignore[reportReturnType]


def solarize(image: Pixels, threshold: float) -> Pixels:
    return _lookup(image, np.where(threshold > _LEVEL, _LEVEL, 255 - _LEVEL))


def solarize_add(image: Pixels, addend: float) -> Pixels:
    return _lookup(image, np.where(_LEVEL < 128, np.minimum(_LEVEL + int(addend), 255), _LEVEL))


def autocontrast(image: Pixels) -> Pixels:
    limits = [cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]
    low_3, high_3 = np.array(limits).T
    scale_3 = np.where(high_3 > low_3, 255 / np.maximum(high_3 - low_3, 1), 1)
    return _mixed(image, np.diag(scale_3), np.where(high_3 > low_3, -low_3 * scale_3, 0))


def equalize(image: Pixels) -> Pixels:
    tables: list[npt.NDArray[np.int64]] = []
    for channel in range(3):
        histogram = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
        below = np.cumsum(histogram) - histogram
        tables.append(np.minimum((below + step // 2) // step, 255) if step else _LEVEL)
    return _lookup(image, np.stack(tables, axis=1)[None])


def adjust_sharpness(image: Pixels, factor: float) -> Pixels:
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    smooth[[0, -1]], smooth[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATED)  # pyright: ignore[reportReturnType]


def gaussian_blur(image: Pixels, sigma: float) -> Pixels:
    return cv2.GaussianBlur(image, (17, 17), sigma)  # pyright: ignore[reportReturnType]


def affine(image: Pixels, matrix_23: Sequence[Sequence[float]], fill: Sequence[float], resampling: str) -> Pixels:
    """As `operations.affine`; at the border, though, the fill colour is blended in rather than cut off."""
    # From the centres of pixels, (x + 0.5, y + 0.5), to OpenCV's whole numbers.
    matrix = np.array([[a, b, c + (a + b) / 2 - 0.5] for a, b, c in matrix_23])
    return cv2.warpAffine(  # pyright: ignore[reportReturnType]
        image,
        matrix,
        image.shape[1::-1],
        flags=_INTERPOLATION[resampling] | cv2.WARP_INVERSE_MAP,
        borderValue=tuple(fill),
    )


def _rotation(degrees: float, side: int) -> list[list[float]]:
    cos, sin, middle = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), side / 2
    return [
        [cos, -sin, middle - cos * middle + sin * middle],
        [sin, cos, middle - sin * middle - cos * middle],
    ]


_COLOUR: dict[str, Callable[[Pixels, float], Pixels]] = {
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
