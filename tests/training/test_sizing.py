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
from equipoise.config.reading import explained_toml
from equipoise.config.recipe import find_field
from equipoise.method.encoders import create_encoder
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training import sizing
from equipoise.training.plan import prepare
from equipoise.training.session import train
from equipoise.training.sizing import Choice, Cost, choose, duration, measure
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
        (None, "frozen", 15, "on a CPU, each image passes the encoder once"),
        (10_000, "full", 20, "the most thorough that fits into 2.8 h"),
        (1_120, "full", 5, "the most thorough that fits into 19 min"),
        (800, "last-stage", 16, "the most thorough that fits into 13 min"),
        (100, "frozen", 30, "the most thorough that fits into 2 min"),
        (5, "frozen", 8, "5 s are too short"),
    ],
)
def test_what_the_time_allows(budget, tune, epochs, why, settings, monkeypatch):
    """Costs of 200 s, 49 s and 0.2 s an epoch: the most thorough way of which half the recipe's epochs (10, 10 and 15)
    fit in, with as many as fit in, up to twice the recipe's."""
    seconds = {"full": 200.0, "last-stage": 49.0, "frozen": 0.2}
    monkeypatch.setattr(sizing, "measure", lambda plan, *_: Cost(10, seconds[plan.recipe.model.tune], 2))
    choice = choose(settings, budget)
    assert (choice.recipe.model.tune, choice.recipe.epochs, choice.recipe.batch_size) == (tune, epochs, 6)
    assert why in choice.describe()["chosen"]


def test_what_was_asked_for_is_fitted_into_the_time(settings, monkeypatch):
    monkeypatch.setattr(sizing, "measure", lambda *_: Cost(10, 200, 2))
    choice = choose([*settings, (find_field("tune"), "full")], budget=650)
    assert (choice.recipe.epochs, choice.cost.of(choice.recipe.epochs)) == (3, 612)


def test_what_is_set_stays(settings, monkeypatch):
    monkeypatch.setattr(sizing, "measure", lambda *_: Cost(0, 1, 0))
    fields = {"tune": "last-stage", "epochs": 3, "batch_size": 6, "lr": 0.5}
    choice = choose([*settings, *((find_field(name), value) for name, value in fields.items())], budget=1000)
    recipe = choice.recipe
    assert (recipe.model.tune, recipe.epochs, recipe.batch_size, recipe.optim.lr) == ("last-stage", 3, 6, 0.5)
    assert "as it was asked for" in choice.describe()["chosen"]
    with pytest.raises(UserError, match="one of scratch, full, last-stage"):
        choose([*settings, (find_field("tune"), "all")])


def test_without_weights_it_starts_from_nothing(settings, tmp_path):
    choice = choose([one for one in settings if one[0].key != "model.weights"], budget=3000)
    assert choice.recipe.model.tune == "scratch"
    assert "there are no pretrained weights for resnet8" in choice.describe()["chosen"]
    assert choice.cost.epoch > 0
    (tmp_path / "own.toml").write_text(explained_toml(choice.recipe, choice.reasons))
    assert 'tune = "scratch"  # there are no pretrained weights for resnet8' in (tmp_path / "own.toml").read_text()


@pytest.mark.parametrize("tune", ["frozen", "last-stage"])
def test_a_choice_is_measured_and_trains(tune, settings, tmp_path):
    choice = choose([*settings, (find_field("tune"), tune)])
    assert choice.cost.before > 0, "features are missing"
    assert choice.cost.epoch > 0
    assert (choice.cost.after > 3) == (tune != "frozen")
    (tmp_path / "own.toml").write_text(explained_toml(choice.recipe, choice.reasons))
    assert load_recipe(tmp_path / "own.toml") == choice.recipe, "with comments it is the same recipe"
    assert "# as it was asked for" in (tmp_path / "own.toml").read_text()
    run = train(replace(choice.recipe, epochs=2), tmp_path / "run", progress=False)
    assert run.metrics["best"] is not None
    again = measure(prepare(choice.recipe, tmp_path / "another"), 1, 6.0)
    assert again.before == 0, "the features are there"
    assert (again.image > 0) == (tune != "frozen")


def test_seconds():
    spans = [duration(seconds) for seconds in (0.2, 40, 89, 120, 5399, 7200)]
    assert spans == ["1 s", "40 s", "89 s", "2 min", "90 min", "2.0 h"]
    assert Choice(load_recipe("frozen"), {"model.tune": "so"}, Cost(0.2, 0.01, 0)).describe()["takes about"] == "1 s"


@pytest.mark.parametrize(("items", "expected"), [(20, 5.0), (4, 5.0), (3, 35 / 3), (1, 25.0)])
def test_the_pace_of_work(items, expected, monkeypatch):
    """Two seconds to make an item and three to work on it; ten more of each for the first, which counts if it is the
    only one, or one of few. After thirty seconds it is enough."""
    clock, worked = [0.0], list[int]()
    monkeypatch.setattr(sizing.time, "perf_counter", lambda: clock[0])

    def wait(seconds: float, number: int) -> int:
        clock[0] += seconds + 10 * (number == 0)
        return number

    def work(number: int) -> None:
        worked.append(wait(3, number))

    made = (wait(2, number) for number in range(items))
    assert sizing._paced(made, work, 2, torch.device("cpu"), 30.0) == expected
    assert len(worked) == min(items, 2 + 1 + 7)


@pytest.mark.parametrize("images", [2, 3, 5])
def test_few_images(images, settings, tmp_path):
    """The batch is never larger than what there is."""
    data = draw_folder(tmp_path / "few", {"ant": images - 1, "bee": 1})
    own = [(find_field("data"), str(data)), (find_field("holdout"), 0)]
    choice = choose([*settings, *own])
    assert choice.recipe.batch_size == 2
    run = train(replace(choice.recipe, epochs=1), tmp_path / "run", progress=False)
    assert run.metrics["last"]["test"] is None


def test_an_interrupted_choice_goes_on(settings, tmp_path, monkeypatch, capsys):
    """With the recipe of before, whatever the clock says now; other settings are another run."""
    monkeypatch.chdir(tmp_path)
    epochs = iter((0.5, 0.05))
    monkeypatch.setattr(sizing, "measure", lambda *_: Cost(0, next(epochs), 0))
    words = [f"--{field.key.split('.')[-1]}={value}" for field, value in settings if field.key != "model.encoder"]
    words = ["train", *words, "--arch=resnet8", "--tune=last-stage", "--budget=4s", "-j0", "--resume=auto"]
    honest, steps = Step.__call__, []

    def stop(step, batch, votes):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(step, batch, votes)

    monkeypatch.setattr(Step, "__call__", stop)
    assert main(words) == 143
    monkeypatch.setattr(Step, "__call__", honest)
    assert main(words) == 0
    (run,) = Path("runs").iterdir()
    assert load_recipe(run).epochs == 7 or load_recipe(run).epochs == 8
    assert "goes on" in capsys.readouterr().out
    assert main([*words, "--lr=0.02"]) == 0
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.parametrize("tune", ["frozen", "last-stage", "head+norm"])
def test_a_stopped_run_of_a_part_ends_as_an_undisturbed_one(tune, settings, tmp_path, monkeypatch):
    """To the last bit: what is held, what is drawn again and the rates of the layers all come back; then every use of
    the run."""
    fields = {field.path[-1]: value for field, value in settings}
    recipe = load_recipe(
        "finetune", **fields, tune=tune, method="bcl", anchor=6, sampler="class-balanced", layer_decay=0.5, epochs=3,
        batch_size=6, micro_batch=3, precision="fp32", label_smoothing=0.1, workers=0, batch_norm="per-rank",
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
    start = torch.load(fields["weights"])
    Path(fields["weights"]).unlink()  # a run that goes on does not need them
    again = load_checkpoint(train(recipe, resume=tmp_path / "run", progress=False).path / "last.pt")
    assert again.step == whole.step > steps - 2
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    resting = {name for name in start if torch.equal(start[name], whole.weights[f"encoder.{name}"])}
    expected = {"frozen": set(start), "last-stage": {name for name in start if not name.startswith("blocks.2")}}
    matrices = {name for name in start if "conv" in name or name == "stem.weight"}
    assert resting == expected.get(tune, matrices), "averages too"
    another = replace(recipe, model=replace(recipe.model, tune="full"), optim=replace(recipe.optim, layer_decay=1.0))
    train(replace(another, epochs=4), tmp_path / "other", resume=tmp_path / "run", progress=False)
    for words in (["evaluate"], ["report"], ["predict"], ["export", "--to", "onnx"], ["export", "--to", "safetensors"]):
        paths = [str(tmp_path / "data" / "ant")] if words == ["predict"] else []
        assert main([words[0], str(tmp_path / "run"), *paths, *words[1:]]) == 0, words
