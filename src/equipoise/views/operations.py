"""Pixel operations on whole batches: the building blocks of the augmentation policies.

Images are `uint8` tensors `[N, 3, H, W]` (RGB, any memory format), on the CPU or a GPU, and never changed in
place. Parameters are explicit, one per image, in tensors `[N]` on the images' device: nothing is random,
and nothing waits for a GPU. PIL is the reference for tables and geometry, torchvision's tensors for colour.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Interpolation = Literal["nearest", "bilinear", "bicubic"]


def _per_image(values_N: Tensor) -> Tensor:
    return values_N.view(-1, 1, 1, 1)


def _truncate(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def _luma(images_N3HW: Tensor) -> Tensor:
    """`[N, 1, H, W]`, float32 whole numbers."""
    red, green, blue = images_N3HW.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(other: Tensor, images_N3HW: Tensor, factor_N: Tensor) -> Tensor:
    """`other` where the factor is 0, the images where it is 1, extrapolated beyond."""
    return _truncate(torch.lerp(other, images_N3HW.float(), _per_image(factor_N.float())))


def _lookup(images_N3HW: Tensor, table_N3V: Tensor) -> Tensor:
    """Each channel of each image through its own table of 256 values."""
    return table_N3V.gather(2, images_N3HW.flatten(2).long()).view(images_N3HW.shape)


def _resample(images_N3HW: Tensor, rows_NPH: Tensor, columns_NQW: Tensor) -> Tensor:
    """`rows @ image @ columns.T` for each channel, rounded. Each row of a matrix sums to 1."""
    count, channels, height, width = images_N3HW.shape
    # With the channels between rows and columns, either side is one matrix product per image.
    lines = images_N3HW.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    lines = rows_NPH.bmm(lines.view(count, height, channels * width)).view(count, -1, width)
    lines = lines.bmm(columns_NQW.mT).view(count, -1, channels, columns_NQW.shape[1])
    return lines.transpose(1, 2).add(0.5).to(torch.uint8, memory_format=torch.contiguous_format)


# ---- Position and size


def flip_horizontal(images_N3HW: Tensor, flip_N: Tensor) -> Tensor:
    """Images mirrored left to right where `flip_N` (bool) is true, as torchvision's horizontal_flip."""
    return torch.where(_per_image(flip_N), images_N3HW.flip(-1), images_N3HW)


def shift_crop(images_N3HW: Tensor, top_N: Tensor, left_N: Tensor, padding: int) -> Tensor:
    """The H x W window of the zero-padded image with its corner at (`top_N`, `left_N`), 0..2 * padding.

    With uniform corners this is torchvision's RandomCrop(H, padding=padding).
    """
    height, width = images_N3HW.shape[-2:]
    windows = functional.pad(images_N3HW, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images_N3HW), device=images_N3HW.device), :, top_N, left_N]


def _resize_matrix(start_N: Tensor, extent_N: Tensor, length: int, size: int) -> Tensor:
    """`[N, size, length]`: Pillow's antialiased bilinear filter of the pixels start to start + extent."""
    start_N11, extent_N11 = start_N.float().view(-1, 1, 1), extent_N.float().view(-1, 1, 1)
    pixel_L = torch.arange(length, device=start_N.device) + 0.5
    scale_N11 = extent_N11 / size
    centre_NS1 = start_N11 + scale_N11 * (torch.arange(size, device=start_N.device) + 0.5)[:, None]
    weight_NSL = (pixel_L - centre_NS1).abs_().div_(scale_N11.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    weight_NSL *= (pixel_L > start_N11) & (pixel_L < start_N11 + extent_N11)
    return weight_NSL.div_(weight_NSL.sum(2, keepdim=True))


def resized_crop(
    images_N3HW: Tensor, top_N: Tensor, left_N: Tensor, height_N: Tensor, width_N: Tensor, size: int
) -> Tensor:
    """The box (whole pixels, inside the image) of each image, resized to `[N, 3, size, size]`.

    Reproduces torchvision.transforms.v2.functional.resized_crop(antialias=True) with bilinear interpolation.
    """
    height, width = images_N3HW.shape[-2:]
    rows_NSH = _resize_matrix(top_N, height_N, height, size)
    columns_NSW = _resize_matrix(left_N, width_N, width, size)
    return _resample(images_N3HW, rows_NSH, columns_NSW)


def cutout(images_N3HW: Tensor, center_y_N: Tensor, center_x_N: Tensor, length: int) -> Tensor:
    """DeVries & Taylor's Cutout: a zero square around (`center_y_N`, `center_x_N`), in whole pixels.

    It covers rows y - length // 2 to y + length // 2 (excluded), clipped: an odd length counts as one less.
    """
    half = length // 2
    y_H1 = torch.arange(images_N3HW.shape[2], device=images_N3HW.device)[:, None]
    x_W = torch.arange(images_N3HW.shape[3], device=images_N3HW.device)
    center_y, center_x = _per_image(center_y_N), _per_image(center_x_N)
    rows = (y_H1 >= center_y - half) & (y_H1 < center_y + half)
    columns = (x_W >= center_x - half) & (x_W < center_x + half)
    return images_N3HW.masked_fill(rows & columns, 0)


# ---- Colour


def to_grayscale(images_N3HW: Tensor) -> Tensor:
    """The luma in three equal channels, as torchvision.transforms.v2.functional.rgb_to_grayscale."""
    return _luma(images_N3HW).to(torch.uint8).repeat(1, 3, 1, 1)


def adjust_brightness(images_N3HW: Tensor, factor_N: Tensor) -> Tensor:
    """Pixels times `factor_N` >= 0, as torchvision.transforms.v2.functional.adjust_brightness."""
    return _truncate(images_N3HW * _per_image(factor_N.float()))


def adjust_contrast(images_N3HW: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with the image's mean luma (`factor_N` 0).

    Reproduces torchvision.transforms.v2.functional.adjust_contrast.
    """
    return _blend(_luma(images_N3HW).mean((1, 2, 3), keepdim=True), images_N3HW, factor_N)


def adjust_saturation(images_N3HW: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with the grayscale image (`factor_N` 0).

    Reproduces torchvision.transforms.v2.functional.adjust_saturation.
    """
    return _blend(_luma(images_N3HW), images_N3HW, factor_N)


def adjust_hue(images_N3HW: Tensor, shift_N: Tensor) -> Tensor:
    """The HSV hue turned by `shift_N`, in turns (-0.5 to 0.5).

    Reproduces torchvision.transforms.v2.functional.adjust_hue.
    """
    red, green, blue = images_N3HW.float().unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # Hue in sixths of a turn; it means nothing where the chroma is 0, which the clamp keeps finite.
    inverse = chroma.clamp(min=1).reciprocal_()
    hue = torch.where(high == green, (blue - red) * inverse + 2, (red - green) * inverse + 4)
    hue = torch.where(high == red, (green - blue) * inverse, hue)
    hue += 6 * shift_N.float().view(-1, 1, 1)
    hue -= (hue / 6).floor_() * 6
    # Each channel is a trapezium on the circle of hues: full within a sixth of its own hue, none beyond two.
    shares = torch.stack([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], dim=1)
    values = shares.clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])
    # torchvision scales [0, 1] to uint8 with a factor just under 256.
    return values.mul_(255.999 / 255).to(torch.uint8)


def invert(images_N3HW: Tensor) -> Tensor:
    """255 minus each pixel, as PIL's ImageOps.invert."""
    return images_N3HW.bitwise_not()


def posterize(images_N3HW: Tensor, bits_N: Tensor) -> Tensor:
    """The highest `bits_N` bits (int64, 0..8) of each pixel, as PIL's ImageOps.posterize."""
    mask_N = 255 - torch.full_like(bits_N, 255).bitwise_right_shift(bits_N)
    return images_N3HW & _per_image(mask_N.to(torch.uint8))


def solarize(images_N3HW: Tensor, threshold_N: Tensor) -> Tensor:
    """Pixels >= `threshold_N` (0..256; 256 changes none) are inverted, as PIL's ImageOps.solarize."""
    # As whole numbers of 16 bits: 256 does not fit in the pixels' own type.
    kept = images_N3HW < _per_image(threshold_N.ceil().to(torch.int16))
    return torch.where(kept, images_N3HW, images_N3HW.bitwise_not())


def solarize_add(images_N3HW: Tensor, addend_N: Tensor, threshold: int = 128) -> Tensor:
    """`addend_N` (int64) is added, clipped at 255, to pixels < `threshold`, as timm's solarize_add."""
    values = images_N3HW.to(torch.int16)
    raised = values + _per_image(addend_N.to(torch.int16))
    return _truncate(torch.where(values < threshold, raised, values))


def autocontrast(images_N3HW: Tensor) -> Tensor:
    """Each channel stretched to 0..255 (kept if constant), as PIL's ImageOps.autocontrast."""
    pixels = images_N3HW.flatten(2)
    # PIL's table in PIL's precision: it truncates values that are whole but for the last bit of a double.
    low, high = pixels.amin(2, keepdim=True).double(), pixels.amax(2, keepdim=True).double()
    level_V = torch.arange(256, dtype=torch.float64, device=images_N3HW.device)
    scale = torch.full_like(low, 255) / (high - low).clamp_(min=1)
    table = torch.where(high > low, level_V * scale - low * scale, level_V)
    return _lookup(images_N3HW, _truncate(table))


def equalize(images_N3HW: Tensor) -> Tensor:
    """Each channel's histogram flattened, as PIL's ImageOps.equalize."""
    pixels = images_N3HW.flatten(2).long()
    one = torch.ones((), dtype=torch.int32, device=images_N3HW.device)
    histogram = torch.zeros((*pixels.shape[:2], 256), dtype=torch.int32, device=images_N3HW.device)
    histogram.scatter_add_(2, pixels, one.expand_as(pixels))
    brightest = histogram.gather(2, pixels.amax(2, keepdim=True))
    step = ((pixels.shape[2] - brightest) / 255).floor_()
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    table = ((below + (step / 2).floor_()) / step.clamp(min=1)).floor_()
    level_V = torch.arange(256, dtype=torch.float32, device=images_N3HW.device)
    return _lookup(images_N3HW, _truncate(torch.where(step > 0, table, level_V)))


# ---- Sharpness


def adjust_sharpness(images_N3HW: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with the 3 x 3 smoothed image (`factor_N` 0), borders kept: PIL's ImageEnhance.Sharpness."""
    # Whole numbers of 16 bits hold the sum of 13 pixels.
    pixels = images_N3HW.to(torch.int16)
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth = images_N3HW.float()
    smooth[:, :, 1:-1, 1:-1] = (total / 13).round_()
    return _blend(smooth, images_N3HW, factor_N)


def _blur_matrix(sigma_N: Tensor, length: int) -> Tensor:
    """`[N, length, length]`: a Gaussian of 8 pixels each side (7 on sides of 8), reflected at the ends."""
    radius = min(8, length - 1)
    offset_K = torch.arange(-radius, radius + 1, device=sigma_N.device)
    # Beyond e^-30 the taps would become subnormal numbers, which slow the products down tenfold.
    taps_NK = (offset_K / sigma_N.float()[:, None]).square_().mul_(-0.5).clamp_(min=-30).exp_()
    taps_NK /= taps_NK.sum(1, keepdim=True)
    pixel_L = torch.arange(length, device=sigma_N.device)
    source_KL = (length - 1) - ((length - 1) - (pixel_L + offset_K[:, None]).abs()).abs()
    chosen_KLL = (source_KL[:, :, None] == pixel_L).float()
    return (taps_NK @ chosen_KLL.flatten(1)).view(-1, length, length)


def gaussian_blur(images_N3HW: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur of standard deviation `sigma_N` pixels (0.1 to 2), borders reflected.

    Reproduces torchvision.transforms.v2.functional.gaussian_blur with a kernel of 17 x 17.
    """
    height, width = images_N3HW.shape[-2:]
    columns_NWW = _blur_matrix(sigma_N, width)
    rows_NHH = columns_NWW if height == width else _blur_matrix(sigma_N, height)
    return _resample(images_N3HW, rows_NHH, columns_NWW)


# ---- Geometry


def rotation(angle_N: Tensor, height: int, width: int) -> Tensor:
    """`[N, 2, 3]` for `affine`: `angle_N` degrees counter-clockwise about the centre, as PIL's Image.rotate.

    torchvision's AutoAugment "Rotate" of magnitude m is `rotation(m)`.
    """
    # Doubles up to the last line: points of a rotated grid often lie on a border between two pixels.
    angle_N = angle_N.double().deg2rad()
    cos, sin = angle_N.cos(), angle_N.sin()
    x, y = width / 2, height / 2
    matrix_N6 = torch.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y], dim=1)
    return matrix_N6.float().view(-1, 2, 3)


def shear_x(level_N: Tensor) -> Tensor:
    """`[N, 2, 3]` for `affine`: PIL coefficients (1, level, 0, 0, 1, 0), as timm's shear_x.

    torchvision's AutoAugment "ShearX" of magnitude m is `shear_x(m)`: its atan undoes a tangent.
    """
    zero, one = torch.zeros_like(level_N), torch.ones_like(level_N)
    return torch.stack([one, level_N, zero, zero, one, zero], dim=1).float().view(-1, 2, 3)


def shear_y(level_N: Tensor) -> Tensor:
    """`[N, 2, 3]` for `affine`: PIL coefficients (1, 0, 0, level, 1, 0), as timm's shear_y.

    torchvision's AutoAugment "ShearY" of magnitude m is `shear_y(m)`.
    """
    zero, one = torch.zeros_like(level_N), torch.ones_like(level_N)
    return torch.stack([one, zero, zero, level_N, one, zero], dim=1).float().view(-1, 2, 3)


def translation(x_N: Tensor, y_N: Tensor) -> Tensor:
    """`[N, 2, 3]` for `affine`: PIL coefficients (1, 0, x, 0, 1, y) in pixels, so content moves left and up.

    torchvision's AutoAugment "TranslateX" of magnitude m is `translation(-trunc(m), 0)`, "TranslateY" is
    `translation(0, -trunc(m))`.
    """
    zero, one = torch.zeros_like(x_N), torch.ones_like(x_N)
    return torch.stack([one, zero, x_N, zero, one, y_N], dim=1).float().view(-1, 2, 3)


def _source_points(matrix_N23: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The x and y `[N, H, W]` in the input of the centre of each output pixel."""
    x_W = torch.arange(width, device=matrix_N23.device) + 0.5
    y_H1 = (torch.arange(height, device=matrix_N23.device) + 0.5)[:, None]
    a, b, c, d, e, f = matrix_N23.float().view(-1, 6, 1, 1).unbind(1)
    return a * x_W + (b * y_H1 + c), d * x_W + (e * y_H1 + f)


def _source_pixels(matrix_N23: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The column and row `[N, H, W]` that hold those points, in PIL's 16.16 fixed point."""
    matrix = matrix_N23.to(torch.float64, copy=True)
    matrix[:, :, 2] += matrix[:, :, :2].sum(2) / 2
    a, b, c, d, e, f = matrix.mul_(65536).add_(0.5).floor_().long().view(-1, 6, 1, 1).unbind(1)
    x_W = torch.arange(width, device=matrix_N23.device)
    y_H1 = torch.arange(height, device=matrix_N23.device)[:, None]
    return (a * x_W + (b * y_H1 + c)) >> 16, (d * x_W + (e * y_H1 + f)) >> 16


def _bilinear(images_N3HW: Tensor, x_NHW: Tensor, y_NHW: Tensor) -> Tensor:
    height, width = images_N3HW.shape[-2:]
    grid_NHW2 = torch.stack([x_NHW * (2 / width) - 1, y_NHW * (2 / height) - 1], dim=3)
    return functional.grid_sample(images_N3HW.float(), grid_NHW2, padding_mode="border", align_corners=False)


def _cubic_weights(t_N1P: Tensor) -> tuple[Tensor, ...]:
    """Weights of the four taps -1, 0, 1, 2. PIL's transforms use the cubic of a = -1 (-0.5 in resizes)."""
    square = t_N1P * t_N1P
    cube = square * t_N1P
    return 2 * square - cube - t_N1P, 1 - 2 * square + cube, t_N1P + square - cube, cube - square


def _bicubic(images_N3HW: Tensor, x_NHW: Tensor, y_NHW: Tensor) -> Tensor:
    height, width = images_N3HW.shape[-2:]
    stride = width + 4
    # With borders repeated, the taps of a point lie at fixed distances from its first: one index serves all.
    padded_N3P = functional.pad(images_N3HW.float(), (2, 2, 2, 2), mode="replicate").flatten(2)
    x_N1P, y_N1P = (x_NHW - 0.5).flatten(1)[:, None], (y_NHW - 0.5).flatten(1)[:, None]
    column, row = x_N1P.floor(), y_N1P.floor()
    weights_x, weights_y = _cubic_weights(x_N1P - column), _cubic_weights(y_N1P - row)
    first = (row.clamp_(-1, height - 1).long() + 1) * stride + column.clamp_(-1, width - 1).long() + 1
    index_N3P = first.expand(-1, 3, -1)
    reach = height * stride + width + 1
    total = torch.zeros(index_N3P.shape, device=images_N3HW.device)
    for i, weight_y in enumerate(weights_y):
        for j, weight_x in enumerate(weights_x):
            taps_N3P = padded_N3P.narrow(2, i * stride + j, reach).gather(2, index_N3P)
            total.addcmul_(taps_N3P, weight_y * weight_x)
    return total.view(images_N3HW.shape)


def affine(images_N3HW: Tensor, matrix_N23: Tensor, fill_3: Sequence[float], interpolation: Interpolation) -> Tensor:
    """PIL's Image.transform(size, AFFINE, coefficients, interpolation, fillcolor=fill).

    `matrix_N23` takes the centre (x + 0.5, y + 0.5) of an output pixel to a point of the input; a pixel whose
    point lies outside the image gets the colour `fill_3` (0..255).
    """
    height, width = images_N3HW.shape[-2:]
    if interpolation == "nearest":
        x, y = _source_pixels(matrix_N23, height, width)
        index_N1P = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)[:, None]
        moved = images_N3HW.flatten(2).gather(2, index_N1P.expand(-1, 3, -1)).view(images_N3HW.shape)
    else:
        x, y = _source_points(matrix_N23, height, width)
        values = (_bilinear if interpolation == "bilinear" else _bicubic)(images_N3HW, x, y)
        # PIL truncates; the small number keeps a flat area, where the weights sum to just under 1, as it is.
        moved = _truncate(values.add_(1e-3))
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    for channel, value in zip(moved.unbind(1), fill_3, strict=True):
        channel.masked_fill_(outside, round(value))
    return moved
