"""Checkpoints and images become metrics: validation fits and chooses, the test part never does."""

import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import ODD_NAMES, draw_colour

from equipoise import UserError, load_checkpoint, load_recipe
from equipoise.config.recipe import find_field
from equipoise.evaluation.metrics import fit_temperature, score
from equipoise.evaluation.predictions import predict
from equipoise.evaluation.score import Run, chosen, evaluate_checkpoint, evaluate_run, score_checkpoint
from equipoise.method.losses import log_prior
from equipoise.runs.checkpoint import Checkpoint, create_network, state_on_cpu
from equipoise.views.loader import Batch

COUNTS = (120, 40, 9)


class Images:
    """Random images in batches, with labels that follow `shares`."""

    def __init__(self, number: int, shares: tuple[float, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8, generator=generator)
        self.labels = torch.multinomial(torch.tensor(shares), number, replacement=True, generator=generator)

    def evaluation(self, _: int) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(50), self.labels.split(50), strict=True):
            yield Batch(images[None], labels, slice(0, len(labels)))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Plain cross-entropy, so that the logits have the training prior."""
    torch.manual_seed(0)
    recipe = load_recipe("digits-lt", method="ce", encoder="resnet8")
    weights = state_on_cpu(create_network(recipe, 3, start=False))
    return Checkpoint(recipe, ("a", "b", "c"), COUNTS, 3, 30, None, weights, {"state": {}, "param_groups": []}, {})


PARTS = {"validation": Images(120, (0.5, 0.3, 0.2), 1), "test": Images(90, (1.0, 1.0, 1.0), 2)}


def test_validation_fits_the_temperature_and_chooses_tau(checkpoint):
    """Whatever the order in which the parts are given. Against the raw logits of the two parts."""
    metrics, observed = score_checkpoint(checkpoint, checkpoint.build(), PARTS)
    again, _ = score_checkpoint(checkpoint, checkpoint.build(), dict(reversed(PARTS.items())))
    assert metrics == again
    prior_C = log_prior(torch.tensor(COUNTS)).float()
    raw = {part: predict(checkpoint.build(), images, prior_C, keep_logits=True) for part, images in PARTS.items()}
    shares_C = np.bincount(raw["validation"].labels_N) / 120
    temperature = fit_temperature(
        raw["validation"].logits_NC, raw["validation"].labels_N, np.log(shares_C) - prior_C.numpy()
    )
    assert metrics["temperature"] == pytest.approx(temperature)
    for part, predictions in raw.items():
        scores_NC = predictions.logits_NC.astype(np.float64) / temperature
        confidence_N = (np.exp(scores_NC) / np.exp(scores_NC).sum(1, keepdims=True)).max(1)
        assert observed[f"{part}/calibrated_N"] == pytest.approx(confidence_N, abs=1e-5)
        assert metrics[part]["prior_sweep"] == score(predictions, COUNTS, 3)["prior_sweep"]
        chances_NC = np.exp(predictions.logits_NC) / np.exp(predictions.logits_NC).sum(1, keepdims=True)
        for group, label in zip(("many", "medium", "few"), range(3), strict=True):
            nll = -np.log(chances_NC[predictions.labels_N == label, label]).mean()
            assert metrics[part]["calibration"][group]["nll"] == pytest.approx(nll, rel=1e-5)
    rows = metrics["validation"]["prior_sweep"]
    post_hoc = metrics["post_hoc"]
    assert post_hoc["validation"]["mean_per_class"] == max(row["mean_per_class"] for row in rows)
    assert post_hoc["test"] == next(row for row in metrics["test"]["prior_sweep"] if row["tau"] == post_hoc["tau"])


def test_without_validation_nothing_is_fitted_or_chosen(checkpoint):
    metrics, observed = score_checkpoint(checkpoint, checkpoint.build(), {"test": PARTS["test"]})
    assert (metrics["validation"], metrics["temperature"], metrics["post_hoc"]) == (None, None, None)
    assert metrics["test"]["images"] == 90
    assert "test/calibrated_N" not in observed
    metrics, _ = score_checkpoint(checkpoint, checkpoint.build(), {"validation": PARTS["validation"]})
    assert metrics["test"] is None
    assert "test" not in metrics["post_hoc"]


# ---- a whole run


@pytest.fixture
def run(odd_run, tmp_path):
    return shutil.copytree(odd_run, tmp_path / "run")


@pytest.mark.slow
def test_a_run_is_scored_and_its_best_checkpoint_is_drawn(run):
    metrics = evaluate_run(run, device="cpu")
    assert metrics == json.loads((run / "metrics.json").read_text()) == Run(run).metrics
    assert metrics["test"] == metrics["best"]["test"] != metrics["last"]["test"]
    assert chosen(metrics) == ("best", "test")
    of_best, of_model = load_checkpoint(run / "best.pt").build().state_dict(), Run(run).model.state_dict()
    assert all(torch.equal(of_best[name], value) for name, value in of_model.items())
    _, predictions = evaluate_checkpoint(run / "best.pt")
    with np.load(run / "observed.npz") as observed:
        assert (observed["test/predicted_N"] == predictions.ranked_NK[:, 0]).all()
        assert observed["test/confidence_N"] == pytest.approx(predictions.confidence_N)


@pytest.mark.slow
def test_a_best_checkpoint_that_is_damaged_is_refused_and_one_that_is_missing_told(run, capsys):
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"{run}/best.pt is no checkpoint that can be read"):
        evaluate_run(run, device="cpu")
    whole = Run(run).metrics
    (run / "best.pt").unlink()
    metrics = evaluate_run(run, device="cpu")
    assert (metrics["best"], metrics["last"]) == (None, whole["last"])
    assert chosen(metrics) == ("last", "test")
    assert "best.pt, which validation chose, is missing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_scored_on_the_data_that_it_was_trained_with(run, odd_run, tmp_path):
    data = shutil.copytree(odd_run.parent / "data", tmp_path / "data")
    moved = [(find_field("data"), str(data))]
    assert evaluate_run(run, device="cpu", overrides=moved) == Run(odd_run).metrics
    draw_colour(data / "train" / ODD_NAMES[0] / "more.png", 0, 1)
    with pytest.raises(UserError, match=r"the train part of .* is not what .* was trained with .*; restore it, or"):
        evaluate_run(run, device="cpu", overrides=moved)


@pytest.mark.slow
def test_one_checkpoint_on_a_part_of_other_data(odd_run, tmp_path):
    """Classes are matched by name; one of them has no images here."""
    for number in range(4):
        draw_colour(tmp_path / "other" / ODD_NAMES[2] / f"{number}.png", 2, number)
        draw_colour(tmp_path / "other" / ODD_NAMES[0] / f"{number}.png", 0, number)
    table, predictions = evaluate_checkpoint(odd_run / "best.pt", str(tmp_path / "other"), keep_logits=True)
    assert table["split"] == "test"
    assert table["class_names"] == list(load_checkpoint(odd_run / "best.pt").class_names)
    assert table["test"]["per_class"].count(None) == 1
    assert predictions.logits_NC.shape == (8, 3)
    assert table["note"] == ""
    for part in ("train", "val"):  # no test part
        shutil.copytree(odd_run.parent / "data" / "val", tmp_path / "parts" / part)
    assert evaluate_checkpoint(odd_run / "best.pt", str(tmp_path / "parts"))[0]["split"] == "validation"
    validation, _ = evaluate_checkpoint(odd_run / "last.pt", split="validation")
    assert validation["validation"] == Run(odd_run).metrics["last"]["validation"]


@pytest.mark.slow
def test_images_trained_on_are_said_to_be_those(odd_run, tmp_path):
    moved = shutil.copytree(odd_run.parent / "data" / "train", tmp_path / "moved")
    table, _ = evaluate_checkpoint(odd_run / "last.pt", str(moved))
    assert table["note"].startswith(f"{moved} holds the images that {odd_run}/last.pt was trained on")


@pytest.mark.slow
def test_what_cannot_be_scored(odd_run):
    last = odd_run / "last.pt"
    with pytest.raises(UserError, match=r"has model.encoder = resnet8; change it back"):
        evaluate_checkpoint(last, overrides=[(find_field("encoder"), "resnet20")])
    with pytest.raises(UserError, match="has no night part; it has train, validation, test"):
        evaluate_checkpoint(last, split="night")
    with pytest.raises(UserError, match="there is no checkpoint at"):
        evaluate_run(odd_run / "none")
