"""Second stages: each against its definition, as run folders of their own, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_folder, draw_picture, refusal

from equipoise import load, load_recipe, train
from equipoise.base.device import choose_device
from equipoise.base.world import World
from equipoise.cli.main import main
from equipoise.config.recipe import SECOND_STAGES
from equipoise.data.sources import open_data
from equipoise.evaluation.score import Run, evaluate_run
from equipoise.method.encoders import create_encoder
from equipoise.report.page import write_report
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training.step import Step
from equipoise.views.loader import open_recipe_batches


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("retune")


@pytest.fixture(autouse=True)
def cache(root, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))


@pytest.fixture(scope="module")
def first(root) -> Path:
    recipe = load_recipe("digits-lt", method="ce", classifier="linear", epochs=6, precision="fp32", holdout=0.2)
    return train(recipe, root / "first", progress=False).path


@pytest.fixture(scope="module")
def cosine(root) -> Path:
    recipe = load_recipe("digits-lt", method="bcl", epochs=2, precision="fp32", imbalance_factor=20)
    return train(recipe, root / "cosine", progress=False).path


def retuned(first: Path, stage: str, *words: str) -> Path:
    """The run folder of a second stage, which is kept."""
    out = first.with_name("-".join([first.name, stage, *words]))
    if not out.exists():
        assert main(["retune", str(first), "--with", stage, "--out", str(out), *words]) == 0
    return out


def features(run: Path, part: str):
    """Of the evaluation views `[N, F]`, through the network, and labels."""
    checkpoint = load_checkpoint(run / ("best.pt" if (run / "best.pt").exists() else "last.pt"))
    images = open_data(checkpoint.recipe.data).named()[part]
    network, recipe = (
        checkpoint.build(),
        replace(checkpoint.recipe, model=replace(checkpoint.recipe.model, tune="full")),
    )
    with torch.no_grad():
        batches = list(open_recipe_batches(recipe, images, choose_device("cpu"), World()).evaluation(64))
        return torch.cat([network.encode(b.images_VB3SS[0]) for b in batches]), torch.cat([b.labels_G for b in batches])


def mean_per_class(logits_NC, labels_N) -> float:
    right = logits_NC.argmax(1) == labels_N
    return torch.stack([right[labels_N == label].double().mean() for label in labels_N.unique()]).mean().item()


@pytest.mark.slow
def test_every_stage_is_a_run_of_its_own(first, capsys):
    for stage in SECOND_STAGES:
        run = retuned(first, stage)
        checkpoint = load_checkpoint(run / "last.pt")
        encoder = {key: value for key, value in checkpoint.weights.items() if key.startswith("encoder.")}
        before = load_checkpoint(first / "best.pt")
        assert all(torch.equal(value, before.weights[key]) for key, value in encoder.items())
        assert json.loads((run / "run.json").read_text())["weights"] == str(first / "best.pt")
        about = f"{stage} on {first / 'best.pt'}, after epoch {before.epoch}"
        assert load_recipe(run).summary.partition(";")[0] == about
        assert " ".join(capsys.readouterr().out.split()).count(about) == 1, "the plan says it"
        metrics = Run(run).metrics
        assert evaluate_run(run) == metrics
        export = run / "hub"
        assert main(["export", str(run), "--to", "safetensors", "--out", str(export)]) == 0
        digit = first.parent / "digit.png"
        draw_picture(digit, 0, seed=0)
        one, other = (load(target).predict([digit]) for target in (run, export))
        assert next(iter(one))[1] == next(iter(other))[1]
    assert write_report([first, retuned(first, "lws"), retuned(first, "ncm")], first / "report.html").exists()


@pytest.mark.slow
def test_a_scaled_classifier_is_exported(first):
    pytest.importorskip("onnx")
    assert main(["export", str(retuned(first, "lws")), "--to", "torch-export"]) == 0


def test_crt_is_a_frozen_run_on_balanced_draws(first, root):
    recipe = load_recipe(
        first, tune="frozen", weights=str(first), sampler="class-balanced", epochs=10, schedule="cosine",
        warmup_epochs=0,
    )  # fmt: skip
    expected = train(recipe, root / "frozen", progress=False).path
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(run / name).weights for run in (expected, retuned(first, "crt")))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_balanced_and_los_change_the_loss_alone(first):
    crt, balanced, los = (load_recipe(retuned(first, stage)) for stage in ("crt", "balanced", "los"))
    assert (balanced.method, balanced.loss.tau, balanced.data.sampler) == ("balanced-softmax", 1, "instance")
    assert (los.method, los.loss.label_smoothing, los.data.sampler) == ("ce", 0.98, "instance")
    assert (los.epochs, los.optim.lr, los.optim.schedule) == (20, 5e-4, "cosine")
    assert balanced.optim == crt.optim
    assert balanced.model == los.model == crt.model


def test_lws_leaves_directions(first, cosine):
    for run in (first, cosine):
        before, after = Run(run).model.classifier, Run(retuned(run, "lws")).model.classifier
        assert F.cosine_similarity(before.weight, after.weight).tolist() == pytest.approx([1] * 10, abs=1e-6)
        assert torch.equal(before.weight, after.of.weight)
        assert (after.scales_C - 1).abs().min() > 1e-4
        hidden = torch.rand(5, 64)
        assert torch.allclose(after(hidden), after.scales_C * before(hidden))


def test_ncm_is_a_slow_loop(first):
    (train_NF, labels_N), (test_MF, test_M) = features(first, "train"), features(first, "test")
    means = []
    for label in range(10):
        total = torch.zeros(64)
        for feature, own in zip(train_NF, labels_N, strict=True):
            if own == label:
                total += feature / feature.norm()
        means.append(total / total.norm())
    cosines = torch.stack([torch.stack([mean @ one / one.norm() for mean in means]) for one in test_MF])
    found = Run(retuned(first, "ncm"))
    assert found.metrics["test"]["top1"] == (cosines.argmax(1) == test_M).double().mean().item()
    with torch.inference_mode():
        assert torch.allclose(found.model.classifier(test_MF), 30 * cosines, atol=1e-4)


def test_tau_norm_is_what_validation_chooses(first):
    hidden_NF, labels_N = features(first, "validation")
    linear, scores = Run(first).model.classifier.requires_grad_(False), {}
    for tau in [step / 20 for step in range(21)]:
        rows = [
            [(w @ one + b) / w.norm() ** tau for w, b in zip(linear.weight, linear.bias, strict=True)]
            for one in hidden_NF
        ]
        scores[tau] = mean_per_class(torch.tensor(rows), labels_N)
    run = retuned(first, "tau-norm")
    found = float(re.search(r"; tau ([\d.]+), which validation chose", load_recipe(run).summary)[1])
    assert found == next(tau for tau in scores if scores[tau] == max(scores.values()))
    assert Run(run).metrics["validation"]["mean_per_class"] == pytest.approx(scores[found])
    assert len(set(scores.values())) > 1, "tau matters"
    after = Run(run).model.classifier.weight
    assert torch.allclose(after.norm(dim=1), linear.weight.norm(dim=1) ** (1 - found))


def test_fields_can_be_set(first):
    recipe = load_recipe(retuned(first, "crt", "--set", "optim.lr=0.5", "--set", "epochs=2"))
    assert (recipe.optim.lr, recipe.epochs) == (0.5, 2)


def test_an_interrupted_stage_goes_on(first, tmp_path, monkeypatch):
    steps, honest = [], Step.__call__

    def interrupted(*given):
        steps.append(1)
        if len(steps) == 25:
            raise KeyboardInterrupt
        return honest(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        assert main(["retune", str(first), "--with", "lws", "--out", str(tmp_path / "run")]) == 130
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    one, other = (load_checkpoint(run / "last.pt").weights for run in (tmp_path / "run", retuned(first, "lws")))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_computed_is_saved_before_anything_can_stop_it(first, tmp_path, monkeypatch):
    """What `--resume` finds without a checkpoint it would train."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("equipoise.training.session.evaluate_run", interrupted)
        assert main(["retune", str(first), "--with", "ncm", "--out", str(tmp_path / "run")]) == 130
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert Run(tmp_path / "run").metrics == Run(retuned(first, "ncm")).metrics


@pytest.mark.slow
def test_a_tuned_encoder_and_its_second_stages(tmp_path):
    """From pretrained weights; with a mean of its own, which the second stage has too."""
    data = draw_folder(tmp_path / "data", {"ant": 14, "bee": 8, "cat": 5})
    torch.save(create_encoder("resnet8", 32)[0].state_dict(), tmp_path / "weights.pth")
    recipe = load_recipe(
        "finetune", data=str(data), arch="resnet8", weights=str(tmp_path / "weights.pth"), size=32, mean="0.2 0.2 0.2",
        epochs=2, batch_size=8, holdout=0.2, precision="fp32", layer_decay=0.5, anchor=2,
    )  # fmt: skip
    first = train(recipe, tmp_path / "first", progress=False).path
    for stage in ("crt", "lws", "ncm"):
        run = Run(retuned(first, stage))
        assert run.metrics["validation"]["images"] == 6
        assert run.recipe.views.mean == (0.2, 0.2, 0.2)
        one, other = (of.model.encoder.state_dict() for of in (Run(first), run))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_refusals(first, cosine, tmp_path, capsys):
    def said(run: Path, stage: str) -> str:
        return refusal(capsys, "retune", str(run), "--with", stage, "--out", str(tmp_path / "out"))

    assert said(cosine, "tau-norm").endswith(
        "a cosine classifier, which ignores norms: train it with --classifier linear"
    )
    linear = shutil.copytree(first, tmp_path / "linear")
    table = torch.load(linear / "last.pt", weights_only=True)
    table["recipe"]["data"]["holdout"] = 0.0
    table["recipe"]["data"]["imbalance_factor"] = 30.0
    torch.save(table, linear / "last.pt")
    assert said(linear / "last.pt", "crt").startswith("the train part of digits is not what")
    assert said(retuned(first, "lws"), "lws").endswith(
        "has no linear classifier of 10 classes to be scaled: name another run"
    )
    assert said(tmp_path, "crt").startswith(f"there is no run folder or checkpoint at {tmp_path}")
    assert refusal(capsys, "train", "digits-lt", "--classifier-start", "scaled").startswith(
        "scaled is for equipoise retune"
    )
    assert not (tmp_path / "out").exists()
    capsys.readouterr()


def test_tau_needs_a_validation_part(root, tmp_path, capsys):
    recipe = load_recipe("digits-lt", method="ce", classifier="linear", epochs=1, precision="fp32")
    run = train(recipe, tmp_path / "run", progress=False).path
    said = refusal(capsys, "retune", str(run), "--with", "tau-norm", "--out", str(tmp_path / "out"))
    assert said == f"{run / 'last.pt'} has no validation part, which chooses tau: train it with --holdout 0.1"
    assert not (tmp_path / "out").exists()
