"""Each operation against torchvision, PIL or timm, image by image, with other parameters for every image."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as tv

from equipoise.views import operations

SIZES = [(32, 32), (24, 40), (8, 11)]
FILL = (125, 3, 250)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
Oracle = Callable[..., Tensor]


def smoothed_noise(height: int, width: int, generator: torch.Generator) -> Tensor:
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
    noise = torch.rand(3, height, width, generator=generator)
    return (0.85 * smooth + 0.15 * noise).clamp(0, 1).mul(255).round().to(torch.uint8)


def make_images(height: int, width: int) -> Tensor:
    """Six smoothed noises, a gradient, a low-contrast one, white noise and two constants: `[11, 3, H, W]`."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    noises = [smoothed_noise(height, width, generator) for _ in range(6)]
    x, y = torch.linspace(0, 255, width).expand(height, -1), torch.linspace(0, 255, height)[:, None]
    gradient = torch.stack([x, y.expand(-1, width), (255 - x + y) / 2]).to(torch.uint8)
    white = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    colour = torch.tensor([200, 17, 90], dtype=torch.uint8)[:, None, None].expand(3, height, width)
    black = torch.zeros(3, height, width, dtype=torch.uint8)
    return torch.stack([*noises, gradient, noises[0] // 8 + 100, white, colour, black])


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def images(request: pytest.FixtureRequest) -> Tensor:
    return make_images(*request.param)


def spread(low: float, high: float, images: Tensor, *, whole: bool = False) -> Tensor:
    """One value per image from `low` to `high`, both included, not in order."""
    count = len(images)
    values = torch.linspace(low, high, count)[torch.arange(count) * 4 % count]
    return values.round().long() if whole else values


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def through_pil(function: Callable[..., Image.Image]) -> Oracle:
    return lambda image, *args: from_pil(function(to_pil(image), *args))


def expected(images: Tensor, oracle: Oracle, *parameters: Iterable[float]) -> Tensor:
    columns = [p.tolist() if isinstance(p, Tensor) else list(p) for p in parameters]
    return torch.stack([oracle(image, *(c[i] for c in columns)) for i, image in enumerate(images)])


def difference(actual: Tensor, wanted: Tensor) -> Tensor:
    assert actual.dtype == torch.uint8
    assert actual.shape == wanted.shape
    return (actual.int() - wanted.int()).abs()


def assert_close(actual: Tensor, wanted: Tensor, mean: float, worst: int) -> None:
    """The mean absolute error of every image, in 1/255, and the largest one of any pixel."""
    error = difference(actual, wanted)
    per_image = error.float().mean((1, 2, 3))
    assert per_image.max() <= mean, per_image
    assert error.max() <= worst


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    assert_close(actual, wanted, mean=0, worst=0)


# ---- Position and size


def test_flip_horizontal(images):
    flip = torch.arange(len(images)) % 3 == 1
    oracle = lambda image, flipped: tv.horizontal_flip(image) if flipped else image  # noqa: E731
    assert_same(operations.flip_horizontal(images, flip), expected(images, oracle, flip))


@pytest.mark.parametrize("padding", [1, 4])
def test_shift_crop(images, padding):
    height, width = images.shape[-2:]
    top, left = spread(0, 2 * padding, images, whole=True), spread(2 * padding, 0, images, whole=True).roll(2)

    def oracle(image, top, left):
        return tv.crop(tv.pad(image, [padding] * 4), top, left, height, width)

    assert_same(operations.shift_crop(images, top, left, padding), expected(images, oracle, top, left))


@pytest.mark.parametrize("size", [8, 16, 32, 50])
def test_resized_crop(images, size):
    height, width = images.shape[-2:]
    box_height, box_width = (
        spread(1, height, images, whole=True),
        spread(width, 1, images, whole=True).roll(3),
    )
    top = (height - box_height) * torch.arange(len(images)) // (len(images) - 1)
    left = (width - box_width) * torch.arange(len(images)).flip(0) // (len(images) - 1)
    actual = operations.resized_crop(images, top, left, box_height, box_width, size)

    def oracle(image, *box):
        return tv.resized_crop(image, *box, [size, size], antialias=True)

    assert_close(actual, expected(images, oracle, top, left, box_height, box_width), mean=0.2, worst=1)


def test_resized_crop_reads_nothing_outside_its_box():
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    images[0, :, 5:15, 7:20] = 40
    images[1, :, 0:3, 29:32] = 90
    box = [torch.tensor(values) for values in ([5, 0], [7, 29], [10, 3], [13, 3])]
    out = operations.resized_crop(images, *box, 24)
    assert (out[0] == 40).all()
    assert (out[1] == 90).all()


@pytest.mark.parametrize("length", [0, 1, 8, 15, 16])
def test_cutout(images, length):
    height, width = images.shape[-2:]
    y, x = spread(0, height - 1, images, whole=True), spread(width - 1, 0, images, whole=True).roll(1)

    def oracle(image, y, x):
        half = length // 2
        out = image.clone()
        out[:, max(0, y - half) : min(height, y + half), max(0, x - half) : min(width, x + half)] = 0
        return out

    assert_same(operations.cutout(images, y, x, length), expected(images, oracle, y, x))


# ---- Colour


def test_to_grayscale(images):
    assert_same(
        operations.to_grayscale(images),
        expected(images, lambda i: tv.rgb_to_grayscale(i, num_output_channels=3)),
    )


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.6, 1.4), (1.0, 3.0)])
def test_adjust_brightness(images, low, high):
    factor = spread(low, high, images)
    actual = operations.adjust_brightness(images, factor)
    assert_same(actual, expected(images, tv.adjust_brightness, factor))
    reference = through_pil(lambda image, f: ImageEnhance.Brightness(image).enhance(f))
    assert_close(actual, expected(images, reference, factor), mean=0.02, worst=1)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.6, 1.4), (1.0, 3.0)])
@pytest.mark.parametrize(("name", "pil"), [("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)])
def test_adjust_contrast_and_saturation(images, name, pil, low, high):
    factor = spread(low, high, images)
    actual = getattr(operations, f"adjust_{name}")(images, factor)
    # Truncated values that are whole but for the last bit of a float are one off.
    assert_close(actual, expected(images, getattr(tv, f"adjust_{name}"), factor), mean=0.1, worst=1)
    # PIL rounds the luma and the mean.
    reference = through_pil(lambda image, f: pil(image).enhance(f))
    assert_close(actual, expected(images, reference, factor), mean=1.5, worst=2)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (-0.1, 0.1), (0.0, 0.0)])
def test_adjust_hue(images, low, high):
    shift = spread(low, high, images)
    actual = operations.adjust_hue(images, shift)
    assert_close(actual, expected(images, tv.adjust_hue, shift), mean=0.02, worst=1)


def test_adjust_hue_moves_red_to_green_to_blue():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(4, 3, 8, 8)
    out = operations.adjust_hue(red, torch.tensor([0.0, 1 / 3, -1 / 3, 0.5]))
    assert out[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 255, 255]]


def test_invert(images):
    assert_same(operations.invert(images), expected(images, through_pil(ImageOps.invert)))


@pytest.mark.parametrize(("low", "high"), [(0, 8), (4, 8), (1, 3)])
def test_posterize(images, low, high):
    bits = spread(low, high, images, whole=True)
    actual = operations.posterize(images, bits)
    assert_same(actual, expected(images, tv.posterize, bits))
    if low > 0:  # PIL has no 0 bits
        assert_same(actual, expected(images, through_pil(auto_augment.posterize), bits))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("low", "high"), [(0, 256), (100, 130)])
def test_solarize(images, low, high, whole):
    threshold = spread(low, high, images, whole=whole)
    assert_same(
        operations.solarize(images, threshold),
        expected(images, through_pil(auto_augment.solarize), threshold),
    )


@pytest.mark.parametrize("threshold", [128, 60, 256])
def test_solarize_add(images, threshold):
    addend = spread(0, 128, images, whole=True)
    reference = through_pil(lambda image, add: auto_augment.solarize_add(image, add, threshold))
    assert_same(operations.solarize_add(images, addend, threshold), expected(images, reference, addend))


def test_autocontrast(images):
    actual = operations.autocontrast(images)
    assert_same(actual, expected(images, through_pil(ImageOps.autocontrast)))
    assert_close(actual, expected(images, tv.autocontrast), mean=0.5, worst=1)


def test_autocontrast_of_every_range():
    low, high = torch.meshgrid(torch.arange(0, 256, 5), torch.arange(0, 256, 3), indexing="ij")
    low, high = low[low < high], high[low < high]
    ramp = torch.linspace(0, 1, 64)
    images = (low[:, None] + (high - low)[:, None] * ramp).round().to(torch.uint8)
    images = images.view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    assert_same(operations.autocontrast(images), expected(images, through_pil(ImageOps.autocontrast)))


def test_equalize(images):
    actual = operations.equalize(images)
    assert_same(actual, expected(images, through_pil(ImageOps.equalize)))
    assert_same(actual, expected(images, tv.equalize))


# ---- Sharpness


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.1, 1.9), (1.0, 4.0)])
def test_adjust_sharpness(images, low, high):
    factor = spread(low, high, images)
    actual = operations.adjust_sharpness(images, factor)
    assert_close(actual, expected(images, tv.adjust_sharpness, factor), mean=0.02, worst=1)
    reference = through_pil(lambda image, f: ImageEnhance.Sharpness(image).enhance(f))
    assert_close(actual, expected(images, reference, factor), mean=0.02, worst=1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
@pytest.mark.parametrize(("low", "high"), [(0.1, 2.0), (0.5, 1.0)])
def test_gaussian_blur(height, width, low, high):
    images = make_images(height, width)
    sigma = spread(low, high, images)
    reference = expected(images, lambda image, s: tv.gaussian_blur(image, [17, 17], [s, s]), sigma)
    assert_close(operations.gaussian_blur(images, sigma), reference, mean=0.02, worst=1)


def test_gaussian_blur_of_the_smallest_images():
    images = make_images(8, 11)
    sigma = spread(0.1, 2.0, images)
    reference = expected(images, lambda image, s: tv.gaussian_blur(image, [17, 15], [s, s]), sigma)
    assert_close(operations.gaussian_blur(images, sigma), reference, mean=0.02, worst=1)


# ---- Geometry


def pil_affine(interpolation: str) -> Oracle:
    def transform(image, *coefficients):
        method = Image.Transform.AFFINE
        return image.transform(image.size, method, coefficients, RESAMPLING[interpolation], fillcolor=FILL)

    return through_pil(transform)


def assert_geometry(images: Tensor, matrix: Tensor, oracle: Oracle, interpolation: str, *values: Tensor) -> None:
    actual = operations.affine(images, matrix, FILL, interpolation)
    wanted = expected(images, oracle, *values)
    if interpolation == "nearest":
        assert_same(actual, wanted)
    else:
        # Truncated values that are whole but for the last bit of a float are one off.
        assert_close(actual, wanted, mean=0.1, worst=1)


@pytest.fixture(params=list(RESAMPLING))
def interpolation(request: pytest.FixtureRequest) -> str:
    return request.param


def test_affine_of_any_matrix(images, interpolation):
    generator = torch.Generator().manual_seed(7)
    matrix = torch.eye(2, 3) + 0.4 * torch.randn(len(images), 2, 3, generator=generator)
    matrix[:, :, 2] *= 8
    assert_geometry(images, matrix, pil_affine(interpolation), interpolation, *matrix.flatten(1).unbind(1))


@pytest.mark.parametrize(("low", "high"), [(-30, 30), (-180, 175), (-0.7, 0.9)])
def test_rotation(images, interpolation, low, high):
    angle = spread(low, high, images)

    def rotate(image, degrees):
        return auto_augment.rotate(image, degrees, resample=RESAMPLING[interpolation], fillcolor=FILL)

    matrix = operations.rotation(angle, *images.shape[-2:])
    assert_geometry(images, matrix, through_pil(rotate), interpolation, angle)


@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shear(images, interpolation, name):
    # No level for which a point lies on the very border: in or out is then up to the last bit of a float.
    level = spread(-0.31, 0.293, images)

    def shear(image, level):
        return getattr(auto_augment, name)(image, level, resample=RESAMPLING[interpolation], fillcolor=FILL)

    matrix = getattr(operations, name)(level)
    assert_geometry(images, matrix, through_pil(shear), interpolation, level)


def test_translation(images, interpolation):
    # In 1/100, for an exact 0: with nearly 0, truncation takes 1 from every falling edge.
    x = spread(-1440, 1440, images, whole=True) / 100
    y = spread(625, -900, images, whole=True).roll(1) / 100

    def translate(image, x, y):
        keywords = {"resample": RESAMPLING[interpolation], "fillcolor": FILL}
        if y == 0:
            return auto_augment.translate_x_abs(image, x, **keywords)
        return auto_augment.translate_y_abs(image, y, **keywords)

    zero = torch.zeros_like(x)
    for x_N, y_N in ((x, zero), (zero, y)):
        assert_geometry(images, operations.translation(x_N, y_N), through_pil(translate), interpolation, x_N, y_N)


@pytest.mark.parametrize(
    ("name", "high", "matrix_of"),
    [
        ("ShearX", 0.3, lambda m, size: operations.shear_x(m)),
        ("ShearY", 0.3, lambda m, size: operations.shear_y(m)),
        ("TranslateX", 14.5, lambda m, size: operations.translation(-m.trunc(), torch.zeros_like(m))),
        ("TranslateY", 14.5, lambda m, size: operations.translation(torch.zeros_like(m), -m.trunc())),
        ("Rotate", 30.0, lambda m, size: operations.rotation(m, *size)),
    ],
)
def test_autoaugment_geometry(images, name, high, matrix_of):
    # The magnitudes of AutoAugment and RandAugment: ten or 31 equal steps, with a sign.
    for bins in (10, 31):
        for start in range(0, bins, len(images)):
            steps = torch.arange(start, start + len(images)).clamp(max=bins - 1)
            magnitude = torch.linspace(0, high, bins)[steps]
            for signed in (magnitude, -magnitude):
                matrix = matrix_of(signed, images.shape[-2:])
                oracle = through_pil(lambda image, m: _apply_op(image, name, m, InterpolationMode.NEAREST, list(FILL)))
                assert_geometry(images, matrix, oracle, "nearest", signed)


def test_affine_keeps_a_flat_image(interpolation):
    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    angle = torch.linspace(-40, 40, 256)
    out = operations.affine(images, operations.rotation(angle, 8, 8), (0, 0, 0), interpolation)
    assert_same(out[:, :, 2:6, 2:6], images[:, :, 2:6, 2:6])


# ---- What holds for all of them

EVERY_OPERATION: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], list[Tensor]]]] = {
    "flip_horizontal": (operations.flip_horizontal, lambda i: [torch.arange(len(i)) % 2 == 0]),
    "shift_crop": (
        lambda i, top, left: operations.shift_crop(i, top, left, 4),
        lambda i: [spread(0, 8, i, whole=True), spread(8, 0, i, whole=True)],
    ),
    "resized_crop": (
        lambda i, *box: operations.resized_crop(i, *box, 20),
        lambda i: [spread(0, 4, i, whole=True)] * 2 + [spread(3, 20, i, whole=True)] * 2,
    ),
    "cutout": (
        lambda i, y, x: operations.cutout(i, y, x, 10),
        lambda i: [spread(0, 20, i, whole=True), spread(20, 0, i, whole=True)],
    ),
    "to_grayscale": (operations.to_grayscale, lambda i: []),
    "adjust_brightness": (operations.adjust_brightness, lambda i: [spread(0, 2, i)]),
    "adjust_contrast": (operations.adjust_contrast, lambda i: [spread(0, 2, i)]),
    "adjust_saturation": (operations.adjust_saturation, lambda i: [spread(0, 2, i)]),
    "adjust_hue": (operations.adjust_hue, lambda i: [spread(-0.5, 0.5, i)]),
    "invert": (operations.invert, lambda i: []),
    "posterize": (operations.posterize, lambda i: [spread(0, 8, i, whole=True)]),
    "solarize": (operations.solarize, lambda i: [spread(0, 256, i)]),
    "solarize_add": (operations.solarize_add, lambda i: [spread(0, 110, i, whole=True)]),
    "autocontrast": (operations.autocontrast, lambda i: []),
    "equalize": (operations.equalize, lambda i: []),
    "adjust_sharpness": (operations.adjust_sharpness, lambda i: [spread(0, 2, i)]),
    "gaussian_blur": (operations.gaussian_blur, lambda i: [spread(0.1, 2, i)]),
    **{
        f"affine {kind}": (
            lambda i, angle, kind=kind: operations.affine(i, operations.rotation(angle, *i.shape[-2:]), FILL, kind),
            lambda i: [spread(-30, 30, i)],
        )
        for kind in RESAMPLING
    },
}


@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_an_image_does_not_depend_on_the_rest_of_the_batch(name):
    images = make_images(24, 40)
    operation, parameters_of = EVERY_OPERATION[name]
    parameters = parameters_of(images)
    together = operation(images, *parameters)
    alone = [operation(images[n : n + 1], *(p[n : n + 1] for p in parameters)) for n in range(len(images))]
    assert_same(together, torch.cat(alone))


@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_inputs_are_not_changed_and_memory_format_does_not_matter(name):
    images = make_images(24, 40)
    operation, parameters_of = EVERY_OPERATION[name]
    parameters = parameters_of(images)
    before = [tensor.clone() for tensor in (images, *parameters)]
    out = operation(images, *parameters)
    # Written over, an output that shares the input's memory would show.
    again = operation(images.contiguous(memory_format=torch.channels_last), *parameters)
    assert_same(again, out)
    out.zero_()
    for tensor, copy in zip((images, *parameters), before, strict=True):
        assert torch.equal(tensor, copy)


def test_every_operation_is_listed():
    public = {name for name, value in vars(operations).items() if callable(value) and not name.startswith("_")}
    helpers = {
        "Sequence",
        "Literal",
        "Tensor",
        "Interpolation",
        "rotation",
        "shear_x",
        "shear_y",
        "translation",
    }
    assert public - helpers == {name.split()[0] for name in EVERY_OPERATION}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_the_gpu_gives_the_same_without_waiting(name):
    images = make_images(24, 40)
    operation, parameters_of = EVERY_OPERATION[name]
    parameters = parameters_of(images)
    on_gpu = [tensor.cuda() for tensor in (images, *parameters)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = operation(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(out.cpu(), operation(images, *parameters), mean=0.05, worst=1)


def test_rotation_matrix_is_the_inverse_map():
    matrix = operations.rotation(torch.tensor([90.0]), 32, 32)
    assert torch.allclose(matrix, torch.tensor([[[0.0, -1.0, 32.0], [1.0, 0.0, 0.0]]]), atol=1e-6)
    assert math.isclose(operations.shear_x(torch.tensor([0.25]))[0, 0, 1].item(), 0.25)
