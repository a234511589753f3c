"""Views: the policies' tables and random parameters against torchvision and timm, and what they depend on."""

import functools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_augment
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, v2

from equipoise.data.decode import decode_bytes
from equipoise.views import image_operations, policies, views
from equipoise.views.draws import uniforms
from equipoise.views.views import ViewSettings, evaluation_view, photo_views, small_views, view_kinds


def numbers(count: int, seed: int = 0) -> policies.Numbers:
    return policies.Numbers(uniforms(seed, 0, np.arange(count), 0, 64))


def pictures(count: int, side: int = 32) -> torch.Tensor:
    """Smooth coloured noise, uint8 [N, 3, side, side]."""
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    return (255 * torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")).to(torch.uint8)


ALL = [
    ViewSettings("digits", ("cls", "sim", "sim"), 16),
    ViewSettings("cifar", ("cls", "rand", "sim"), 32),
    ViewSettings("cifar", ("cls", "rand", "rand"), 32, blur=True),
]


def test_view_kinds():
    assert view_kinds("sim-sim", contrastive=True) == ("cls", "sim", "sim")
    assert view_kinds("sim-rand", contrastive=True) == ("cls", "rand", "sim")
    assert view_kinds("rand-rand", contrastive=True) == ("cls", "rand", "rand")
    assert view_kinds("rand-rand", contrastive=False) == ("cls",)


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: f"{settings.policy}-{settings.kinds[1]}")
def test_small_views_do_not_depend_on_the_batch(settings):
    images, indices = pictures(24, settings.size), np.arange(100, 124)
    together = small_views(images, settings, 1, 2, indices)
    assert together.shape == (3, 24, 3, settings.size, settings.size)
    assert together.dtype == torch.uint8
    alone = torch.cat([small_views(images[i : i + 1], settings, 1, 2, indices[i : i + 1]) for i in range(24)], dim=1)
    if settings.policy == "digits":  # in torch, where sums may differ in their last bit
        assert (together.int() - alone.int()).abs().max() <= 1
        assert (together == alone).float().mean() > 0.999
    else:
        assert torch.equal(together, alone)
    assert not torch.equal(together, small_views(images, settings, 1, 3, indices)), "another epoch"
    assert not torch.equal(together[1], together[2]), "two views of one kind"


def test_photo_views_do_not_depend_on_the_batch():
    generator = np.random.default_rng(0)
    photos = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in [(50, 70), (200, 40), (33, 33)]]
    settings = ViewSettings("photos", ("cls", "sim", "rand"), 24)
    together = photo_views(photos, settings, 0, 0, np.array([5, 6, 7]))
    assert together.shape == (3, 3, 3, 24, 24)
    for position, photo in enumerate(photos):
        alone = photo_views([photo], settings, 0, 0, np.array([5 + position]))[:, 0]
        assert torch.equal(together[:, position], alone)


def test_digits_are_never_flipped():
    """A picture dark on the left stays dark on the left in every view."""
    images = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    images[..., 8:] = 255
    made = small_views(images, ViewSettings("digits", ("cls", "sim", "sim"), 16), 0, 0, np.arange(200)).float()
    assert bool((made[..., 8:].mean((2, 3, 4)) > made[..., :8].mean((2, 3, 4))).all())


def test_half_of_the_photographs_and_cifar_views_are_flipped():
    images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    images[..., 16:] = 255
    photo = images[0].permute(1, 2, 0).numpy()
    for kind in ("cls", "sim"):
        made = [
            small_views(images, ViewSettings("cifar", (kind,), 32), 0, 0, np.arange(2000)),
            photo_views([photo] * 2000, ViewSettings("photos", (kind,), 32, randaug=False), 0, 0, np.arange(2000)),
        ]
        for (view,) in made[kind == "cls" :]:  # AutoAugment turns and inverts
            left, right = view[..., :16].float().mean((1, 2, 3)), view[..., 16:].float().mean((1, 2, 3))
            flipped = (left > right)[left != right].float()  # a crop of one colour does not tell
            assert len(flipped) > 1500
            assert abs(flipped.mean() - 0.5) < 5 * np.sqrt(0.25 / len(flipped))


def test_photographs_are_not_changed():
    """Of the size of the view, a crop may be the photograph itself."""
    photo = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    before = photo.copy()
    made = photo_views([photo] * 400, ViewSettings("photos", ("cls", "rand"), 24, blur=True), 0, 0, np.arange(400))
    assert len(made.flatten(2).unique(dim=1)[0]) > 1
    assert (photo == before).all()
    assert (image_operations.resized_crop(photo, [0, 0, 24, 24], 24) == photo).all()


def mean_and_spread(images: torch.Tensor) -> np.ndarray:
    """Two numbers of each image that every operation moves."""
    pixels = images.float()
    return np.stack([pixels.mean((1, 2, 3)).numpy(), pixels.std((2, 3)).mean(1).numpy()])


@pytest.mark.parametrize("name", ["auto", "rand-n2-m10", "rand-n3-m7", "rand-n4-m9", "jitter"])
def test_policies_change_pixels_as_the_reference_does(name):
    """One picture, 3,000 draws: mean and spread of the results have the reference's distribution."""
    count = 3000
    picture = pictures(1)
    batch = picture.expand(count, -1, -1, -1).contiguous()
    image = v2.functional.to_pil_image(picture[0])
    torch.manual_seed(1)
    if name == "auto":
        turns = policies.auto_augment(numbers(count), 32)
        reference = AutoAugment(AutoAugmentPolicy.CIFAR10)
    elif name.startswith("rand"):
        operations, magnitude = (int(part[1:]) for part in name.split("-")[1:])
        turns = policies.rand_augment(numbers(count), 32, (0.485, 0.456, 0.406), operations, magnitude)
        np.random.seed(1)
        reference = timm_augment.rand_augment_transform(f"{name}-mstd0.5", {"img_mean": (124, 116, 104)})
    else:
        turns = policies.jitter(numbers(count), 0.4, 0.4, 0.4, 0.1, probability=0.8)
        reference = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    ours = functools.reduce(views.turned, turns, batch)
    theirs = torch.stack([v2.functional.pil_to_tensor(reference(image)) for _ in range(count)])
    for what, mine, expected in zip(("mean", "spread"), mean_and_spread(ours), mean_and_spread(theirs), strict=True):
        # Rounded: untouched pictures, a lump of equal values, would else differ in the last bit of a float.
        assert stats.ks_2samp(mine.round(0), expected.round(0)).pvalue > 1e-4, what
    unchanged = [float((made == picture).flatten(1).all(1).float().mean()) for made in (ours, theirs)]
    assert abs(unchanged[0] - unchanged[1]) < 5 * np.sqrt(2 * 0.25 / count)


@pytest.mark.parametrize("side", [224, 64, 33])
@pytest.mark.parametrize("size", [(300, 400), (500, 333), (224, 224), (97, 1000), (31, 30), (1, 7)])
def test_evaluation_view_is_torchvisions(size, side):
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    reference = v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])(Image.fromarray(photo))
    assert (evaluation_view(photo, side) == np.asarray(reference)).all()


# ---- photographs, at the size they are trained at


def photographs(shared_data, count: int) -> list[np.ndarray]:
    files = sorted((shared_data / "photos").glob("*.JPEG"))
    return [decode_bytes(file.read_bytes()) for file in files[:: len(files) // count][:count]]


def mean_difference(ours: np.ndarray, reference: Image.Image) -> float:
    """Mean over pixels and channels of the absolute difference, in steps of 1/255."""
    return float(np.abs(ours.astype(float) - np.asarray(reference)).mean())


def difference_of_crops(photo: np.ndarray, size: int, boxes: int) -> float:
    """The largest mean difference of a resized crop to torchvision's of a PIL image, over random boxes."""
    height, width = photo.shape[:2]
    drawn = policies.random_boxes(numbers(boxes, seed=height), np.full(boxes, height), np.full(boxes, width), 0.08)
    image = Image.fromarray(photo)
    return max(
        mean_difference(
            image_operations.resized_crop(photo, box, size),
            v2.functional.resized_crop(image, *box, [size, size], antialias=True),
        )
        for box in np.stack(drawn, axis=1).tolist()
    )


@pytest.mark.parametrize("size", [24, 96, 224])
@pytest.mark.parametrize("shape", [(200, 300), (700, 90), (17, 400)])
def test_resized_crops_are_torchvisions(shape, size):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert difference_of_crops(noise, size, boxes=8) < 0.5


def test_resized_crops_of_photographs_are_torchvisions(shared_data):
    assert max(difference_of_crops(photo, 224, boxes=6) for photo in photographs(shared_data, 16)) < 0.5


def test_decoding_is_pillows(shared_data):
    files = sorted((shared_data / "photos").glob("*.JPEG"))[::10]
    for file in files:
        assert (decode_bytes(file.read_bytes()) == np.asarray(Image.open(file).convert("RGB"))).all()


JITTERED = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
FILL = {"img_mean": (124, 116, 104)}
POLICIES = {
    ("cifar", "cls"): [v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), AutoAugment(AutoAugmentPolicy.CIFAR10)],
    ("cifar", "sim"): [
        v2.RandomResizedCrop(32, (0.2, 1)), v2.RandomHorizontalFlip(), JITTERED, v2.RandomGrayscale(0.2),
    ],
    ("photos", "cls"): [
        v2.RandomResizedCrop(32, (0.08, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4),
        timm_augment.rand_augment_transform("rand-m10-n2-mstd0.5", FILL),
    ],
    ("photos", "cls without RandAugment"): [
        v2.RandomResizedCrop(32, (0.08, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4),
    ],
    ("photos", "rand"): [
        v2.RandomResizedCrop(32, (0.08, 1)), v2.RandomHorizontalFlip(), JITTERED, v2.RandomGrayscale(0.2),
        timm_augment.rand_augment_transform("rand-m10-n2-mstd0.5", FILL),
    ],
    ("photos", "rand of n 3, m 7"): [
        v2.RandomResizedCrop(32, (0.08, 1)), v2.RandomHorizontalFlip(), JITTERED, v2.RandomGrayscale(0.2),
        timm_augment.rand_augment_transform("rand-m7-n3-mstd0.5", FILL),
    ],
    ("photos", "sim with blur"): [
        v2.RandomResizedCrop(32, (0.08, 1)), v2.RandomHorizontalFlip(), JITTERED, v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
    ],
    ("photos", "sim"): [
        v2.RandomResizedCrop(32, (0.08, 1)), v2.RandomHorizontalFlip(), JITTERED, v2.RandomGrayscale(0.2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: f"{settings.policy}-{settings.kinds[1]}")
def test_one_by_one_or_in_batches_makes_one_view(settings):
    """The same decisions, by OpenCV or by torch: a level apart, more where a histogram is flattened afterwards."""
    images, indices = pictures(48, settings.size), np.arange(48)
    one_by_one, batch = small_views(images, settings, 3, 4, indices), views.batch_views(images, settings, 3, 4, indices)
    difference = (one_by_one.float() - batch.float()).abs().mean((2, 3, 4))
    assert difference.median() < 1
    assert difference.quantile(0.9) < 2.5


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "geometry"])
@pytest.mark.parametrize(("policy", "kind"), POLICIES)
def test_views_have_the_references_distribution(policy, kind, whole, monkeypatch):
    """A gradient from black to red and across to blue: its spread tells how large a piece was cropped."""
    count = 1500
    ramp = np.linspace(0, 255, 32)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, ::-1] / 2 + 60, 255 - ramp[None]), -1)
    picture = picture.astype(np.uint8)
    monkeypatch.setattr(views, "_cutout", lambda view, _: view)  # a square of zeros would drown the rest
    monkeypatch.setattr(views, "_cut_out", lambda *_: None)
    if not whole:
        monkeypatch.setattr(views, "_turns", lambda *_: [])
    options = {
        "cls without RandAugment": {"randaug": False},
        "rand of n 3, m 7": {"randaug_n": 3, "randaug_m": 7.0},
        "sim with blur": {"blur": True},
    }
    settings = ViewSettings(policy, (kind.split()[0],), 32, **options.get(kind, {}))
    if policy == "photos":
        made = [photo_views([picture] * count, settings, 0, 0, np.arange(count))[0]]
    else:
        batch = torch.from_numpy(picture).permute(2, 0, 1).expand(count, -1, -1, -1).contiguous()
        made = [by(batch, settings, 0, 0, np.arange(count))[0] for by in (small_views, views.batch_views)]
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    reference = v2.Compose(POLICIES[policy, kind][: None if whole else 2])
    theirs = torch.stack([v2.functional.pil_to_tensor(reference(Image.fromarray(picture))) for _ in range(count)])
    for ours in made:
        both = zip(("mean", "spread"), mean_and_spread(ours), mean_and_spread(theirs), strict=True)
        for what, mine, expected in both:
            assert stats.ks_2samp(mine.round(0), expected.round(0)).pvalue > 1e-4, what
