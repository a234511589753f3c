"""Training runs: what they leave, that they repeat, and what stops them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import equipoise
from equipoise import UserError, load_recipe
from equipoise.base.world import ALONE, World
from equipoise.data.sources import open_parts
from equipoise.method.losses import log_prior, logit_adjusted_cross_entropy, supervised_contrastive_loss
from equipoise.method.network import Outputs
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training import loop as training
from equipoise.training import step
from equipoise.training.loop import NonFiniteLossError, _too_large, fit, train
from equipoise.training.plan import prepare
from equipoise.training.step import loss_terms

QUICK = {"epochs": 2, "warmup_epochs": 0, "log_every": 4, "device": "cpu"}


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def small_pictures_recipe(folder, **overrides):
    settings = {**QUICK, "data": str(folder), "size": 16, "encoder": "resnet8", "batch_size": 4, "workers": 0}
    return load_recipe("pictures", **{**settings, **overrides})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bcl", "ce", "logit-adjusted", "supcon+la"])
def test_run_folder_of_a_benchmark(method, tmp_path):
    recipe = load_recipe("digits-lt", method=method, **QUICK)
    run = train(recipe, tmp_path / "run", progress=False)
    assert run.recipe == recipe
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "recipe.toml", "run.json", "metrics.jsonl", "tensorboard", "last.pt", "previous.pt", "metrics.json",
        "observed.npz",
    }  # fmt: skip

    record = json.loads((run.path / "run.json").read_text())
    assert record["class_counts"] == dict(zip("0123456789", [124, 80, 51, 33, 21, 14, 9, 5, 3, 2], strict=True))
    assert record["data"]["images"] == {"train": 342, "test": 500}
    assert record["versions"]["torch"] == metadata.version("torch")
    assert {"command", "machine", "git", "precision", "started"} <= record.keys()

    lines = json_lines(run.path / "metrics.jsonl")
    terms = {"loss", "classification", "contrastive"} if method in ("bcl", "supcon+la") else {"loss"}
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    for line in lines:
        assert line.keys() == {"kind", "step", "epoch", "lr", "images_per_second"} | terms
    if "contrastive" in terms:
        total = recipe.loss.alpha * lines[0]["classification"] + recipe.loss.beta * lines[0]["contrastive"]
        assert lines[0]["loss"] == pytest.approx(total, rel=1e-5)

    curves = EventAccumulator(str(run.path / "tensorboard"))
    curves.Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == [4, 6, 8, 12]

    metrics = run.metrics
    assert metrics["method"] == method
    assert metrics["best"] is None
    assert metrics["validation"] is None
    assert metrics["test"] == metrics["last"]["test"]
    test = metrics["test"]
    assert len(test["per_class"]) == 10
    groups = {"many": test["per_class"][:1], "medium": test["per_class"][1:5], "few": test["per_class"][5:]}
    for group, members in groups.items():
        assert test[group] == pytest.approx(np.mean(members))
    assert run.evaluate() == metrics


@pytest.mark.slow
def test_best_is_chosen_on_validation_and_test_is_reported_apart(tmp_path):
    folder = tmp_path / "data"
    draw_folder(folder / "train", {"ant": 12, "bee": 6, "cat": 3})
    draw_folder(folder / "test", {"ant": 3, "bee": 3, "cat": 3})
    run = train(small_pictures_recipe(folder, epochs=4, holdout=0.3), tmp_path / "run", progress=False)
    assert (run.path / "best.pt").is_file()
    scores = [line["mean_per_class"] for line in json_lines(run.path / "metrics.jsonl") if line["kind"] == "validation"]
    assert len(scores) == 4
    best = load_checkpoint(run.path / "best.pt")
    assert best.epoch == 1 + scores.index(max(scores))
    assert best.best == (max(scores), best.epoch)
    metrics = run.metrics
    assert metrics["best"]["epoch"] == best.epoch
    assert metrics["last"]["epoch"] == 4
    assert metrics["best"]["validation"]["mean_per_class"] == pytest.approx(max(scores))
    assert metrics["train_counts"] == [8, 4, 2]
    assert metrics["validation"]["images"] == 7
    assert metrics["test"]["images"] == metrics["best"]["test"]["images"] == 9
    assert run.evaluate() == metrics
    other = run.evaluate(data=str(folder / "test"))
    assert other["test"]["per_class"] == metrics["test"]["per_class"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_weights_whatever_the_workers(workers, pictures, tmp_path):
    """Against a run with one worker, and with another state of torch's random numbers before it."""
    torch.manual_seed(workers)
    runs = [
        train(small_pictures_recipe(pictures, workers=count), tmp_path / f"run{count}-{workers}", progress=False)
        for count in (1, workers)
    ]
    ours, theirs = (load_checkpoint(run.path / "last.pt").weights for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = train(small_pictures_recipe(pictures, seed=1), tmp_path / f"other-{workers}", progress=False)
    weights = load_checkpoint(other.path / "last.pt").weights
    assert not torch.equal(weights["encoder.stem.weight"], ours["encoder.stem.weight"])


@pytest.mark.slow
def test_the_recipe_of_a_run_trains_the_same_again(tmp_path, monkeypatch):
    draw_folder(tmp_path / "data", {"ant": 6, "bee": 4})
    monkeypatch.chdir(tmp_path)
    first = train(small_pictures_recipe("data"), "first", progress=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = train(load_recipe(tmp_path / "first" / "recipe.toml"), "again", progress=False)
    ours, theirs = (
        load_checkpoint(folder / "last.pt").weights for folder in (tmp_path / "first", tmp_path / "elsewhere" / "again")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.metrics == json.loads((tmp_path / first.path / "metrics.json").read_text())


@pytest.mark.slow
def test_learning_happens(tmp_path):
    """Pictures whose class is a bright band: after a few epochs nearly all are right, the rare class too."""
    folder = tmp_path / "data"
    draw_folder(folder / "train", {"ant": 40, "bee": 15, "cat": 5})
    draw_folder(folder / "test", {"ant": 10, "bee": 10, "cat": 10})
    parts = open_parts(str(folder))
    recipe = small_pictures_recipe(folder, epochs=12, batch_size=16, holdout=0, lr=0.05)
    recipe = replace(recipe, views=replace(recipe.views, policy="digits"))
    run = train(recipe, tmp_path / "run", progress=False)
    assert parts.test is not None
    assert run.metrics["test"]["mean_per_class"] > 0.8
    logits = run.model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert logits.shape == (2, 3)


def outputs() -> tuple[Outputs, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, 2, 4, generator=random), dim=-1)
    prototypes = torch.nn.functional.normalize(torch.randn(3, 4, generator=random), dim=-1)
    return Outputs(torch.randn(6, 3, generator=random), features, prototypes), torch.tensor([0, 0, 0, 1, 1, 2])


def test_methods_are_their_formulas():
    counts = (50, 10, 2)
    made, labels = outputs()
    recipe = load_recipe("digits-lt", alpha=1.5, beta=0.7, temperature=0.2, tau=1.3)
    prior = log_prior(torch.tensor(counts))
    adjusted = logit_adjusted_cross_entropy(made.logits_BC, labels, prior, 1.3)
    bcl = equipoise.BalancedContrastiveLoss(0.2)(made.features_BVD, labels, made.prototypes_CD)
    supcon = supervised_contrastive_loss(made.features_BVD, labels, 0.2)
    expected = {
        "bcl": 1.5 * adjusted + 0.7 * bcl,
        "supcon+la": 1.5 * adjusted + 0.7 * supcon,
        "logit-adjusted": adjusted,
        "ce": torch.nn.functional.cross_entropy(made.logits_BC, labels),
    }
    for method, total in expected.items():
        terms, loss = loss_terms(replace(recipe, method=method), counts, torch.device("cpu"))(made, labels, slice(0, 6))
        assert loss.item() == pytest.approx(total.item(), rel=1e-6)
        assert terms["loss"].item() == loss.item()


@pytest.mark.parametrize("spoilt", ["classification", "contrastive"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(spoilt, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *_: steps.append(1))
    function = {
        "classification": "logit_adjusted_cross_entropy",
        "contrastive": "balanced_contrastive_loss",
    }[spoilt]
    honest, calls = getattr(step, function), []

    def turns_bad(*arguments, **further):
        calls.append(1)
        return honest(*arguments, **further) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(step, function, turns_bad)
    with pytest.raises(NonFiniteLossError) as error:
        train(load_recipe("digits-lt", **QUICK, lr=0.25), tmp_path / "run", progress=False)
    assert str(error.value).startswith(f"step 3 (epoch 1): the loss term '{spoilt}' is inf")
    assert "Lower the learning rate (now 0.1875)" in str(error.value)
    assert len(steps) == 2
    assert (tmp_path / "run" / "metrics.jsonl").is_file(), "the evidence stays"
    assert str(error.value).endswith(f"The log is in {tmp_path}/run"), "there is no checkpoint to go on from"


def test_after_a_loss_that_is_not_finite_the_command_that_is_said_goes_on(tmp_path, monkeypatch):
    """An exploding rate: the weights grow beyond all bounds in the second epoch."""
    from equipoise.cli.main import main

    rates = iter([0.05] + [1e30] * 9)
    monkeypatch.setattr("equipoise.training.loop.learning_rate", lambda *_, **__: next(rates))
    with pytest.raises(NonFiniteLossError) as error:
        train(load_recipe("digits-lt", **{**QUICK, "epochs": 3}), tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "last.pt").epoch == 1
    said = str(error.value).partition("its last checkpoint is whole. To go on from there with another rate: ")[2]
    words = said.replace("ANOTHER_FOLDER", str(tmp_path / "other")).split()
    assert words[:2] == ["equipoise", "train"]
    assert main(words[1:]) == 0
    after = load_checkpoint(tmp_path / "other" / "last.pt")
    assert after.epoch == 3
    assert after.recipe.optim.lr == pytest.approx(load_checkpoint(tmp_path / "run" / "last.pt").recipe.optim.lr / 10)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"batch_size": 343}, "batch_size (343) is larger than the training part (342 images); set --batch-size 85"),
        ({"encoder": "resnet9000"}, "no encoder is called 'resnet9000'"),
        ({"imbalance_factor": 200}, "leaves class '9' without images"),
        ({"data": ""}, "name a folder with --data FOLDER"),
    ],
)
def test_refused_before_anything_is_written(overrides, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        train(load_recipe("digits-lt", **{**QUICK, **overrides}), tmp_path / "run", progress=False)
    assert sentence in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoder", ["resnet9000", "vit_tiny_patch16_224"])
def test_an_encoder_that_does_not_fit_leaves_no_folder(encoder, pictures, tmp_path):
    with pytest.raises(UserError, match=r"resnet9000|change --size or --arch"):
        train(small_pictures_recipe(pictures, encoder=encoder, size=8), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_inside_the_data_is_refused(pictures, monkeypatch):
    with pytest.raises(UserError, match="would lie inside the data; name one outside with --out"):
        prepare(small_pictures_recipe(pictures), pictures / "run")
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError, match="would lie inside the data"):
        prepare(small_pictures_recipe("."))


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    """Both are planned before either is there, as in a sweep that starts in one second."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits-lt", **{**QUICK, "epochs": 1, "method": "ce"})
    plan = prepare(recipe)
    first, second = training.fit(plan, progress=False), training.fit(plan, progress=False)
    assert first.path != second.path
    named = prepare(recipe, "mine")
    training.fit(named, progress=False)
    with pytest.raises(UserError, match="another run is writing into mine"):
        training.fit(named, progress=False)


@pytest.mark.slow
def test_a_run_is_not_scored_on_data_that_has_changed(pictures, tmp_path):
    run = train(small_pictures_recipe(pictures, epochs=1), tmp_path / "run", progress=False)
    before = (run.path / "metrics.json").read_bytes()
    (pictures / "ant" / "0.png").rename(pictures / "ant" / "new.png")
    for call in (run.evaluate, lambda: run.evaluate(split="validation")):
        with pytest.raises(UserError, match=r"the train part of .* is not what .* was trained with .*--data"):
            call()
    assert (run.path / "metrics.json").read_bytes() == before
    (pictures / "dog").mkdir()
    (pictures / "ant" / "new.png").rename(pictures / "dog" / "0.png")
    with pytest.raises(UserError, match="has a class 'dog' that the model does not know"):
        run.evaluate(data=str(pictures))
    with pytest.raises(UserError, match="has a class '0' that the model does not know"):
        run.evaluate(data="digits")


@pytest.mark.slow
def test_a_broken_test_image_does_not_lose_the_run(tmp_path):
    draw_folder(tmp_path / "data" / "train", {"ant": 6, "bee": 4})
    draw_folder(tmp_path / "data" / "test", {"ant": 2, "bee": 2})
    broken = tmp_path / "data" / "test" / "bee" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"bee/1.png cannot be read .*Training is done and kept; then: equipoise"):
        train(small_pictures_recipe(tmp_path / "data", epochs=1), run, progress=False)
    broken.write_bytes(whole)
    assert equipoise.Run(run).evaluate()["test"]["images"] == 4
    # Small images are decoded before training: there is nothing to keep.
    broken.write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"bee/1.png cannot be read \([^)]*\); repair or remove it, or pass over"):
        train(load_recipe("cifar10-lt", data=str(tmp_path / "data"), imbalance_factor=1, batch_size=4,
                          encoder="resnet8"), tmp_path / "small", progress=False)  # fmt: skip
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_a_compiled_encoder_trains_the_same_network(tmp_path):
    """In three steps of equal batches, and one checkpoint: an eager run can go on from it."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch compiles with a C++ compiler, and none is here")
    words = ["digits-lt", "-b", "114", "--precision", "fp32", "--device", "cpu", "--log-every", "1", "--lr", "0.01"]
    cache = tmp_path / "cache"

    def run(*more: str) -> None:
        command = [sys.executable, "-m", "equipoise", "train", *more]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)

    run(*words, "--epochs", "1", "--out", str(tmp_path / "eager"))
    assert not list(cache.rglob("*.so"))
    run(*words, "--epochs", "1", "--compile", "true", "--out", str(tmp_path / "compiled"))
    assert list(cache.rglob("*.so")), "something was compiled"
    terms = [
        [(line["loss"], line["classification"], line["contrastive"]) for line in json_lines(tmp_path / name)]
        for name in ("eager/metrics.jsonl", "compiled/metrics.jsonl")
    ]
    assert np.array(terms[0]).shape == (3, 3)
    assert np.array(terms[1]) == pytest.approx(np.array(terms[0]), rel=2e-3)
    eager, compiled = (load_checkpoint(tmp_path / name / "last.pt") for name in ("eager", "compiled"))
    assert list(compiled.weights) == list(eager.weights)
    run("--resume", str(tmp_path / "compiled"), "--epochs", "2", "--compile", "false")
    assert load_checkpoint(tmp_path / "compiled" / "last.pt").epoch == 2


@pytest.mark.slow
def test_training_in_bf16(tmp_path):
    recipe = load_recipe("digits-lt", **{**QUICK, "epochs": 1, "precision": "bf16"})
    run = train(recipe, tmp_path / "run", progress=False)
    assert json.loads((run.path / "run.json").read_text())["precision"] == "bf16"
    assert 0 < json_lines(run.path / "metrics.jsonl")[-1]["loss"] < 50


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"exists and is not empty; go on with it by --resume .*, or name another folder with --out"
    ):
        prepare(load_recipe("digits-lt"), tmp_path)
    assert prepare(load_recipe("digits-lt"), tmp_path / "new").folder == tmp_path / "new"


@pytest.mark.parametrize("exists", [False, True])
def test_a_photograph_that_breaks_in_the_first_epoch_leaves_nothing(exists, pictures, tmp_path):
    path = pictures / "ant" / "5.png"
    path.write_bytes(path.read_bytes()[:200])  # a good header and no pixels
    with Image.open(path) as image:
        assert image.size == (40, 32)
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(UserError, match=r"ant/5.png cannot be read \(.*truncated"):
        train(small_pictures_recipe(pictures, holdout=0), out, progress=False)
    assert out.exists() == exists
    assert not exists or list(out.iterdir()) == []


def test_a_photograph_without_a_header_is_found_before_training(pictures, tmp_path):
    (pictures / "ant" / "5.png").write_bytes(b"GIF?")
    with pytest.raises(UserError, match=r"ant/5.png cannot be read \(it is no image: "):
        prepare(small_pictures_recipe(pictures), tmp_path / "out")


def test_the_plan_says_what_will_happen(pictures, tmp_path):
    plan = prepare(small_pictures_recipe(pictures, holdout=0.2, precision="fp32"), tmp_path / "run")
    said = plan.describe()
    assert said["images"] == "17 to train on, 4 for validation"
    assert said["classes"] == "3, from 10 images (ant) to 2 (cat): imbalance factor 5"
    assert said["steps"] == "2 epochs of 4: 8 steps of 4 images"
    in_parts = prepare(small_pictures_recipe(pictures, micro_batch=2), tmp_path / "run").describe()["steps"]
    assert in_parts.endswith("of 4 images, 2 at a time, which BatchNorm, if any, is over")
    assert said["device"] == "cpu, fp32"
    assert said["run folder"] == str(tmp_path / "run")
    assert plan.recipe.data.path == str(pictures.resolve())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
@pytest.mark.parametrize(
    ("mebibytes", "said"),
    [
        (100, "equipoise: there is not enough memory for this on this device; free some, or try another\n"),
        (
            600,
            "equipoise: the memory of this machine is too small for 64 images in 3 views of 224 pixels at a time "
            "through a resnet50: --micro-batch 32 computes the same batch in parts (BatchNorm is then over a part); or "
            "set a smaller --batch-size, --size or --arch\n",
        ),
    ],
)
def test_too_little_memory_is_one_line(mebibytes, said, tmp_path):
    """In a real process that may take no more: the first when the network is made, the second in a step."""
    words = ["train", "digits-lt", "--arch=resnet50", "--size=224", "--batch-size=64", "--workers=0", "--device=cpu"]
    program = f"""
import re, resource, sys
import timm, torch
import equipoise.training.loop
from equipoise.cli.main import main
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + ({mebibytes} << 20),) * 2)
sys.exit(main({[*words, "--out", str(tmp_path / "out")]}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (2, said)
    assert not (tmp_path / "out").exists()


def test_what_makes_a_step_smaller(tmp_path):
    def said(world=ALONE, **fields):
        plan = prepare(load_recipe("digits-lt", device="cpu", **fields), tmp_path / "run")
        return str(_too_large(replace(plan, world=world)))

    other = "set a smaller --batch-size, --size or --arch"
    for share, half in ((5, 3), (33, 17), (64, 32)):
        assert said(batch_size=share).endswith(
            f" {share} images in 3 views of 16 pixels at a time through a resnet8: --micro-batch {half} computes the "
            f"same batch in parts (BatchNorm is then over a part); or {other}"
        )
    assert " 8 images in 1 view " in said(batch_size=64, micro_batch=8, method="ce")
    assert "--micro-batch 4 computes" in said(batch_size=64, micro_batch=8)
    assert "--micro-batch 32 computes" in said(batch_size=64, micro_batch=100)
    assert "in parts; or" in said(batch_size=64, batch_norm="frozen")
    assert "--micro-batch 16 computes" in said(World(size=2), batch_size=64)
    assert said(batch_size=4).endswith(f"through a resnet8; {other}")
    assert said(World(size=2), batch_size=64, batch_norm="synchronised").endswith(f"through a resnet8; {other}")
    plan = prepare(load_recipe("digits-lt", device="cpu"), tmp_path / "run")
    assert "the memory of this machine" in str(_too_large(plan))
    assert "the memory of cuda:1 is too small" in str(_too_large(replace(plan, device=torch.device("cuda:1"))))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    assert str(_too_large(plan)).endswith(
        f"resnet8; the last checkpoint is whole, and once there is more memory: equipoise train --resume {tmp_path}/run"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("create_sgd", "there is not enough memory for this on this device; free some, or try another"),
        (
            "predict",
            "there is not enough memory for this on this device; free some, or try another; the last checkpoint is "
            "whole, and once there is more memory: equipoise train --resume {run}",
        ),
        (
            "evaluate_run",
            "there is not enough memory for this on this device; free some, or try another. Training is done and kept; "
            "then: equipoise evaluate {run}",
        ),
    ],
)
def test_too_little_memory_beside_the_steps(where, said, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(f"equipoise.training.{where}", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    run = tmp_path / "run"
    with pytest.raises(UserError) as error:
        fit(prepare(small_pictures_recipe(pictures, holdout=0.2), run), progress=False)
    assert str(error.value) == said.format(run=run)
    assert run.exists() is (where != "create_sgd")


def test_parts_of_a_single_image_are_refused_where_batch_norm_cannot_be(pictures, tmp_path):
    """In one view; of three it is over three."""
    for batch_size, micro_batch in ((5, 2), (4, 1), (5, 1)):
        recipe = small_pictures_recipe(pictures, method="ce", batch_size=batch_size, micro_batch=micro_batch)
        with pytest.raises(UserError, match=rf"^micro_batch \({micro_batch}\) would leave BatchNorm a single image; "):
            prepare(recipe, tmp_path / "run")
        prepare(replace(recipe, method="bcl"), tmp_path / "run")
        prepare(replace(recipe, model=replace(recipe.model, batch_norm="frozen")), tmp_path / "run")
    prepare(small_pictures_recipe(pictures, method="ce", batch_size=5, micro_batch=3), tmp_path / "run")
