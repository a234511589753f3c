"""Images of no class: the likeness, its threshold and its figures by hand; then from training to every way of use."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image
from synthetic import untrained

from equipoise import UserError, load, load_recipe, train
from equipoise.base.world import ALONE
from equipoise.cli.main import main
from equipoise.data.folders import open_class_folders
from equipoise.deploy.export import export_file
from equipoise.deploy.hub import write_hub_folder
from equipoise.deploy.predict import as_csv
from equipoise.evaluation.features import nearest
from equipoise.evaluation.none_of_these import (
    KnownClasses,
    choose_threshold,
    know_classes,
    read_known,
    tell_apart,
    write_known,
)
from equipoise.evaluation.score import evaluate_checkpoint
from equipoise.method.encoders import create_encoder
from equipoise.views.loader import open_batches
from equipoise.views.views import view_settings


def test_likeness_is_the_highest_cosine_with_a_mean():
    random = torch.Generator().manual_seed(0)
    means_CF, hidden_BF = torch.randn(3, 5, generator=random), torch.randn(4, 5, generator=random)
    by_hand = [max(float(h @ m / h.norm() / m.norm()) for m in means_CF) for h in hidden_BF]
    assert KnownClasses(torch.nn.functional.normalize(means_CF, dim=1))(hidden_BF).tolist() == pytest.approx(
        by_hand, abs=1e-6
    )


def test_figures_of_a_small_case():
    labels_N, of_N = np.array([0, 0, 0, 1]), np.array([0.9, 0.8, 0.4, 0.7], np.float32)
    of_S = np.array([0.6, 0.3, 0.1], np.float32)
    told = tell_apart(labels_N, of_N, of_S, 0.5)
    assert told["auroc"] == pytest.approx(11 / 12), "of twelve pairs one is the wrong way round"
    assert told["fpr95"] == pytest.approx(1 / 3), "those above the lowest of four"
    assert told["kept"] == pytest.approx((2 / 3 + 1) / 2), "each class counts alike"
    assert (told["images"], told["refused"]) == (3, pytest.approx(2 / 3))


@pytest.fixture
def world_of_pictures(tmp_path, monkeypatch):
    """A folder of class folders and a validation part, and a network that knows nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part, counts in (("train", {"ant": 14, "bee": 8, "cat": 5}), ("val", {"ant": 37, "bee": 19, "cat": 3})):
        draw_folder(tmp_path / "data" / part, counts)
    return tmp_path / "data"


def test_means_and_threshold_by_a_slow_loop(world_of_pictures):
    checkpoint = untrained((14, 8, 5), size=32, precision="fp32")
    network, found = checkpoint.build(), open_class_folders(world_of_pictures)
    settings, cpu = view_settings(checkpoint.recipe), torch.device("cpu")
    training, validation = (open_batches(found.parts[part], settings, cpu) for part in ("train", "validation"))
    _, means_CF = nearest(network.eval(), training, torch.empty(0, network.width), 0)
    sums_CF = torch.zeros(3, network.width, dtype=torch.float64)
    units = {part: list[tuple[int, torch.Tensor]]() for part in ("train", "validation")}
    with torch.inference_mode():
        for part, batches in (("train", training), ("validation", validation)):
            for batch in batches.evaluation(1):
                hidden_F = network.encode(batch.images_VB3SS[0])[0].double()
                units[part].append((int(batch.labels_G), hidden_F / hidden_F.norm()))
    for label, unit_F in units["train"]:
        sums_CF[label] += unit_F
    assert torch.allclose(means_CF, sums_CF / sums_CF.norm(dim=1, keepdim=True), atol=1e-6)

    known = know_classes(means_CF, network, validation, ALONE)
    assert known is not None
    likeness = [(max(float(unit_F @ mean_F) for mean_F in means_CF), label) for label, unit_F in units["validation"]]
    weights = [1 / 37, 1 / 20, 1 / 20]  # of an image; the classes of 19 and 3 images count less than that of 37
    total = 1 + 19 / 20 + 3 / 20 + 1 / 20  # and that of one further image, which is refused
    refused = sum(weights[label] for value, label in likeness if value < known.threshold - 1e-6) + 1 / 20
    also = sum(weights[label] for value, label in likeness if value < known.threshold + 1e-6) + 1 / 20
    assert refused / total <= 0.05 < also / total, "the highest threshold that keeps 95 %"


def test_fewer_images_than_can_promise_it_choose_nothing():
    rng = np.random.default_rng(0)
    for images in range(1, 70):
        likeness_N = rng.random(images, np.float32)
        chosen = choose_threshold(np.zeros(images, np.int64), likeness_N)
        if images < 19:
            assert chosen is None
        else:  # the order statistic of split conformal prediction; of fewer than 20 images a class counts less
            assert chosen == np.sort(likeness_N)[int(0.05 * (images + 1) + 1e-9) - 1]


def test_of_further_images_95_percent_are_kept():
    """The mean over many validation parts, however small: at least 95 %, and not all."""
    rng = np.random.default_rng(0)
    for images in 19, 30, 100:
        chosen = [choose_threshold(np.zeros(images, np.int64), rng.random(images, np.float32)) for _ in range(4000)]
        kept = 1 - np.mean(chosen)  # likenesses are uniform
        assert 0.948 < kept < 0.972


def test_one_image_of_a_rare_class_does_not_set_the_threshold():
    labels_N = np.repeat(np.arange(10), [*[20] * 9, 1])
    likeness_N = np.where(labels_N == 9, 0.05, 0.9 + 0.0001 * np.arange(181)).astype(np.float32)
    chosen = choose_threshold(labels_N, likeness_N)
    assert chosen is not None
    assert chosen > 0.9


def test_of_another_step_nothing_is_known(tmp_path):
    known = KnownClasses(torch.eye(3), 0.25)
    write_known(tmp_path / "best.pt", known, step=7)
    read = read_known(tmp_path / "best.pt", 7)
    assert read is not None
    assert torch.equal(read.means_CF, known.means_CF)
    assert read.threshold == 0.25
    assert read_known(tmp_path / "best.pt", 8) is None
    assert read_known(tmp_path / "other.pt", 7) is None, "it may have as many steps"
    assert read_known(tmp_path / "elsewhere" / "best.pt", 7) is None
    (tmp_path / "known-classes.npz").write_bytes(b"damaged")
    assert read_known(tmp_path / "best.pt", 7) is None


@pytest.mark.parametrize("tune", ["frozen", "scratch"])
def test_from_training_to_every_use(tune, world_of_pictures, tmp_path, capsys):
    recipe = load_recipe(
        "pictures", data=str(world_of_pictures), tune=tune, arch="resnet8", size=32, epochs=2, batch_size=8,
        precision="fp32", weights=_weights(tmp_path) if tune == "frozen" else "",
    )  # fmt: skip
    train(recipe, tmp_path / "run", progress=False)
    there = (tmp_path / "run" / "known-classes.npz").exists()
    assert there == (tune == "frozen"), "a pass over the training images that only a frozen encoder has for nothing"
    strange = tmp_path / "strange"
    strange.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(strange / f"{index}.png")
    (strange / "notes.txt").write_text("no picture")
    (strange / "broken.png").write_bytes((strange / "0.png").read_bytes()[:60])
    assert main(["evaluate", str(tmp_path / "run"), "--none-of-these", str(strange)]) == 0
    shown = capsys.readouterr().out
    written = json.loads(next((tmp_path / "run").glob("metrics-*.json")).read_text())["none_of_these"]
    assert (written["images"], written["passed_over"]) == (6, 2)
    assert 0 <= written["auroc"] <= 1
    assert f"{100 * written['auroc']:.1f}" in shown
    assert "none of these" in shown

    for number in range(6):
        (strange / f"{number}.png").rename(tmp_path / f"{number}.png")
    assert main(["evaluate", str(tmp_path / "run"), "--none-of-these", str(strange)]) == 2
    assert "none of the images to compare can be read" in capsys.readouterr().err
    for number in range(6):
        (tmp_path / f"{number}.png").rename(strange / f"{number}.png")

    classifier = load(tmp_path / "run")
    known = classifier.known
    assert known is not None
    assert known.threshold == pytest.approx(written["threshold"])
    predicted = classifier.predict(strange)
    assert np.mean(predicted.strange) == pytest.approx(written["refused"])
    rows = list(csv.DictReader(io.StringIO(as_csv(predicted).decode())))
    assert [bool(int(row["none_of_these"])) for row in rows] == list(predicted.strange)
    write_hub_folder(tmp_path / "hub", classifier.checkpoint, None, None, known)
    assert load(tmp_path / "hub").predict(strange).strange == predicted.strange

    onnxruntime = pytest.importorskip("onnxruntime")
    export_file(classifier, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    threshold = float(session.get_modelmeta().custom_metadata_map["likeness_threshold"])
    views = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    (likeness_B,) = session.run(["likenesses"], {"images": views.numpy()})
    with torch.inference_mode():
        assert likeness_B == pytest.approx(known(classifier.model.encode(views)).numpy(), abs=1e-4)
    assert threshold == pytest.approx(known.threshold)


def test_without_validation_or_pictures_one_line_says_so(world_of_pictures, tmp_path):
    recipe = load_recipe("pictures", data=str(world_of_pictures / "train"), arch="resnet8", size=32, epochs=1,
                         batch_size=8, precision="fp32", tune="scratch", holdout=0.0)  # fmt: skip
    train(recipe, tmp_path / "run", progress=False)
    where = tmp_path / "run" / "last.pt"
    with pytest.raises(UserError, match="no validation part"):
        evaluate_checkpoint(where, str(world_of_pictures), "validation", strangers=str(world_of_pictures))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder with images"):
        evaluate_checkpoint(where, str(world_of_pictures), "validation", strangers=str(tmp_path / "empty"))


def _weights(folder):
    torch.manual_seed(0)
    torch.save(create_encoder("resnet8", 32)[0].state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")
