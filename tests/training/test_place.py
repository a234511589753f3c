"""Which folder a run is written into, and which checkpoint it starts from."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import draw_folder

from equipoise import UserError, load_recipe, train
from equipoise.base.world import World
from equipoise.config.recipe import Recipe
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training.place import Place, find_place
from equipoise.training.plan import Plan, prepare
from equipoise.training.session import start

RECIPE = load_recipe("digits-lt", epochs=2, precision="fp32", method="ce", log_every=1)
OWN = World()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(RECIPE, tmp_path_factory.mktemp("runs") / "run", progress=False).path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def going_on(run: Path, **overrides: object) -> Plan:
    return prepare(load_recipe(run, **overrides), resume=run)


def begun(folder: Path, started: str, recipe: Recipe = RECIPE, launch: str = "", done: bool = False) -> Path:
    """The folder of a run that has written its record and nothing more, unless it is `done`."""
    with start(prepare(recipe, folder)):
        record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "started": started, "launch": launch}))
    if done:
        (folder / "metrics.json").write_text("{}")
    return folder


def test_a_place_is_new_or_that_of_a_run_that_goes_on(finished, tmp_path):
    assert find_place(RECIPE, tmp_path / "new", None, OWN) == Place(tmp_path / "new", None, resumes=False)
    assert not find_place(RECIPE, None, None, OWN).named
    place = find_place(RECIPE, None, finished, OWN)
    assert (place.folder, place.resumes, place.start.checkpoint.epoch) == (finished, True, 2)
    for source in (finished, finished / "last.pt"):
        place = find_place(RECIPE, tmp_path / "new", source, OWN)
        assert (place.folder, place.resumes, place.start.checkpoint.epoch) == (tmp_path / "new", False, 2)
    with pytest.raises(UserError, match=r"there is no run folder or checkpoint at .*absent"):
        find_place(RECIPE, None, tmp_path / "absent", OWN)
    with pytest.raises(UserError, match=r"has no checkpoint to go on from"):
        find_place(RECIPE, None, tmp_path, OWN)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty; go on with it by --resume .*, or name another"):
        prepare(RECIPE, tmp_path)


def test_auto_is_the_newest_unfinished_run_of_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find = lambda recipe=RECIPE, out=None: find_place(recipe, out, "auto", OWN)  # noqa: E731
    assert not find().resumes
    older = begun(Path("runs/older"), "2026-01-01T10:00:00")
    assert find().folder == older
    # A clock that was set back: what counts is what the record says, not the order of the files.
    newer = begun(Path("runs/a-newer"), "2026-01-01T11:00:00")
    os.utime(older / "run.json", (2e9, 2e9))
    begun(Path("runs/finished"), "2026-01-01T12:00:00", done=True)
    begun(Path("runs/another"), "2026-01-01T12:00:00", replace(RECIPE, epochs=3))
    shutil.copytree(newer, "runs/damaged")
    Path("runs/damaged/run.json").write_text("{")
    assert find().folder == newer
    assert find(replace(RECIPE, precision="bf16", log_every=7)).folder == newer
    assert find(out=older).folder == older
    assert not find(out=tmp_path / "new").resumes


def test_a_restart_by_torchrun_goes_on_with_its_own_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = begun(Path("runs/own"), "2026-01-01T10:00:00", launch="7f3")
    begun(Path("runs/other"), "2026-01-01T11:00:00", launch="aaa")
    find = lambda **world: find_place(RECIPE, None, None, World(**world))  # noqa: E731
    assert find(launch="7f3").folder == own
    assert not find(launch="bbb").resumes
    unnamed = begun(Path("runs/unnamed"), "2026-01-01T12:00:00", launch="none")
    assert not find(launch="none").resumes, "torchrun's name for no name"
    assert find(launch="none", restarted=True).folder == unnamed
    (own / "metrics.json").write_text("{}")
    assert not find(launch="7f3").resumes, "a new launch of the same name is a new run"
    assert find(launch="7f3", restarted=True).folder == own


def test_after_a_restart_a_finished_run_is_scored_again_and_not_begun_anew(run, monkeypatch):
    before = {name: (run / name).read_bytes() for name in ("metrics.json", "last.pt", "metrics.jsonl")}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(RECIPE, run, progress=False)
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_the_checkpoint_before_a_damaged_one_is_used(damage, finished, run):
    content = bytearray((run / "last.pt").read_bytes())
    if damage == "flipped":
        # Where a weight is, a flipped bit gives another number and no other sign than the checksum.
        content[content.index(load_checkpoint(run / "last.pt").weights["encoder.stem.weight"].numpy().tobytes())] ^= 16
    else:
        del content[len(content) // 2 :]
    (run / "last.pt").write_bytes(content)
    plan = prepare(load_recipe(run, epochs=3), resume=run)
    assert plan.start.path == run / "previous.pt"
    assert f"from {run}/previous.pt, after epoch 1" in plan.describe()["goes on"]
    assert (run / "metrics.json").exists(), "nothing is written yet"
    with start(plan):
        # Neither the figures of its earlier end stay, nor the damaged one, which would become the one before the last.
        assert not (run / "metrics.json").exists()
        assert not (run / "last.pt").exists()
    train(load_recipe(run, epochs=2), progress=False, resume=run)
    one, other = load_checkpoint(run / "last.pt"), load_checkpoint(finished / "last.pt")
    assert all(torch.equal(one.weights[name], value) for name, value in other.weights.items())
    assert (run / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


def test_without_a_whole_checkpoint_a_run_cannot_go_on(run):
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"previous.pt is "):
        going_on(run)
    for name in ("last.pt", "previous.pt"):
        (run / name).unlink()
    assert going_on(run).describe()["goes on"] == "from its beginning: it had no checkpoint yet"


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_images(tmp_path):
    """Of whichever part: the best is chosen on one, and metrics of two data sets would be mixed."""
    data = tmp_path / "data"
    for part in ("train", "val", "test"):
        draw_folder(data / part, {"ant": 6, "bee": 4})
    recipe = load_recipe("pictures", data=str(data), arch="resnet8", size=16, epochs=1, batch_size=4, workers=0)
    run = train(recipe, tmp_path / "run", progress=False).path
    assert going_on(run, epochs=2).start
    for part, called in {"train": "train", "val": "validation", "test": "test"}.items():
        (data / part / "ant" / "0.png").rename(data / part / "ant" / "new.png")
        with pytest.raises(UserError, match=rf"the {called} part of {data} is not what {run}/last.pt was trained with"):
            going_on(run, epochs=2)
        (data / part / "ant" / "new.png").rename(data / part / "ant" / "0.png")


def test_more_epochs_are_told(run):
    assert "3 epochs instead of 2: so the learning rate changes" in going_on(run, epochs=3).describe()["goes on"]
