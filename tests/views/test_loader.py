"""Batches: order, short ends, and that workers and batches change no number."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draw_folder

from equipoise import UserError
from equipoise.base.world import World
from equipoise.data.decode import decode
from equipoise.data.sources import find_parts
from equipoise.views.draws import mixing, second_draws
from equipoise.views.loader import open_batches, steps_per_epoch, worker_count
from equipoise.views.views import ViewSettings, evaluation_view, photo_views, small_views

CPU = torch.device("cpu")
PHOTOS = ViewSettings("photos", size=24, kinds=("cls", "sim", "rand"))
SMALL = ViewSettings("cifar", size=32, kinds=("cls", "sim", "sim"))
both_kinds = pytest.mark.parametrize("settings", [PHOTOS, SMALL], ids=["photos", "small"])


@pytest.fixture(params=["threads", "processes"])
def kind(request, monkeypatch):
    """Each kind of workers, on a CPU."""
    monkeypatch.setattr("equipoise.views.loader.needs_processes", lambda device: request.param == "processes")


only_processes = pytest.mark.parametrize("kind", ["processes"], indirect=True)


@pytest.fixture
def images(pictures):
    return find_parts(str(pictures)).parts["train"]


def epoch(batches, number=0, batch_size=8):
    steps = steps_per_epoch(len(batches), batch_size)
    return list(batches.training(7, batch_size, range(number * steps, (number + 1) * steps)))


def test_steps_leave_out_a_single_last_image_and_workers_are_counted():
    assert (worker_count(3), worker_count(-1) >= 1) == (3, True)
    assert [steps_per_epoch(n, 4) for n in (4, 5, 6, 8, 9)] == [1, 1, 2, 2, 2]


@both_kinds
def test_an_epoch_holds_every_image_once_and_in_another_order(images, settings):
    batches = open_batches(images, settings, CPU)
    first, second, again = epoch(batches, 0), epoch(batches, 1), epoch(batches, 0)
    assert [batch.images_VB3SS.shape[:2] for batch in first] == [(3, 8), (3, 8), (3, 5)]
    assert torch.bincount(torch.cat([batch.labels_G for batch in first])).tolist() == [12, 6, 3]
    assert torch.equal(first[0].images_VB3SS, again[0].images_VB3SS)
    assert not torch.equal(first[0].images_VB3SS, second[0].images_VB3SS)
    assert [batch.labels_G.tolist() for batch in first] != [batch.labels_G.tolist() for batch in second]


@pytest.mark.slow
@pytest.mark.usefixtures("kind")
def test_workers_change_no_number(images):
    none, two = (
        [*epoch(batches, 0), *epoch(batches, 1), *batches.evaluation(8)]
        for batches in (open_batches(images, replace(PHOTOS, mix="cmo"), CPU, workers) for workers in (0, 2))
    )
    for ours, theirs in zip(none, two, strict=True):
        assert len(ours.tensors) == len(theirs.tensors)
        assert all(torch.equal(one, other) for one, other in zip(ours.tensors, theirs.tensors, strict=True))


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_batch_size_changes_no_view(mix, images):
    """Image by image, the same pixels whatever the batches: matched by their order in the epoch."""
    batches = open_batches(images, replace(SMALL, mix=mix), CPU)
    large, small = (torch.cat([batch.images_VB3SS for batch in epoch(batches, 0, size)], dim=1) for size in (7, 3))
    assert torch.equal(large, small)


@both_kinds
@pytest.mark.parametrize("mix", ["mixup", "cutmix", "cmo"])
def test_the_classifiers_view_is_mixed_with_a_view_of_the_second_image(mix, images, settings):
    """Pixel by pixel, from the views of both. The contrastive views are as without."""
    settings = replace(settings, mix=mix)
    first, labels = [], images.labels_N
    others = second_draws(mix, 7, 2, labels, "instance", 1)
    boxes, kept, shares = mixing(settings, 7, 2, others)
    plain = epoch(open_batches(images, replace(settings, mix="none"), CPU), 2, 21)[0].images_VB3SS
    (batch,) = epoch(open_batches(images, settings, CPU), 2, 21)
    assert torch.equal(batch.images_VB3SS[1:], plain[1:])
    first = plain[0].permute(0, 2, 3, 1).numpy()
    for place, other in enumerate(others.tolist()):
        picture = [decode(images, other % 21)]
        if settings.policy == "cifar":
            pixels = open_batches(images, settings, CPU)._maker._pixels_NSS3[other % 21][None]
            view = small_views(pixels, replace(settings, kinds=("cls",)), 7, 2, np.array([other]))
        else:
            view = photo_views(picture, replace(settings, kinds=("cls",)), 7, 2, np.array([other]))
        second = view[0, 0].permute(1, 2, 0).numpy()
        top, left, bottom, right = boxes[place]
        inside = np.zeros((settings.size, settings.size, 1), bool)
        inside[top:bottom, left:right] = True
        blended = kept[place] * first[place].astype(float) + (1 - kept[place]) * second
        expected = np.where(inside, blended, first[place])
        found = batch.images_VB3SS[0, place].permute(1, 2, 0).numpy()
        assert abs(found - expected).max() <= 0.5 + 1e-4
        assert 1 - shares[place] == pytest.approx((1 - kept[place]) * inside.mean())
    assert 0 < (shares < 1).mean() <= 1
    second_labels, given_shares = batch.mixed
    assert second_labels.tolist() == labels[others % 21].tolist()
    assert given_shares.tolist() == pytest.approx(shares.tolist())


@pytest.mark.parametrize("mix", ["mixup", "cmo"])
def test_ranks_make_the_rows_of_one_batch(mix, images):
    """Of three, the last has none of the last batch of 3: it computes two others."""
    settings, steps = replace(SMALL, mix=mix), steps_per_epoch(21, 9)
    whole, *ranks = (
        list(open_batches(images, settings, CPU, 0, World(rank, size)).training(7, 9, range(steps)))
        for rank, size in ((0, 1), (0, 3), (1, 3), (2, 3))
    )
    assert [batches[2].rows.stop - batches[2].rows.start for batches in ranks] == [3, 0, 0]
    for number, batch in enumerate(whole):
        for batches in ranks:
            own, rows = batches[number], batches[number].rows
            assert torch.equal(own.labels_G, batch.labels_G)
            assert all(torch.equal(one, other) for one, other in zip(own.mixed, batch.mixed, strict=True))
            if rows.stop > rows.start:
                assert torch.equal(own.images_VB3SS, batch.images_VB3SS[:, rows])


def test_evaluation_is_in_order_and_whole(images):
    batches = list(open_batches(images, PHOTOS, CPU, workers=0).evaluation(8))
    assert torch.cat([batch.labels_G for batch in batches]).tolist() == images.labels_N.tolist()
    view = batches[1].images_VB3SS[0, 2].permute(1, 2, 0).numpy()
    assert (view == evaluation_view(decode(images, 10), 24)).all()


# ---- with skip


@pytest.fixture
def spoilt(tmp_path):
    """Ten ants, of which 2 and 3 cannot be read, and five bees without 4, as a list; and the ants' whole list."""
    images = find_parts(str(draw_folder(tmp_path / "data", {"ant": 10, "bee": 5}))).parts["train"]
    for name in ("ant/2", "ant/3", "bee/4"):
        path = tmp_path / "data" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    return images


@pytest.mark.slow
@both_kinds
@pytest.mark.usefixtures("kind")
def test_another_image_of_the_class_stands_in_whatever_the_workers(settings, spoilt, tmp_path):
    """As if its file had been copied over the bad one."""
    found = [open_batches(spoilt, settings, CPU, workers, skip=True) for workers in (0, 2)]
    batches = [epoch(loader, 3, batch_size=4) for loader in found]
    for name, instead in (("ant/2", "ant/4"), ("ant/3", "ant/4"), ("bee/4", "bee/0")):
        (tmp_path / "data" / f"{name}.png").write_bytes((tmp_path / "data" / f"{instead}.png").read_bytes())
    whole = open_batches(spoilt, settings, CPU, 0)
    for none, two, expected in zip(*batches, epoch(whole, 3, batch_size=4), strict=True):
        assert torch.equal(none.images_VB3SS, expected.images_VB3SS)
        assert torch.equal(two.images_VB3SS, expected.images_VB3SS)
        assert torch.equal(none.labels_G, expected.labels_G)
    for loader in found:
        assert sorted(loader.bad) == [2, 3, 14]
        assert all("truncated" in error.reason for error in loader.bad.values())


@pytest.mark.slow
@both_kinds
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_what_cannot_be_read(workers, settings, spoilt):
    loader = open_batches(spoilt, settings, CPU, workers, skip=True)
    batches = list(loader.evaluation(2))  # the second batch would be the two bad ants alone
    good = [index for index in range(15) if index not in (2, 3, 14)]
    assert torch.cat([batch.labels_G for batch in batches]).tolist() == spoilt.labels_N[good].tolist()
    whole = open_batches(spoilt.take(np.array(good)), settings, CPU).evaluation(20)
    images = torch.cat([batch.images_VB3SS for batch in batches], dim=1)
    assert torch.equal(images, next(iter(whole)).images_VB3SS)
    assert sorted(loader.bad) == [2, 3, 14]


@pytest.mark.slow
@both_kinds
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_or_a_class_that_cannot_be_read_at_all_is_refused(workers, settings, spoilt, tmp_path):
    with pytest.raises(UserError, match=r"/(ant|bee)/\d.png cannot be read "):
        epoch(open_batches(spoilt, settings, CPU, workers))
    for number in range(5):
        (tmp_path / "data" / "bee" / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"none of the 5 images of class 'bee' can be read \(first: .*bee/0.png\)"):
        epoch(open_batches(spoilt, settings, CPU, workers, skip=True))


# ---- the workers


def processes(loader):
    return loader._receiving._workers


@pytest.mark.slow
@only_processes
@pytest.mark.usefixtures("kind")
def test_a_lost_process_is_one_line_where_its_batch_is_waited_for(images):
    """And interrupts nothing before: torch's own way is to raise an error in whatever line this process is at."""
    loader = open_batches(images, PHOTOS, CPU, workers=2)
    batches = loader.evaluation(2)
    next(batches)
    os.kill(processes(loader)[1].pid, signal.SIGKILL)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        torch.ones(10).sum()
    with pytest.raises(UserError, match=r"^a loader process was lost \(.+\); if memory or .* ran out, .*--workers"):
        list(batches)
    loader.close()


@pytest.mark.slow
@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_an_error_of_ours_is_no_lost_process_and_blames_no_image(error, workers, images, monkeypatch):
    def broken(*_):
        raise error("a bug")

    monkeypatch.setattr("equipoise.views.loader.decode", broken)
    with pytest.raises(error, match="a bug"):
        epoch(open_batches(images, PHOTOS, CPU, workers, skip=True))


@pytest.mark.slow
@only_processes
@pytest.mark.usefixtures("kind")
def test_processes_ignore_ctrl_c_outlive_sigterm_and_end_when_closed(images):
    loader = open_batches(images, PHOTOS, CPU, workers=2)
    batches = loader.evaluation(2)
    for _ in range(2):  # one of each process, so that both have set their handlers
        next(batches)
    ours = processes(loader)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for process in ours:
            os.kill(process.pid, number)
    assert len(list(batches)) == 9
    assert all(process.is_alive() for process in ours)
    loader.close()
    for process in ours:
        process.join(5)
        assert not process.is_alive()


def test_threads_end_with_the_batches_also_when_these_are_left_early(images):
    before = threading.active_count()
    loader = open_batches(images, PHOTOS, CPU, workers=2)
    batches = loader.training(7, 2, range(1000))
    for _ in range(2):
        next(batches)
    assert before < threading.active_count() <= before + 2
    loader.close()
    assert len(list(loader.evaluation(8))) == 3
    until = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < until
        time.sleep(0.01)


SCRIPT = """\
import multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1])
import equipoise, equipoise.views.loader
if sys.argv[2] == "processes":
    equipoise.views.loader.needs_processes = lambda device: True
fields = {"arch": "resnet8", "size": 16, "hidden_dim": 16, "feature_dim": 8, "batch_size": 6, "epochs": 1}
recipe = equipoise.load_recipe("pictures", data=sys.argv[3], workers=1, device="cpu", **fields)
equipoise.train(recipe, "run", progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "workers"), [("spawn", "threads"), ("spawn", "processes"), ("forkserver", "processes")]
)
def test_a_script_without_a_guard_trains_with_threads_and_is_refused_with_processes(
    method, workers, pictures, tmp_path
):
    """Refused by one line, before there is a folder or a process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "script.py", method, workers, str(pictures)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    if workers == "threads":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        assert "script.py: loader processes import this script" in done.stderr.splitlines()[-1]
        assert done.stderr.count("Traceback") == 1
    assert (tmp_path / "run" / "metrics.json").exists() == (workers == "threads")
    assert (tmp_path / "run").exists() == (workers == "threads")
