"""Operations against Pillow, timm and torchvision."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment as timm_augment
from torchvision.transforms.v2 import functional as tv

from equipoise.data.decode import decode_bytes
from equipoise.views import operations, views

FILL = (124, 116, 104)
OF_PILLOW = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
IN_TIMM = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}


def drawn(side: int) -> list[np.ndarray]:
    """A smooth picture with some noise, one of low contrast, one of constant colour."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.BICUBIC)).astype(int)
    noisy = (smooth + generator.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    return [noisy, noisy // 8 + 100, np.full_like(noisy, (200, 17, 90))]


@pytest.fixture(params=["drawn", "photographs"])
def images(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """At sizes of training; photographs where they are available."""
    if request.param == "drawn":
        return drawn(224) + drawn(32)
    files = sorted((request.getfixturevalue("shared_data") / "photos").glob("*.JPEG"))
    photos = [Image.fromarray(decode_bytes(file.read_bytes())) for file in files[:: len(files) // 4][:4]]
    return [np.asarray(photo.resize((224, 224), Image.BILINEAR)) for photo in photos]


def difference(ours: np.ndarray, reference: Image.Image | np.ndarray) -> float:
    """Mean over pixels and channels of the absolute difference, in steps of 1/255."""
    assert ours.dtype == np.uint8
    return float(np.abs(ours.astype(float) - np.asarray(reference)).mean())


def of_rand_augment(name: str, side: int):
    """The arguments, ours and timm's, at three magnitudes and both signs, bilinear and bicubic."""
    assert [IN_TIMM.get(ours, ours) for ours in views.RAND_AUGMENT] == timm_augment._RAND_TRANSFORMS
    signed = name in MOVES
    to_argument = timm_augment.LEVEL_TO_ARG[IN_TIMM.get(name, name)]
    for level, sign in itertools.product((2.6, 6.6, 10.0), (1.0, -1.0) if signed else (1.0,)):
        # Below 2.5 Posterize keeps no bit, which Pillow refuses.
        ours = views.rand_augment_arguments(np.array([level / 10]), np.array([sign * level / 10]), side)
        theirs = to_argument(level, {}) if to_argument else ()
        theirs = (sign * abs(theirs[0]),) if signed else theirs
        assert (name in ours) == bool(theirs)
        if theirs:
            assert ours[name][0] == pytest.approx(theirs[0] * (side if name.startswith("Translate") else 1))
        for resampling in ("bilinear", "bicubic") if signed else ("bilinear",):
            yield float(ours[name][0]) if name in ours else 0.0, theirs, resampling


def done(name: str, image: np.ndarray, argument: float, resampling: str = "nearest") -> np.ndarray:
    before = image.copy()
    made = operations.operation(name, resampling, FILL)(image[None], np.array([argument]))
    assert (image == before).all(), "never in place"
    return made[0]


@pytest.mark.parametrize("name", views.RAND_AUGMENT)
def test_rand_augment_is_timms(name, images):
    reference = timm_augment.NAME_TO_OP[IN_TIMM.get(name, name)]
    for image in images:
        for argument, theirs, resampling in of_rand_augment(name, len(image)):
            ours = done(name, image, argument, resampling)
            options = {"fillcolor": FILL, "resample": OF_PILLOW[resampling]}
            limit = 2 if len(image) > 32 else 4  # at the border, the fill colour is blended in
            expected = reference(Image.fromarray(image), *theirs, **options)
            assert difference(ours, expected) < limit, (argument, resampling)


def exact_hue(image: Image.Image, shift: float) -> np.ndarray:
    """Of a tensor: of an image it is in 8 bits, and the shift is truncated."""
    return tv.adjust_hue(tv.pil_to_tensor(image), shift).permute(1, 2, 0).numpy()


JITTER = {
    "Brightness": (tv.adjust_brightness, (0.6, 1.0, 1.4)),
    "Contrast": (tv.adjust_contrast, (0.6, 1.0, 1.4)),
    "Color": (tv.adjust_saturation, (0.6, 1.0, 1.4)),
    "Hue": (exact_hue, (-0.1, 0.0, 0.03, 0.1, 0.5)),
    "Grayscale": (lambda image, _: tv.rgb_to_grayscale(image, 3), (0.0,)),
    "Blur": (lambda image, sigma: tv.gaussian_blur(image, [17, 17], [sigma, sigma]), (0.1, 0.7, 2.0)),
}


@pytest.mark.parametrize("name", JITTER)
def test_jitter_is_torchvisions(name, images):
    reference, arguments = JITTER[name]
    for image in images:
        for argument in arguments:
            # One of 256 hues more or less is a difference of 6 where colours are pure.
            limit = 2 if name == "Hue" else 1
            expected = reference(Image.fromarray(image), argument)
            assert difference(done(name, image, argument), expected) < limit, argument


@pytest.mark.parametrize("resampling", OF_PILLOW)
def test_affine_is_pillows(resampling):
    """Of any matrix, away from the border, where the fill colour is blended in."""
    size, generator = (40, 40), np.random.default_rng(7)
    images = np.stack(drawn(40) * 4)
    matrices = np.eye(2, 3) + 0.3 * generator.standard_normal((len(images), 2, 3))
    matrices[:, :, 2] *= 8
    everywhere = {"resample": OF_PILLOW[resampling], "fillcolor": FILL}
    made = operations.affine(images, matrices, FILL, resampling)
    for image, matrix, ours in zip(images, matrices, made, strict=True):
        theirs = np.asarray(Image.fromarray(image).transform(size, Image.AFFINE, matrix.flatten(), **everywhere))
        points = (np.stack(np.meshgrid(np.arange(40), np.arange(40))) + 0.5).reshape(2, -1)
        x, y = (matrix[:, :2] @ points + matrix[:, 2:]).reshape(2, 40, 40)
        inside = (np.minimum(x, y) > 2.5) & (np.maximum(x, y) < 37.5)
        outside = (np.minimum(x, y) < -2.5) | (np.maximum(x, y) > 42.5)
        assert np.abs(ours[inside].astype(int) - theirs[inside]).mean() < 2
        assert (ours[outside] == FILL).all()


@pytest.mark.parametrize("resampling", OF_PILLOW)
@pytest.mark.parametrize("name", [*operations.OF_COLOUR, *operations.MATRICES])
def test_an_image_of_a_stack_becomes_what_it_becomes_alone(name, resampling):
    """Each by its own argument; also one whose rows do not fill a vector of the processor."""
    ranges = {"Posterize": (0, 8), "Solarize": (0, 256), "SolarizeAdd": (0, 110), "Rotate": (-30, 30)}
    least, most = ranges.get(name, (0.1, 1.9))
    for side in (32, 19):
        stack = np.stack(drawn(side) + [image[::-1] for image in drawn(side)])
        arguments = np.linspace(least, most, len(stack))
        alone = [done(name, image, argument, resampling) for image, argument in zip(stack, arguments, strict=True)]
        assert (operations.operation(name, resampling, FILL)(stack, arguments) == np.stack(alone)).all()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_of_noise_is_torchvisions(sigma):
    """Noise shows the width of the kernel: its tails are worth a level where pictures are smooth."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = tv.gaussian_blur(torch.from_numpy(noise).permute(2, 0, 1), [17, 17], [sigma, sigma]).permute(1, 2, 0)
    assert np.abs(done("Blur", noise, sigma).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translations_by_whole_pixels_are_pillows_to_the_last_bit(name):
    """As AutoAugment has them."""
    for side in (33, 5):
        image = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
        for pixels in (0, 3, -3, side - 1, 1 - side, side + 3, -side - 4):
            matrix = (1, 0, pixels, 0, 1, 0) if name == "TranslateX" else (1, 0, 0, 0, 1, pixels)
            pillow = Image.fromarray(image).transform((side, side), Image.AFFINE, matrix, fillcolor=FILL)
            assert (done(name, image, pixels) == np.asarray(pillow)).all()


@pytest.mark.parametrize("shape", [(32, 32), (5, 3), (1, 1), (224, 224)])
def test_tables_are_pillows_to_the_last_bit(shape):
    generator = np.random.default_rng(1)
    for levels in (256, 40, 2, 1):
        image = generator.integers(0, levels, (*shape, 3), dtype=np.uint8)
        pillow = Image.fromarray(image)
        assert (done("Equalize", image, 0) == np.asarray(ImageOps.equalize(pillow))).all()
        assert (done("Solarize", image, 99) == np.asarray(ImageOps.solarize(pillow, 99))).all()
        assert (done("Posterize", image, 3) == np.asarray(ImageOps.posterize(pillow, 3))).all()
        assert (done("Invert", image, 0) == np.asarray(ImageOps.invert(pillow))).all()
