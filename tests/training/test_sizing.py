"""A recipe for own pictures: what is chosen for which time, and that a choice trains."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import draw_folder

from equipoise import UserError, load_recipe
from equipoise.base.errors import Stopped
from equipoise.cli.main import main
from equipoise.config.recipe import explained_toml, find_field
from equipoise.method.encoders import create_encoder
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training import sizing
from equipoise.training.plan import prepare
from equipoise.training.session import train
from equipoise.training.sizing import Cost, choose, duration, measure, pace
from equipoise.training.step import Step


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Of folders of small photographs, with random weights in a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(create_encoder("resnet8", 32)[0].state_dict(), tmp_path / "weights.pth")
    data = draw_folder(tmp_path / "data", {"ant": 14, "bee": 8, "cat": 5})
    fields = {"data": str(data), "arch": "resnet8", "weights": str(tmp_path / "weights.pth"), "size": 32}
    return [(find_field(name), value) for name, value in fields.items()]


@pytest.mark.parametrize(
    ("budget", "tune", "epochs", "why"),
    [
        (None, "frozen", 15, "without a GPU each image passes the encoder once"),
        (10_000, "full", 2.0, "the most that fits into 2.8 h"),
        (1_000, "last-stage", 1.0, "the most that fits into 17 min"),
        (100, "frozen", 2.0, "the most that fits into 2 min"),
        (5, "frozen", 0.5, "nothing fits into 5 s"),
    ],
)
def test_what_the_time_allows(budget, tune, epochs, why, settings, monkeypatch):
    """Costs of 100 s, 50 s and 0.2 s an epoch: the most thorough way of which half the recipe's epochs fit in."""
    seconds = {"full": 200.0, "last-stage": 49.0, "frozen": 0.2}
    monkeypatch.setattr(sizing, "measure", lambda plan: Cost(10, seconds[plan.recipe.model.tune], 2))
    choice = choose(settings, budget)
    assert choice.recipe.model.tune == tune
    assert why in choice.described()["chosen"]
    own = load_recipe("frozen" if tune == "frozen" else "finetune").epochs
    if budget is not None:
        assert choice.seconds <= budget or "nothing" in why
    assert choice.recipe.batch_size == 4
    assert (choice.recipe.epochs == epochs) if tune == "frozen" and budget is None else own / 2 <= choice.recipe.epochs


def test_what_is_set_stays(settings, monkeypatch):
    monkeypatch.setattr(sizing, "measure", lambda plan: Cost(0, 1, 0))
    fields = {"tune": "last-stage", "epochs": 3, "batch_size": 6, "lr": 0.5}
    choice = choose([*settings, *((find_field(name), value) for name, value in fields.items())], budget=1000)
    recipe = choice.recipe
    assert (recipe.model.tune, recipe.epochs, recipe.batch_size, recipe.optim.lr) == ("last-stage", 3, 6, 0.5)
    assert "as it was asked for" in choice.described()["chosen"]
    with pytest.raises(UserError, match="one of scratch, full, last-stage"):
        choose([*settings, (find_field("tune"), "all")])


def test_without_weights_it_starts_from_nothing(settings):
    choice = choose([one for one in settings if one[0].key != "model.weights"])
    assert choice.recipe.model.tune == "scratch"
    assert "there are no pretrained weights for resnet8" in choice.described()["chosen"]
    assert choice.cost.epoch > 0


@pytest.mark.parametrize("tune", ["frozen", "last-stage"])
def test_a_choice_is_measured_and_trains(tune, settings, tmp_path):
    choice = choose([*settings, (find_field("tune"), tune)])
    assert choice.cost.before > 0, "features are missing"
    assert choice.cost.epoch > 0
    assert (choice.cost.after > 0) == (tune != "frozen")
    (tmp_path / "own.toml").write_text(explained_toml(choice.recipe, choice.reasons))
    assert load_recipe(tmp_path / "own.toml") == choice.recipe, "with comments it is the same recipe"
    assert "# as it was asked for" in (tmp_path / "own.toml").read_text()
    run = train(replace(choice.recipe, epochs=2), tmp_path / "run", progress=False)
    assert run.metrics["best"] is not None
    again = measure(prepare(choice.recipe, tmp_path / "another"))
    assert again.before == 0, "the features are there"


def test_seconds():
    assert [duration(seconds) for seconds in (0.2, 40, 89, 120, 5399, 7200)] == [
        "1 s",
        "40 s",
        "89 s",
        "2 min",
        "90 min",
        "2.0 h",
    ]
    assert pace(iter([5, 3, 2])) < 0.01


@pytest.mark.parametrize("tune", ["frozen", "last-stage", "head+norm"])
def test_a_stopped_run_of_a_part_ends_as_an_undisturbed_one(tune, settings, tmp_path, monkeypatch):
    """To the last bit: what is held, what is drawn again and the rates of the layers all come back; then every use of
    the run."""
    fields = {field.path[-1]: value for field, value in settings}
    recipe = load_recipe(
        "finetune", **fields, tune=tune, method="bcl", anchor=6, sampler="class-balanced", layer_decay=0.5, epochs=3,
        batch_size=6, micro_batch=3, precision="fp32", label_smoothing=0.1, workers=0,
    )  # fmt: skip
    whole = load_checkpoint(train(recipe, tmp_path / "whole", progress=False).path / "last.pt")
    steps, honest = 0, Step.__call__

    def stop(step, batch, votes):
        nonlocal steps
        steps += 1
        if steps == 6:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(step, batch, votes)

    monkeypatch.setattr(Step, "__call__", stop)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", progress=False)
    Path(fields["weights"]).unlink()  # a run that goes on does not need them
    again = load_checkpoint(train(recipe, resume=tmp_path / "run", progress=False).path / "last.pt")
    assert again.step == whole.step > steps - 2
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    for words in (["evaluate"], ["report"], ["predict"], ["export", "--to", "onnx"], ["export", "--to", "safetensors"]):
        paths = [str(tmp_path / "data" / "ant")] if words == ["predict"] else []
        assert main([words[0], str(tmp_path / "run"), *paths, *words[1:]]) == 0, words
