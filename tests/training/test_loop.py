"""Training runs: what they leave, that they repeat, and what stops them."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import GOLDEN, draw_folder, figures_of

import equipoise
from equipoise import UserError, load_recipe, train
from equipoise.config.recipe import Optim
from equipoise.method import bcl, objective
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training.loop import NonFiniteLossError, learning_rate
from equipoise.training.plan import prepare
from equipoise.training.session import start

QUICK = {"epochs": 2, "warmup_epochs": 0, "log_every": 4, "device": "cpu"}


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def small_pictures_recipe(folder, **overrides):
    settings = {**QUICK, "data": str(folder), "size": 16, "encoder": "resnet8", "batch_size": 4, "workers": 0}
    return load_recipe("pictures", **{**settings, **overrides})


@pytest.mark.slow
def test_run_folder_of_a_benchmark(tmp_path):
    recipe = load_recipe("digits-lt", **QUICK)
    run = train(recipe, tmp_path / "run", progress=False)
    assert run.recipe == recipe
    names = "recipe.toml run.json metrics.jsonl last.pt previous.pt metrics.json observed.npz"
    assert {path.name for path in run.path.iterdir()} == set(names.split())

    record = json.loads((run.path / "run.json").read_text())
    assert record["class_counts"] == dict(zip("0123456789", [124, 80, 51, 33, 21, 14, 9, 5, 3, 2], strict=True))
    assert record["data"]["images"] == {"train": 342, "test": 500}
    assert record["versions"]["torch"] == metadata.version("torch")
    assert {"command", "machine", "precision", "started"} <= record.keys()

    lines = json_lines(run.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    total = recipe.loss.alpha * lines[0]["classification"] + recipe.loss.beta * lines[0]["contrastive"]
    assert lines[0]["loss"] == pytest.approx(total, rel=1e-5)

    metrics = run.metrics
    assert metrics["best"] is None
    assert metrics["validation"] is None
    assert metrics["test"] == metrics["last"]["test"]
    assert len(metrics["test"]["per_class"]) == 10
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
    assert best.epoch == max(epoch for epoch, score in enumerate(scores, 1) if score == max(scores))
    assert best.best == (max(scores), best.epoch)
    metrics = run.metrics
    assert metrics["best"]["epoch"] == best.epoch
    assert metrics["last"]["epoch"] == 4
    assert metrics["best"]["validation"]["mean_per_class"] == pytest.approx(max(scores))
    assert metrics["train_counts"] == [8, 4, 2]
    assert metrics["validation"]["images"] == 7
    assert metrics["test"]["images"] == metrics["best"]["test"]["images"] == 9
    assert run.evaluate() == metrics


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_checkpoint(run.path / "last.pt").weights


@pytest.mark.slow
def test_a_recipe_trains_the_same_weights_from_anywhere_with_any_number_of_workers(tmp_path, monkeypatch):
    """Also with another state of torch's random numbers before it; and other ones with another seed."""
    draw_folder(tmp_path / "data", {"ant": 6, "bee": 4})
    monkeypatch.chdir(tmp_path)
    first = train(small_pictures_recipe("data", workers=1), "first", progress=False)
    expected, metrics = weights_of(first), figures_of(tmp_path / "first")
    other = weights_of(train(small_pictures_recipe("data", seed=1), "other", progress=False))
    assert not torch.equal(other["encoder.stem.weight"], expected["encoder.stem.weight"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for workers in (0, 2):
        torch.manual_seed(workers)
        recipe = load_recipe(tmp_path / "first" / "recipe.toml", workers=workers)
        again = train(recipe, f"again{workers}", progress=False)
        assert all(torch.equal(value, expected[name]) for name, value in weights_of(again).items())
        assert figures_of(again.path) == metrics


@pytest.mark.slow
def test_learning_happens(tmp_path):
    """Pictures whose class is a bright band: after a few epochs nearly all are right, the rare class too."""
    folder = tmp_path / "data"
    draw_folder(folder / "train", {"ant": 40, "bee": 15, "cat": 5})
    draw_folder(folder / "test", {"ant": 10, "bee": 10, "cat": 10})
    recipe = small_pictures_recipe(folder, epochs=12, batch_size=16, holdout=0, lr=0.05)
    recipe = replace(recipe, views=replace(recipe.views, policy="digits"))
    run = train(recipe, tmp_path / "run", progress=False)
    assert run.metrics["test"]["mean_per_class"] > 0.8
    logits = run.model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("spoilt", ["classification", "contrastive"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(spoilt, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *_: steps.append(1))
    room, function = {
        "classification": (objective, "logit_adjusted_cross_entropy"),
        "contrastive": (bcl, "balanced_contrastive_loss"),
    }[spoilt]
    honest, calls = getattr(room, function), []

    def turns_bad(*arguments, **further):
        calls.append(1)
        return honest(*arguments, **further) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(room, function, turns_bad)
    with pytest.raises(NonFiniteLossError) as error:
        train(load_recipe("digits-lt", **QUICK, lr=0.25), tmp_path / "run", progress=False)
    assert str(error.value).startswith(f"step 3 (epoch 1): the loss term '{spoilt}' is inf")
    assert "Lower the learning rate (now 0.1875)" in str(error.value)
    assert len(steps) == 2
    assert (tmp_path / "run" / "metrics.jsonl").is_file(), "the evidence stays"
    assert str(error.value).endswith(f"the log is in {tmp_path}/run")


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


@pytest.mark.long
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


SCHEDULES = {
    "imagenet_lt": (90, Optim(lr=0.1, warmup_epochs=0, schedule="cosine")),
    "inat18": (100, Optim(lr=0.2, warmup_epochs=0, schedule="cosine")),
    "cifar_200": (200, Optim(lr=0.15, warmup_epochs=5, schedule="step", milestones=(0.8, 0.9))),
}


def rates(epochs: int, optim: Optim) -> list[float]:
    return [learning_rate(epoch, epochs, optim) for epoch in range(epochs)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden(name):
    assert rates(*SCHEDULES[name]) == pytest.approx(GOLDEN["lr"][name], rel=1e-12)


def test_milestones_in_epochs_and_in_shares_are_the_same():
    epochs, optim = SCHEDULES["cifar_200"]
    assert rates(epochs, replace(optim, milestones=(160, 180))) == rates(epochs, optim)


def test_cosine_after_warmup_starts_below_the_peak_and_never_reaches_zero():
    found = rates(10, Optim(lr=1.0, warmup_epochs=2, schedule="cosine"))
    assert found[:2] == [0.5, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(found[1:]))
    assert found[-1] > 0


def test_sgd_decays_every_parameter(tmp_path):
    with start(prepare(load_recipe("digits-lt", method="ce", lr=0.5, weight_decay=0.1), tmp_path / "run")) as session:
        parameters = dict(session.network.named_parameters())
        before = {name: value.detach().clone() for name, value in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        session.trainer._optimizer.step()
        assert all(torch.allclose(value, 0.95 * before[name]) for name, value in parameters.items())
