"""A plan: which folder a run is written into, which checkpoint it starts from, and what is refused."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import draw_folder, figures_of
from synthetic import TWO_EPOCHS as RECIPE

from benchmarks.rehearsal import build_imagenet
from equipoise import UserError, load_recipe, train
from equipoise.base.world import World
from equipoise.config.recipe import Recipe
from equipoise.data.lists import PUBLISHED, git_blob
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training import plan as planning
from equipoise.training.plan import Place, Plan, find_place, prepare, refuse_batches
from equipoise.training.session import start

OWN = World()


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
    with pytest.raises(UserError, match=r"there is no run folder or checkpoint at "):
        find_place(RECIPE, None, tmp_path, OWN)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"is there, and not empty: name another with --out, or go on by equipoise train --resume "
    ):
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
    assert figures_of(run) == figures_of(finished)


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


def small(folder, **overrides):
    fields = {"device": "cpu", "epochs": 2, "size": 16, "encoder": "resnet8", "batch_size": 4, "workers": 0}
    return load_recipe("pictures", data=str(folder), **{**fields, **overrides})


def test_a_recipe_of_a_run_finds_its_files_from_anywhere(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / "w.pth")
    recipe = prepare(small(pictures.name, weights="~/w.pth", tune="full"), "run").recipe
    assert recipe.model.weights == str(tmp_path / "w.pth")
    assert recipe.data.path == str(pictures)
    monkeypatch.chdir("/")
    assert prepare(recipe, tmp_path / "run").recipe == recipe


def test_a_plan_says_which_lists_it_takes_and_how_they_depart(tmp_path):
    data = build_imagenet(tmp_path / "imagenet", counts=(5, 3))
    said = prepare(load_recipe("imagenet-lt", data=str(data), batch_size=4, encoder="resnet8", size=32)).describe()
    for part in ("train", "val", "test"):
        name = f"ImageNet_LT_{part}.txt"
        assert f"{data / name}: git blob {git_blob((data / name).read_bytes())}, no published list" in said["lists"]
        assert f"{data / name} is not the published {name} (git blob {PUBLISHED[name].blob}): " in said["note"]


def test_the_plan_says_what_will_happen(pictures, tmp_path):
    plan = prepare(small(pictures, holdout=0.2, precision="fp32"), tmp_path / "run")
    said = plan.describe()
    assert said["images"] == "17 to train on, 4 for validation"
    assert said["classes"] == "3, of 10 (ant) to 2 (cat) images: imbalance factor 5"
    assert said["steps"] == "2 epochs of 4: 8 steps of 4 images"
    assert said["device"] == "cpu, fp32"
    assert said["run folder"] == str(tmp_path / "run")
    assert "goes on" not in said
    assert prepare(small(pictures, micro_batch=2)).describe()["steps"].endswith("of 4 images, 2 at a time")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"batch_size": 343}, r"\(343\) is larger than the training part \(342 images\); set a smaller one"),
        ({"encoder": "resnet9000"}, "no encoder is called 'resnet9000'"),
        ({"encoder": "vit_tiny_patch16_224", "size": 8}, "change --size or --arch"),
        ({"imbalance_factor": 200}, "leaves class '9' without images"),
        ({"data": ""}, "name a folder with --data FOLDER"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(overrides, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        start(prepare(load_recipe("digits-lt", device="cpu", **overrides), tmp_path / "run")).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_inside_the_data_is_refused(pictures, monkeypatch):
    with pytest.raises(UserError, match="would lie inside the data; name one outside with --out"):
        prepare(small(pictures), pictures / "run")
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError, match="would lie inside the data"):
        prepare(small("."))


def test_batches_that_cannot_be_shared_or_normalised():
    def check(batch_size: int, ranks: int = 1, method: str = "ce", **fields: object) -> None:
        refuse_batches(load_recipe("digits-lt", method=method, batch_size=batch_size, **fields), 342, World(0, ranks))

    check(256, 4)
    for batch, ranks in ((256, 3), (10, 4), (3, 4), (4, 4)):
        with pytest.raises(UserError, match=rf"of all {ranks} processes .* multiple of {ranks}, {2 * ranks} or"):
            check(batch, ranks)
    check(68, 1, batch_norm="synchronised")  # 342 = 5 * 68 + 2
    for fields in ({"batch_size": 68}, {"batch_size": 64, "micro_batch": 8}):
        with pytest.raises(UserError, match="BatchNorm can be synchronised neither over micro-batches nor"):
            check(ranks=4, batch_norm="synchronised", **fields)
    for size in (1, 2):
        with pytest.raises(UserError, match=rf"^micro_batch \({size}\) may leave BatchNorm a single image; "):
            check(5, micro_batch=size)
        with pytest.raises(UserError, match="may leave BatchNorm a single image"):
            check(5, method="gml", micro_batch=size)  # of the last view, which passes the momentum encoder alone
        check(5, method="bcl", micro_batch=size)  # of three views it is over three
        check(5, micro_batch=size, batch_norm="frozen")
    check(5, micro_batch=3)


@pytest.mark.parametrize(
    ("arch", "tune", "given", "precision"),
    [
        ("tf_efficientnet_lite0", "full", "auto", "fp32"),
        ("tf_efficientnet_lite0", "full", "bf16", "bf16"),
        ("tf_efficientnet_lite0", "last-stage", "auto", "bf16"),
        ("resnet18", "full", "auto", "bf16"),
    ],
)
def test_convolutions_in_groups_are_trained_in_float32(arch, tune, given, precision, tmp_path, monkeypatch):
    """On a CPU that is built for bf16."""
    monkeypatch.setattr(planning, "choose_precision", lambda name, device: "bf16")
    data = draw_folder(tmp_path / "data", {"ant": 6, "bee": 5})
    recipe = load_recipe("finetune", data=str(data), arch=arch, tune=tune, precision=given, batch_size=4, device="cpu")
    assert prepare(recipe, tmp_path / "run").precision == precision


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"method": "ldam-drw", "classifier": "linear"}, "ldam-drw needs a cosine classifier: set --classifier cosine"),
        (
            {"method": "ldam-drw", "sampler": "square-root"},
            "ldam-drw goes by the class counts as they are: set --sampler instance",
        ),
        ({"method": "paco", "label_smoothing": 0.1}, "paco has no label smoothing: set --label-smoothing 0"),
        ({"method": "gml", "classifier": "linear"}, "gml needs a cosine classifier: set --classifier cosine"),
        ({"method": "focal", "label_smoothing": 0.1}, "focal has no label smoothing: set --label-smoothing 0"),
        (
            {"method": "gpaco", "mix": "cutmix"},
            "gpaco, whose views train both branches, cannot take mixed images: set --mix none",
        ),
        ({"method": "concutmix", "mix": "mixup"}, "concutmix pastes boxes of other images: set --mix cmo"),
        (
            {"method": "concutmix", "tune": "frozen"},
            "concutmix mixes images, not a frozen encoder's features: set --tune last-stage",
        ),
        ({"tune": "frozen", "mix": "cmo"}, "a frozen encoder's features cannot take mixed images: set --mix none"),
        ({"weights": "a.pth"}, "tune = scratch starts from random weights: set --tune full, or drop --weights"),
        ({"anchor": 6.0}, "only cosine classifiers on pretrained encoders are held: set --anchor 0"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        prepare(load_recipe("digits-lt", **fields), tmp_path / "run")
    assert str(error.value) == sentence
