"""Batches: order, short ends, and that workers and batches change no number."""

import pytest
import torch
from conftest import draw_folder

from equipoise import UserError
from equipoise.loader import Photographs, SmallImages, open_batches, steps_per_epoch, worker_count
from equipoise.pixels import decode
from equipoise.sources import find_parts
from equipoise.views import ViewSettings, evaluation_view

CPU = torch.device("cpu")
PHOTOS = ViewSettings("photos", ("cls", "sim", "rand"), 24)
SMALL = ViewSettings("cifar", ("cls", "sim", "sim"), 32)


@pytest.fixture
def images(pictures):
    return find_parts(str(pictures)).parts["train"]


def epoch(batches, number=0, batch_size=8):
    return list(batches.training(seed=7, epoch=number, batch_size=batch_size))


def test_steps_leave_out_a_single_last_image():
    assert [steps_per_epoch(n, 4) for n in (4, 5, 6, 8, 9)] == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("settings", [PHOTOS, SMALL], ids=["photos", "small"])
def test_an_epoch_holds_every_image_once(images, settings):
    batches = epoch(open_batches(images, settings, CPU, workers=0))
    assert [batch.images_VB3SS.shape[:2] for batch in batches] == [(3, 8), (3, 8), (3, 5)]
    labels = torch.cat([batch.labels_B for batch in batches])
    assert torch.bincount(labels).tolist() == [12, 6, 3]


@pytest.mark.parametrize("settings", [PHOTOS, SMALL], ids=["photos", "small"])
def test_epochs_differ_and_repeat(images, settings):
    batches = open_batches(images, settings, CPU, workers=0)
    first, second, again = epoch(batches, 0), epoch(batches, 1), epoch(batches, 0)
    assert torch.equal(first[0].images_VB3SS, again[0].images_VB3SS)
    assert not torch.equal(first[0].images_VB3SS, second[0].images_VB3SS)
    assert [batch.labels_B.tolist() for batch in first] != [batch.labels_B.tolist() for batch in second]


@pytest.mark.slow
def test_workers_change_no_number(images):
    none, two = (Photographs(images, PHOTOS, CPU, workers) for workers in (0, 2))
    for number in (0, 1):
        for ours, theirs in zip(epoch(none, number), epoch(two, number), strict=True):
            assert torch.equal(ours.images_VB3SS, theirs.images_VB3SS)
            assert torch.equal(ours.labels_B, theirs.labels_B)
    for ours, theirs in zip(none.evaluation(8), two.evaluation(8), strict=True):
        assert torch.equal(ours.images_VB3SS, theirs.images_VB3SS)


def test_batch_size_changes_no_view(images):
    """Image by image, the same pixels whatever the batches: matched by their order in the epoch."""
    batches = SmallImages(images, SMALL, CPU)
    large, small = (torch.cat([batch.images_VB3SS for batch in epoch(batches, 0, size)], dim=1) for size in (7, 3))
    assert (large.int() - small.int()).abs().max() <= 1


def test_evaluation_is_in_order_and_whole(images):
    batches = list(Photographs(images, PHOTOS, CPU, workers=0).evaluation(8))
    assert torch.cat([batch.labels_B for batch in batches]).tolist() == images.labels_N.tolist()
    view = batches[1].images_VB3SS[0, 2].permute(1, 2, 0).numpy()
    assert (view == evaluation_view(decode(images, 10), 24)).all()


def test_small_images_are_checked_at_once(images, pictures):
    (pictures / "bee" / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"bee/3.png cannot be read"):
        open_batches(images, SMALL, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_photograph_is_named_wherever_it_is_read(workers, tmp_path):
    images = find_parts(str(draw_folder(tmp_path, {"ant": 5, "bee": 5}))).parts["train"]
    (tmp_path / "bee" / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError) as error:
        epoch(open_batches(images, PHOTOS, CPU, workers))
    assert str(error.value) == (
        f"{tmp_path}/bee/3.png cannot be read (it is no image: not JPEG, PNG, GIF, BMP, TIFF, WebP or PPM); repair or "
        "remove it, or pass over such images with --on-bad-image skip"
    )


def test_worker_count():
    assert worker_count(3) == 3
    assert worker_count(-1) >= 1
