"""Views: the policies' tables and random parameters against torchvision and timm, and what they depend on."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_augment
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandomResizedCrop, v2

from equipoise import load_recipe
from equipoise.data.decode import decode_bytes
from equipoise.views import operations, views
from equipoise.views.draws import Numbers
from equipoise.views.views import ViewSettings, evaluation_view, photo_views, small_views, view_settings


def pictures(count: int, side: int = 32) -> np.ndarray:
    """Smooth coloured noise, uint8 [N, side, side, 3]."""
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    smooth = 255 * torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


ALL = [
    ViewSettings("digits", size=16, kinds=("cls", "sim", "sim")),
    ViewSettings("cifar", size=32, kinds=("cls", "rand", "sim")),
    ViewSettings("cifar", size=32, kinds=("cls", "rand", "rand"), blur=True),
]


def test_view_settings_are_the_recipes():
    fields = {"size": 64, "blur": True, "randaug": False, "randaug_n": 3, "randaug_m": 7.0}
    wanted = {"sim-sim": ("sim", "sim"), "sim-rand": ("rand", "sim"), "rand-rand": ("rand", "rand")}
    for cl_views, kinds in wanted.items():
        recipe = load_recipe("imagenet-lt", cl_views=cl_views, **fields)
        settings = view_settings(recipe)
        assert settings == ViewSettings("photos", cl_views=cl_views, kinds=("cls", *kinds), **fields)
        assert view_settings(replace(recipe, method="ce")) == replace(settings, kinds=("cls",))


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: f"{settings.policy}-{settings.kinds[1]}")
def test_small_views_do_not_depend_on_the_batch(settings):
    images, indices = pictures(24, settings.size), np.arange(100, 124)
    before = images.copy()
    together = small_views(images, settings, 1, 2, indices)
    assert together.shape == (3, 24, 3, settings.size, settings.size)
    assert together.dtype == torch.uint8
    alone = torch.cat([small_views(images[i : i + 1], settings, 1, 2, indices[i : i + 1]) for i in range(24)], dim=1)
    assert torch.equal(together, alone)
    assert not torch.equal(together, small_views(images, settings, 1, 3, indices)), "another epoch"
    assert not torch.equal(together[1], together[2]), "two views of one kind"
    assert (images == before).all(), "never in place"


def test_photo_views_do_not_depend_on_the_batch_nor_change_the_photographs():
    """Of the size of the view, a crop may be the photograph itself."""
    generator = np.random.default_rng(0)
    sizes = [(50, 70), (200, 40), *[(24, 24)] * 60]
    photos = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    before = [photo.copy() for photo in photos]
    settings = ViewSettings("photos", size=24, kinds=("cls", "sim", "rand"), blur=True)
    together = photo_views(photos, settings, 0, 0, np.arange(len(photos)))
    assert together.shape == (3, len(photos), 3, 24, 24)
    for place, photo in enumerate(photos):
        alone = photo_views([photo], settings, 0, 0, np.array([place]))[:, 0]
        assert torch.equal(together[:, place], alone)
        assert (photo == before[place]).all()


@pytest.mark.parametrize("kind", ["cls", "sim"])
def test_digits_are_moved_a_little_and_never_flipped(kind):
    """A blot right of the middle and above it stays there, at its distance, on a black ground; no two are the same."""
    images = np.zeros((500, 16, 16, 3), np.uint8)
    images[:, 2:6, 10:14] = 255
    made = small_views(images, ViewSettings("digits", size=16, kinds=(kind,)), 0, 0, np.arange(500))[0].float()
    mass = made.sum((1, 2, 3))
    x, y = ((made * place).sum((1, 2, 3)) / mass for place in (torch.arange(16.0), torch.arange(16.0)[:, None]))
    assert x.min() > 7.5
    assert y.max() < 7.5
    # Shifts of 0.08 of 16 pixels, and those of a turn about the middle; half as much again for the contrastive views.
    for place, middle in ((x, 11.5), (y, 3.5)):
        assert abs(place.mean() - middle) < 0.4  # a blot at the border loses its outer part
        assert 0.8 < place.std() / (1.0 if kind == "cls" else 1.5) < 1.2
    assert len(made.unique(dim=0)) == 500
    assert made.flatten(1).amin() == 0
    assert (made[:, 0] == made[:, 1]).all(), "no colour"
    brightest = made.flatten(1).amax(1)
    assert ((brightest < 255).float().mean() > 0.2) == (kind == "sim"), "jitter is the contrastive views'"


def test_cifar_images_are_shifted_by_up_to_four_pixels_and_cut_out(monkeypatch):
    """Of each 'cls' view without AutoAugment: one of 81 windows of the padded image, mirrored or not, less a square."""
    monkeypatch.setattr(views, "_pixel_operations", lambda *_: [])
    images = pictures(120) // 2 + 60  # nothing is black
    made = small_views(images, ViewSettings("cifar", size=32), 0, 0, np.arange(120))[0].permute(0, 2, 3, 1).numpy()
    found = []
    for image, view in zip(images, made, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        windows = {
            (top, left, flip): padded[top : top + 32, left : left + 32][:, :: -1 if flip else 1]
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        }
        (place,) = [place for place, window in windows.items() if (window == view)[view.any(2)].all()]
        rows, columns = np.nonzero(windows[place].any(2) & ~view.any(2))
        found.append((*place, np.ptp(rows) + 1 if len(rows) else 0, np.ptp(columns) + 1 if len(columns) else 0))
    tops, lefts, flips, heights, widths = np.array(found).T
    assert set(tops) == set(lefts) == set(range(9))
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(120)
    assert heights.max() == widths.max() == 16
    assert (heights * widths == 256).mean() > 0.2, "centres are anywhere, and squares end at the border"


@pytest.mark.parametrize(("policy", "kind"), [("cifar", "sim"), ("photos", "cls"), ("photos", "sim")])
def test_half_of_the_views_are_flipped(policy, kind):
    images = np.zeros((2000, 32, 32, 3), np.uint8)
    images[:, :, 16:] = 255
    make = small_views if policy == "cifar" else photo_views
    view = make(images, ViewSettings(policy, size=32, kinds=(kind,), randaug=False), 0, 0, np.arange(2000))[0]
    left, right = view[..., :16].float().mean((1, 2, 3)), view[..., 16:].float().mean((1, 2, 3))
    flipped = (left > right)[left != right].float()  # a crop of one colour does not tell
    assert len(flipped) > 1500
    assert abs(flipped.mean() - 0.5) < 5 * np.sqrt(0.25 / len(flipped))


# ---- policies


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 400), (500, 60)])
def test_boxes_are_those_of_random_resized_crop(height, width):
    """Every coordinate of 2,000 boxes has torchvision's distribution (Kolmogorov-Smirnov)."""
    count = 2000
    numbers = Numbers(0, 0, np.arange(count), 0)
    ours = views.random_boxes(numbers, np.full(count, height), np.full(count, width), 0.2).T
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]).T
    for name, mine, reference in zip(("top", "left", "height", "width"), ours, theirs, strict=True):
        assert stats.ks_2samp(mine, reference).pvalue > 1e-4, name
    top, left, box_height, box_width = ours
    assert min(top.min(), left.min()) >= 0
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


def test_auto_augment_is_torchvisions_policy():
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)
    names, probabilities, levels = views.cifar_policies()
    assert (names.shape, names[4].tolist()) == ((25, 2), ["AutoContrast", "Equalize"])
    assert (probabilities[3].tolist(), (9 * levels[3]).tolist()) == ([0.5, 0.7], [8, 9])
    bins = np.arange(10) / 9
    for name, (magnitudes, signed) in theirs._augmentation_space(10, (32, 32)).items():
        for sign in (1.0, -1.0) if signed else (1.0,):
            ours = views.auto_augment_arguments(bins, sign * bins, 32).get(name, 0 * bins)
            expected = magnitudes.expand(10).numpy() * sign
            if name in ("Brightness", "Color", "Contrast", "Sharpness"):
                expected = 1 + expected
            if name.startswith("Translate"):
                expected = -np.trunc(expected)  # _apply_op's int()
            assert ours == pytest.approx(expected, abs=1e-4), name


def mean_and_spread(images: torch.Tensor) -> np.ndarray:
    """Two numbers of each image that every operation moves."""
    pixels = images.float()
    return np.stack([pixels.mean((1, 2, 3)).numpy(), pixels.std((2, 3)).mean(1).numpy()])


@pytest.mark.parametrize("side", [224, 64, 33])
@pytest.mark.parametrize("size", [(300, 400), (500, 333), (224, 224), (97, 1000), (31, 30), (1, 7)])
def test_evaluation_view_is_torchvisions(size, side):
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    reference = v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])(Image.fromarray(photo))
    assert (evaluation_view(photo, side) == np.asarray(reference)).all()


# ---- photographs, at the size they are trained at


def difference_of_crops(photo: np.ndarray, size: int, boxes: int) -> float:
    """The largest mean difference of a resized crop to torchvision's of a PIL image, over random boxes."""
    height, width = photo.shape[:2]
    numbers = Numbers(height, 0, np.arange(boxes), 0)
    drawn = views.random_boxes(numbers, np.full(boxes, height), np.full(boxes, width), 0.08)
    theirs = [v2.functional.resized_crop(Image.fromarray(photo), *box, [size, size], antialias=True) for box in drawn]
    ours = [operations.resized_crop(photo, box, size) for box in drawn.tolist()]
    return np.abs(np.stack(ours).astype(float) - np.stack(theirs)).mean((1, 2, 3)).max()


@pytest.mark.parametrize("size", [24, 96, 224])
@pytest.mark.parametrize("shape", [(200, 300), (700, 90), (17, 400)])
def test_resized_crops_are_torchvisions(shape, size):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert difference_of_crops(noise, size, boxes=8) < 0.5


def test_resized_crops_of_photographs_are_torchvisions(shared_data):
    for file in sorted((shared_data / "photos").glob("*.JPEG"))[::10]:
        assert difference_of_crops(decode_bytes(file.read_bytes()), 224, boxes=6) < 0.5


CROP, FLIP = v2.RandomResizedCrop(32, (0.08, 1)), v2.RandomHorizontalFlip()
SIM = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2)]
BLUR = v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5)
JITTER = v2.ColorJitter(0.4, 0.4, 0.4)
RAND_AUGMENT, WEAKER = (
    timm_augment.rand_augment_transform(f"rand-{kind}-mstd0.5", {"img_mean": (124, 116, 104)})
    for kind in ("m10-n2", "m7-n3")
)
# Policy and kind of view: further settings, and the reference.
POLICIES = {
    "cifar-cls": ({}, [v2.RandomCrop(32, 4), FLIP, AutoAugment(AutoAugmentPolicy.CIFAR10)]),
    "cifar-sim": ({}, [v2.RandomResizedCrop(32, (0.2, 1)), FLIP, *SIM]),
    "photos-cls": ({}, [CROP, FLIP, JITTER, RAND_AUGMENT]),
    "photos-cls-plain": ({"randaug": False}, [CROP, FLIP, JITTER]),
    "photos-rand": ({}, [CROP, FLIP, *SIM, RAND_AUGMENT]),
    "photos-rand-weaker": ({"randaug_n": 3, "randaug_m": 7.0}, [CROP, FLIP, *SIM, WEAKER]),
    "photos-sim": ({}, [CROP, FLIP, *SIM]),
    "photos-sim-blur": ({"blur": True}, [CROP, FLIP, *SIM, BLUR]),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "geometry"])
@pytest.mark.parametrize("name", POLICIES)
def test_views_have_the_references_distribution(name, whole, monkeypatch):
    """A gradient from black to red and across to blue: its spread tells how large a piece was cropped."""
    count = 1500
    ramp = np.linspace(0, 255, 32)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, ::-1] / 2 + 60, 255 - ramp[None]), -1)
    picture = picture.astype(np.uint8)
    monkeypatch.setattr(views, "_cut_out", lambda view, _: view)  # a square of zeros would drown the rest
    if not whole:
        monkeypatch.setattr(views, "_pixel_operations", lambda *_: [])
    (policy, kind), (options, steps) = name.split("-")[:2], POLICIES[name]
    settings = ViewSettings(policy, size=32, kinds=(kind,), **options)
    make = photo_views if policy == "photos" else small_views
    ours = make(np.stack([picture] * count), settings, 0, 0, np.arange(count))[0]
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    reference = v2.Compose(steps[: None if whole else 2])
    theirs = torch.stack([v2.functional.pil_to_tensor(reference(Image.fromarray(picture))) for _ in range(count)])
    for what, mine, expected in zip(("mean", "spread"), mean_and_spread(ours), mean_and_spread(theirs), strict=True):
        # Rounded: equal views would else differ in the last bit of a float.
        assert stats.ks_2samp(mine.round(0), expected.round(0)).pvalue > 1e-4, what
