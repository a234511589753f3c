"""Training runs: what they leave, that they repeat, and what stops them."""

import json
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import equipoise
from equipoise import UserError, load_recipe, training
from equipoise.checkpoint import load_checkpoint
from equipoise.lists import open_parts
from equipoise.log import read_lines
from equipoise.losses import log_prior, logit_adjusted_cross_entropy, supervised_contrastive_loss
from equipoise.model import Outputs
from equipoise.training import NonFiniteLossError, loss_terms, prepare, train

QUICK = {"epochs": 2, "warmup_epochs": 0, "log_every": 4, "device": "cpu"}


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
    assert names == {"recipe.toml", "run.json", "metrics.jsonl", "tensorboard", "last.pt", "metrics.json"}

    record = json.loads((run.path / "run.json").read_text())
    assert record["class_counts"] == dict(zip("0123456789", [124, 80, 51, 33, 21, 14, 9, 5, 3, 2], strict=True))
    assert record["data"]["images"] == {"train": 342, "test": 500}
    assert record["versions"]["torch"] == metadata.version("torch")
    assert {"command", "machine", "git", "precision", "started"} <= record.keys()

    lines = read_lines(run.path / "metrics.jsonl")
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
    scores = [line["mean_per_class"] for line in read_lines(run.path / "metrics.jsonl") if line["kind"] == "validation"]
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
        terms, loss = loss_terms(replace(recipe, method=method), counts, torch.device("cpu"))(made, labels)
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
    honest, calls = getattr(training, function), []

    def turns_bad(*arguments):
        calls.append(1)
        return honest(*arguments) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(training, function, turns_bad)
    with pytest.raises(NonFiniteLossError) as error:
        train(load_recipe("digits-lt", **QUICK, lr=0.25), tmp_path / "run", progress=False)
    assert str(error.value).startswith(f"step 3 (epoch 1): the loss term '{spoilt}' is inf")
    assert "Lower the learning rate (now 0.1875)" in str(error.value)
    assert len(steps) == 2
    assert (tmp_path / "run" / "metrics.jsonl").is_file(), "the evidence stays"


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


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty; name another folder with --out"):
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
    with pytest.raises(UserError, match=r"ant/5.png cannot be read \(it is no image\)"):
        prepare(small_pictures_recipe(pictures), tmp_path / "out")


def test_the_plan_says_what_will_happen(pictures, tmp_path):
    plan = prepare(small_pictures_recipe(pictures, holdout=0.2, precision="fp32"), tmp_path / "run")
    said = plan.describe()
    assert said["images"] == "17 to train on, 4 for validation"
    assert said["classes"] == "3, from 10 images (ant) to 2 (cat): imbalance factor 5"
    assert said["steps"] == "2 epochs of 4: 8 steps of 4 images"
    assert said["device"] == "cpu, fp32"
    assert said["run folder"] == str(tmp_path / "run")
    assert plan.recipe.data.path == str(pictures.resolve())
