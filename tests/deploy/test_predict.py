"""Classes and probabilities: against Bayes' rule, against `evaluate`, and of files that cannot be read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ODD_NAMES, draw_picture
from PIL import Image
from synthetic import untrained
from torch import nn

import equipoise
from benchmarks.rehearsal import write_as_authors
from equipoise import UserError, load
from equipoise.deploy.hub import write_hub_folder
from equipoise.deploy.predict import CalibratedNetwork, Classifier
from equipoise.evaluation.metrics import fit_temperature
from equipoise.evaluation.score import evaluate_checkpoint, evaluate_run
from equipoise.evaluation.shift import read_weights
from equipoise.method.losses import logit_adjusted_cross_entropy

# ---- what the probabilities mean

MEANS_C3 = torch.tensor([[90.0, 120, 128], [128, 110, 120], [150, 140, 110]])
SPREAD = 25.0
COUNTS = (700, 250, 50)
PRIOR = torch.tensor(COUNTS).double() / sum(COUNTS)


def log_densities(x_N3: torch.Tensor) -> torch.Tensor:
    """`[N, C]` log p(x|y) of three Gaussians in the space of colours, up to a constant."""
    return -((x_N3.double()[:, None] - MEANS_C3) ** 2).sum(2) / (2 * SPREAD**2)


def bayes(x_N3: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    joint = log_densities(x_N3).exp() * prior
    return joint / joint.sum(1, keepdim=True)


class PerfectNetwork(nn.Module):
    """What training with logit adjustment of strength tau on those Gaussians converges to, `heat` times too sure."""

    def __init__(self, tau: float, heat: float) -> None:
        super().__init__()
        self.tau, self.heat = tau, heat

    def forward(self, images_B3SS):
        x_B3 = images_B3SS.double().mean((2, 3))
        return (self.heat * (log_densities(x_B3) + (1 - self.tau) * PRIOR.log() + x_B3.sum(1, keepdim=True))).float()


@pytest.mark.parametrize(("method", "tau"), [("bcl", 1.0), ("ce", 1.0), ("logit-adjusted", 0.5), ("supcon+la", 1.5)])
@pytest.mark.parametrize("heat", [1.0, 3.0])
def test_predict_gives_the_posterior_of_bayes_rule(method, tau, heat, tmp_path):
    """Pictures of one colour each, drawn from Gaussians; every prior, from files to probabilities."""
    generator = np.random.default_rng(0)
    colours = generator.normal(MEANS_C3.numpy()[generator.integers(0, 3, 150)], SPREAD).clip(0, 255).astype(np.uint8)
    for number, colour in enumerate(colours):
        Image.new("RGB", (30, 20), tuple(colour.tolist())).save(tmp_path / f"{number:03}.png")
    adjusted = 0.0 if method == "ce" else tau  # plain cross-entropy takes no tau, whatever the recipe says
    checkpoint = untrained(COUNTS, method=method, tau=tau)
    model = PerfectNetwork(adjusted, heat)
    classifier = Classifier(Path("x"), checkpoint, model, heat, None, torch.device("cpu"))  # type: ignore[arg-type]
    x_N3 = torch.from_numpy(colours)
    other = torch.tensor([0.1, 0.0, 0.9])
    of_other = {"class 2": 9, "class 0": 1, "class 1": 0}
    for prior, expected in (("uniform", torch.ones(3)), ("train", PRIOR), (of_other, other)):
        predicted = classifier.predict(tmp_path, prior=prior)
        found = np.zeros((150, 3))
        np.put_along_axis(found, predicted.ranked_NK, predicted.probability_NK, axis=1)
        assert np.abs(found - bayes(x_N3, expected).numpy()).max() < 2e-3, prior  # float32 of logits near 1,000
        assert (np.diff(predicted.probability_NK, axis=1) <= 0).all()


def test_the_prior_is_estimated_from_the_pictures(tmp_path):
    """Drawn from the rare classes mostly; what is predicted is what that prior, given as weights, would give."""
    generator = np.random.default_rng(0)
    shares = np.array([0.1, 0.3, 0.6])
    labels = np.repeat(np.arange(3), (40, 120, 240))
    for number, colour in enumerate(generator.normal(MEANS_C3.numpy()[labels], SPREAD).clip(0, 255).astype(np.uint8)):
        Image.new("RGB", (3, 2), tuple(colour.tolist())).save(tmp_path / f"{number:03}.png")
    model = PerfectNetwork(0.0, 3.0)
    classifier = Classifier(Path("x"), untrained(COUNTS, method="ce"), model, 3.0, None, torch.device("cpu"))  # type: ignore[arg-type]
    predicted = classifier.predict(tmp_path, top=2, prior="estimate")
    estimated = predicted.estimated
    assert list(estimated) == ["class 0", "class 1", "class 2"]
    assert list(estimated.values()) == pytest.approx(shares, abs=0.06)
    expected = classifier.predict(tmp_path, top=2, prior=estimated)
    assert expected.estimated == {}
    assert predicted.ranked_NK.tolist() == expected.ranked_NK.tolist()
    assert predicted.probability_NK == pytest.approx(expected.probability_NK)
    assert len(classifier.predict([], prior="estimate")) == 0


@pytest.mark.parametrize(("method", "tau"), [("ce", 1.0), ("logit-adjusted", 1.0), ("logit-adjusted", 0.5)])
def test_trained_networks_give_the_posterior_of_bayes_rule(method, tau):
    """Nothing assumed of the logits: a linear network trained on draws, by the losses that training uses."""
    torch.manual_seed(0)
    labels_N = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS) * 20)
    x_N3 = MEANS_C3[labels_N] + SPREAD * torch.randn(len(labels_N), 3)
    network = nn.Sequential(Scaled(), nn.Linear(3, 3))
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        strength = 0.0 if method == "ce" else tau
        value = logit_adjusted_cross_entropy(network(x_N3), labels_N, PRIOR.log(), strength)
        value.backward()
        return value

    optimizer.step(loss)
    calibrated = CalibratedNetwork(network, 1.0, untrained(COUNTS, method=method, tau=tau).log_prior_of_logits())
    fresh_N3 = MEANS_C3[torch.arange(600) % 3] + SPREAD * torch.randn(600, 3)
    for prior in (torch.ones(3), PRIOR, torch.tensor([0.1, 0.2, 0.7])):
        found = (calibrated(fresh_N3).double() + prior.log()).softmax(1)
        assert (found - bayes(fresh_N3, prior)).abs().max() < 0.08, prior
    unadjusted = network(fresh_N3).double().softmax(1)
    if method == "ce":
        assert (unadjusted - bayes(fresh_N3, torch.ones(3))).abs().max() > 0.3, "the training prior is in there"


class Scaled(nn.Module):
    def forward(self, x_N3):
        return (x_N3 - 128) / 64


# ---- against evaluate


def logits_of(run: Path, part: str) -> np.ndarray:
    predictions = evaluate_checkpoint(run, None, part, keep_logits=True)[1]
    assert predictions.logits_NC is not None
    return predictions.logits_NC.astype(np.float64)


def softmax(scores_NC: np.ndarray) -> np.ndarray:
    shares_NC = np.exp(scores_NC - scores_NC.max(1, keepdims=True))
    return shares_NC / shares_NC.sum(1, keepdims=True)


def test_labels_and_probabilities_are_those_of_evaluate(odd_run):
    """The best checkpoint's, calibrated by its own temperature."""
    metrics = json.loads((odd_run / "metrics.json").read_text())
    temperature = metrics["best"]["temperature"]
    logits_NC = logits_of(odd_run / "best.pt", "test")
    classifier = load(odd_run)
    assert classifier.temperature == temperature
    assert classifier.origin == odd_run / "best.pt"
    predicted = classifier.predict(odd_run.parent / "data" / "test")
    assert len(predicted) == len(logits_NC) == 18
    assert predicted.ranked_NK[:, 0].tolist() == logits_NC.argmax(1).tolist()
    expected_NC = softmax(logits_NC / (temperature or 1.0))
    assert predicted.probability_NK == pytest.approx(-np.sort(-expected_NC, axis=1), abs=1e-5)
    assert load(odd_run / "last.pt").temperature == metrics["last"]["temperature"]


def test_small_images_are_seen_as_evaluate_sees_them(tmp_path):
    """Policy `cifar`: resized to the size, whatever the shape; and plain cross-entropy under its training prior."""
    for label in range(2):
        for number in range(6):
            draw_picture(tmp_path / "data" / f"class {label}" / f"{number}.png", label, number, size=(40, 30))
    untrained((4, 2), method="ce", policy="cifar", data=str(tmp_path / "data")).save(tmp_path / "last.pt")
    _, predictions = evaluate_checkpoint(tmp_path / "last.pt", str(tmp_path / "data"), "test", keep_logits=True)
    classifier = load(tmp_path)
    assert classifier.temperature is None
    for prior, log_prior_C in (("train", np.zeros(2)), ("uniform", np.log([4 / 6, 2 / 6]))):
        expected_NC = softmax(predictions.logits_NC.astype(np.float64) - log_prior_C)
        found_NC = classifier.predict(tmp_path / "data", prior=prior).probability_NK
        assert found_NC == pytest.approx(-np.sort(-expected_NC, axis=1), abs=1e-6)


@pytest.mark.parametrize("method", ["bcl", "ce"])
def test_the_temperature_is_fitted_under_the_validation_parts_own_prior(method, odd_run, tmp_path):
    """The logits of `ce` have the training prior in them, those of `bcl` do not."""
    run = shutil.copytree(odd_run, tmp_path / "run")
    (run / "best.pt").unlink()
    checkpoint = equipoise.load_checkpoint(run / "last.pt")
    kept = ("encoder", "classifier", "projection", "prototype_projection") if method == "bcl" else ("encoder", "class")
    weights = {name: value for name, value in checkpoint.weights.items() if name.startswith(kept)}
    recipe = replace(checkpoint.recipe, method=method)
    replace(checkpoint, recipe=recipe, weights=weights, best=None).save(run / "last.pt")
    found = evaluate_run(run, device="cpu")["last"]["temperature"]
    shares_C, train_C = np.array([9, 6, 5]) / 20, np.array([30, 12, 5]) / 47
    shift_C = np.log(shares_C) - (np.log(train_C) if method == "ce" else 0)
    labels_N = np.repeat(np.arange(3), (9, 6, 5))
    expected = fit_temperature(logits_of(run / "last.pt", "validation").astype(np.float32), labels_N, shift_C)
    assert found == pytest.approx(expected, rel=1e-5)
    assert load(run).temperature == found


# ---- what can be loaded


def test_what_can_be_loaded(odd_run, tmp_path):
    """A run, checkpoints, an exported folder; the same classes, whichever is asked."""
    test = odd_run.parent / "data" / "test"
    expected = load(odd_run).predict(test)
    write_hub_folder(tmp_path / "hub", load(odd_run).checkpoint, load(odd_run).temperature, None)
    for target in (odd_run / "best.pt", tmp_path / "hub"):
        found = load(target, device="cpu").predict(test)
        assert found.class_names == ODD_NAMES
        assert np.array_equal(found.probability_NK, expected.probability_NK), target
        assert np.array_equal(found.ranked_NK, expected.ranked_NK)


def test_metrics_of_another_step_are_not_used(odd_run, tmp_path):
    """As while a resumed run is being trained: its metrics.json is the old one."""
    run = shutil.copytree(odd_run, tmp_path / "run")
    (run / "best.pt").unlink()
    metrics = json.loads((run / "metrics.json").read_text())
    for late, expected in ((0, 1.5), (1, None)):
        metrics["last"] |= {"temperature": 1.5, "step": metrics["last"]["step"] - late}
        (run / "metrics.json").write_text(json.dumps(metrics))
        assert (load(run).origin, load(run).temperature) == (run / "last.pt", expected)


def test_a_checkpoint_of_the_authors(tmp_path):
    """Classes are numbers, and no training prior is known; nor is what it was trained on, which has its own mean."""
    draw_picture(tmp_path / "x.png", 0, 0)
    file = write_as_authors(untrained((1, 1, 1, 1)), tmp_path / "theirs.pth.tar")
    for recipe, mean in (({}, (0.485, 0.456, 0.406)), ({"recipe": "inat2018"}, (0.466, 0.471, 0.380))):
        classifier = load(file, **recipe)
        assert classifier.checkpoint.recipe.views.mean == mean
        assert all(name.isdecimal() for _, ranked in classifier.predict(tmp_path / "x.png") for name, _ in ranked)
        with pytest.raises(UserError, match="has no counts of its training images"):
            classifier.predict(tmp_path / "x.png", prior="train")


def test_bad_files_are_passed_over_and_the_order_stays(odd_run, tmp_path):
    """More than three batches, bad ones among them; each file alone gives the same."""
    for number in range(230):
        draw_picture(tmp_path / "many" / f"{number:03}.png", number % 3, number, size=(30 + number % 7, 26))
    for number in (0, 70, 229):
        (tmp_path / "many" / f"{number:03}.png").write_bytes(b"broken")
    (tmp_path / "many" / "notes.txt").write_text("no picture")
    draw_picture(tmp_path / "many" / ".thumbnails" / "001.png", 0, 0)
    (tmp_path / "empty").mkdir()
    classifier = load(odd_run)
    told = []
    predicted = classifier.predict(
        [tmp_path / "many", tmp_path / "absent.jpg", tmp_path / "empty"], progress=lambda *counts: told.append(counts)
    )
    good = [f"{number:03}.png" for number in range(230) if number not in (0, 70, 229)]
    assert [Path(file).name for file in predicted.files] == good
    assert told == [*((count, 231) for count in range(32, 225, 32)), (231, 231)]
    bad = ("absent.jpg", "empty", "many/000.png", "many/070.png", "many/229.png", "many/notes.txt")
    assert sorted(str(error).partition(" ")[0] for error in predicted.errors) == [str(tmp_path / name) for name in bad]
    said = "\n".join(map(str, predicted.errors))
    assert "000.png cannot be read (it is no image: not JPEG, PNG, GIF, BMP, TIFF, WEBP, PPM" in said
    assert f"{tmp_path}/many/notes.txt is no image that can be read (.txt, no image)" in said
    for index in (0, 62, 63, 64, 140, 226):
        alone = classifier.predict(predicted.files[index])
        assert alone.ranked_NK[0].tolist() == predicted.ranked_NK[index].tolist()
        assert alone.probability_NK[0] == pytest.approx(predicted.probability_NK[index], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", '\ufeffclass,weight\n"a, ""quoted""",3.5\n\n<b>x & y<,1\n"two\nlines|",0\n'),
        ("p.CSV", '"a, ""quoted""",3.5\r\n<b>x & y<,1\r\n"two\nlines|",0'),
    ],
)
def test_a_prior_from_a_file(name, content, odd_run, tmp_path):
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert read_weights(file) == {ODD_NAMES[0]: 1, ODD_NAMES[1]: 3.5, ODD_NAMES[2]: 0}
    test = odd_run.parent / "data" / "test"
    classifier = load(odd_run)
    for (_, before), (_, after) in zip(classifier.predict(test), classifier.predict(test, prior=file), strict=True):
        assert after[2] == (ODD_NAMES[2], 0)
        ratios = [shares[ODD_NAMES[1]] / shares[ODD_NAMES[0]] for shares in (dict(before), dict(after))]
        assert ratios[1] == pytest.approx(3.5 * ratios[0], rel=1e-6)


@pytest.mark.parametrize("weights", [(1e308, 1e308, 1e308), (3, 1e300, 1e308), (1e-320, 1e-320, 0)])
def test_priors_of_any_scale(weights, odd_run, tmp_path):
    draw_picture(tmp_path / "x.png", 0, 0)
    predicted = load(odd_run).predict(tmp_path / "x.png", prior=dict(zip(ODD_NAMES, weights, strict=True)))
    assert predicted.probability_NK.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.csv", None, "(no such file or directory)"),
        ("p.csv", b"\xff\xfe", "a CSV file of classes and their weights"),
        ("p.csv", b"class 0,1\nclass 1,x", "(could not convert string to float: 'x')"),
        ("p.csv", b"class 0,1,2", "a CSV file of classes and their weights"),
        ("p.csv", b"class 0,1\nclass 0,2", "p.csv names a class twice"),
        ("p.csv", b"class 0,1\nclass 1,1\nclass 2,1\nclas 2,1", "and no other: 'clas 2' is no class of the model"),
        (
            "p.csv",
            b"class 1,1\nclass 2,1",
            "must weigh all classes, and no other: 'class 0' has no weight",
        ),
        ("p.csv", b"class 0,0\nclass 1,0\nclass 2,0", "a finite number, 0 or more, and one at"),
        ("p.csv", b"class 0,1\nclass 1,-1\nclass 2,1", "a finite number"),
        ("p.csv", b"class 0,1\nclass 1,1\nclass 2,1e999", "a finite number"),
    ],
)
def test_priors_that_do_not_fit(name, content, sentence, tmp_path):
    untrained().save(tmp_path / "last.pt")
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load(tmp_path).predict([], prior=file)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
