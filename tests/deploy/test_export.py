"""Exported files against the model, in environments without it."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ODD_NAMES, draw_picture

from equipoise import UserError, load, load_recipe
from equipoise.deploy.export import NOTES, check, checking_views, export_onnx, export_torch
from equipoise.deploy.hub import write_hub_folder
from equipoise.runs.checkpoint import Checkpoint, create_network, state_on_cpu

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
NO_MOMENTUM = {"state": {}, "param_groups": []}


@pytest.fixture(scope="module")
def onnx_file(odd_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(load(odd_run, "cpu"), out, [])
    return out


def softmax(scores_NC):
    shares_NC = np.exp(scores_NC - scores_NC.max(1, keepdims=True))
    return shares_NC / shares_NC.sum(1, keepdims=True)


def test_onnx_gives_what_predict_gives(odd_run, onnx_file):
    """Any number of images, as uint8; softmax of the scores is predict's probability."""
    session = onnxruntime.InferenceSession(onnx_file)
    (entered,), (left,) = session.get_inputs(), session.get_outputs()
    assert (entered.name, entered.type, entered.shape) == ("images", "tensor(uint8)", ["batch", 3, 16, 16])
    assert (left.name, left.type, left.shape) == ("scores", "tensor(float)", ["batch", 3])
    classifier = load(odd_run, "cpu")
    test = odd_run.parent / "data" / "test"
    views_N3SS = checking_views(classifier, [test])[:-1].numpy()
    predicted = classifier.predict(test)
    chosen = np.linspace(0, 17, 16).astype(int)
    for size in (1, 2, 16):
        (scores_NC,) = session.run(None, {"images": views_N3SS[:size]})
        shares_NC = softmax(scores_NC)
        assert shares_NC.argmax(1).tolist() == predicted.ranked_NK[chosen[:size], 0].tolist()
        assert shares_NC.max(1) == pytest.approx(predicted.probability_NK[chosen[:size], 0], abs=1e-5)


def test_onnx_says_what_is_needed_to_use_it(odd_run, onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["class_names"]) == list(ODD_NAMES)
    assert json.loads(notes["train_counts"]) == [30, 12, 5]
    view = json.loads(notes["preprocessing"])
    assert (view["size"], view["short_side"]) == (16, 18)
    assert view["mean"] == [0.485, 0.456, 0.406]
    assert json.loads(notes["temperature"]) == load(odd_run).temperature
    assert notes["method"] == "bcl"
    assert os.fsencode(str(Path(__file__).parents[2])) not in onnx_file.read_bytes(), "no paths of this machine"


BLOCKED = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"equipoise", "torch", "torchvision", "timm", "cv2", "scipy", "sklearn"}:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(*words) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(EXAMPLE), *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_the_example_without_this_package(odd_run, onnx_file, tmp_path):
    """Pictures of odd shapes, one of them on its side by EXIF; the same first class as predict, and its probability."""
    assert len(EXAMPLE.read_text().splitlines()) <= 20
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        draw_picture(file, number % 3, number, size=(31 + 7 * number, 120 - 5 * number))
    from PIL import Image

    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(files[0]) as picture:
        picture.save(turned, exif=exif)
    lines = run_example(onnx_file, *files, turned)
    predicted = load(odd_run).predict([*files, turned])
    assert len(lines) == len(predicted) == 13
    for (file, name, share), (expected_file, classes) in zip(lines, predicted, strict=True):
        assert (file, name) == (expected_file, " ".join(classes[0][0].split()))
        assert float(share) == pytest.approx(classes[0][1], abs=1e-3)


@pytest.mark.slow
def test_the_example_on_photographs(shared_data, tmp_path):
    """160 ImageNet photographs, plain cross-entropy of a known training prior: every first class is predict's."""
    torch.manual_seed(0)
    recipe = load_recipe("pictures", arch="resnet18", size=128, method="ce")
    network = create_network(recipe, 40, start=False)
    counts = tuple(int(600 * 0.9**label) + 1 for label in range(40))
    names = tuple(f"class {label}" for label in range(40))
    Checkpoint(recipe, names, counts, 1, 1, None, state_on_cpu(network), NO_MOMENTUM, {}).save(tmp_path / "last.pt")
    classifier = load(tmp_path, "cpu")
    photos = sorted((shared_data / "photos").glob("*.JPEG"))
    export_onnx(classifier, tmp_path / "model.onnx", photos)
    lines = run_example(tmp_path / "model.onnx", *photos)
    predicted = classifier.predict(photos)
    assert len(lines) == len(photos) == 160
    assert [line[1] for line in lines] == [classes[0][0] for _, classes in predicted]
    shares = [float(line[2]) for line in lines]
    assert shares == pytest.approx(predicted.probability_NK[:, 0], abs=1e-3)


def test_example_of_images_without_a_crop(tmp_path):
    """Policy `cifar`: resized as they are."""
    torch.manual_seed(0)
    recipe = load_recipe("cifar10-lt", arch="resnet8", method="logit-adjusted")
    network = create_network(recipe, 3, start=False)
    Checkpoint(recipe, ("a", "b", "c"), (9, 3, 1), 1, 1, None, state_on_cpu(network), NO_MOMENTUM, {}).save(
        tmp_path / "last.pt"
    )
    draw_picture(tmp_path / "x.png", 1, 1, size=(60, 41))
    classifier = load(tmp_path, "cpu")
    export_onnx(classifier, tmp_path / "model.onnx", [tmp_path / "x.png"])
    ((_, name, share),) = run_example(tmp_path / "model.onnx", tmp_path / "x.png")
    (_, ((expected, probability), *_)) = next(iter(classifier.predict(tmp_path / "x.png")))
    assert name == expected
    assert float(share) == pytest.approx(probability, abs=1e-4)


def test_torch_export_gives_what_predict_gives(odd_run, tmp_path):
    classifier = load(odd_run, "cpu")
    said = export_torch(classifier, tmp_path / "model.pt2", [])
    assert said.startswith("checked on 16 images: no score differs from the model's by more than")
    notes = {NOTES: ""}
    module = torch.export.load(tmp_path / "model.pt2", extra_files=notes).module()
    assert json.loads(notes[NOTES])["class_names"] == list(ODD_NAMES)
    test = odd_run.parent / "data" / "test"
    views_N3SS = checking_views(classifier, [test])
    predicted = classifier.predict(test)
    for size in (1, 5):
        with torch.inference_mode():
            shares_NC = module(views_N3SS[:size]).softmax(1)
        chosen = np.linspace(0, 17, 16).astype(int)[:size]
        assert shares_NC.argmax(1).tolist() == predicted.ranked_NK[chosen, 0].tolist()
    assert os.fsencode(str(Path(__file__).parents[2])) not in (tmp_path / "model.pt2").read_bytes()


@pytest.mark.slow
def test_a_transformer_is_written(tmp_path):
    torch.manual_seed(0)
    recipe = load_recipe("pictures", arch="vit_tiny_patch16_224", size=32, method="ce")
    network = create_network(recipe, 3, start=False)
    Checkpoint(recipe, ("a", "b", "c"), (9, 3, 1), 1, 1, None, state_on_cpu(network), NO_MOMENTUM, {}).save(
        tmp_path / "last.pt"
    )
    draw_picture(tmp_path / "x.png", 1, 1)
    export_onnx(load(tmp_path, "cpu"), tmp_path / "model.onnx", [tmp_path / "x.png"])
    assert (tmp_path / "model.onnx").is_file()


# ---- what is refused


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "model.onnx"), (export_torch, "model.pt2")])
def test_a_file_that_differs_from_the_model_is_not_left(export, name, odd_run, tmp_path, monkeypatch):
    """A network that answers differently each time it is asked: what was exported cannot be it."""
    classifier = load(odd_run, "cpu")
    forward, calls = classifier.model.forward, []

    def drifting(images):
        if not torch.compiler.is_exporting():
            calls.append(None)
        return forward(images) + 0.01 * len(calls)

    monkeypatch.setattr(classifier.model, "forward", drifting)
    with pytest.raises(
        UserError, match=r"the exported file's scores differ from the model's by 0\.0\d+, more than 0\.0001"
    ):
        export(classifier, tmp_path / name, [])
    assert list(tmp_path.iterdir()) == []


def test_of_cold_scores_more_is_allowed(odd_run, tmp_path):
    """At a temperature of 0.05 they are twenty times the logits, and so is what float32 leaves of them."""
    classifier = replace(load(odd_run, "cpu"), temperature=0.05)
    views = checking_views(classifier, [])
    exact = classifier.calibrated(views).detach().numpy()
    for off, allowed in ((1.9e-3, True), (2.1e-3, False)):
        wrong = lambda images, off=off: exact[: len(images)] + np.float32(off)  # noqa: E731
        if allowed:
            assert "(of 0.002 allowed)" in check(classifier, views, wrong)
        else:
            with pytest.raises(UserError, match=r"by 0\.0021, more than 0\.002"):
                check(classifier, views, wrong)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(package, odd_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as refused:
        export_onnx(load(odd_run, "cpu"), tmp_path / "model.onnx", [])
    pip = f"{shlex.quote(sys.executable)} -m pip"
    expected = f"the package {package} is missing; run: {pip} install onnx onnxscript onnxruntime (the extra 'export')"
    assert str(refused.value) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_network_beyond_the_format(odd_run, tmp_path):
    classifier = load(odd_run, "cpu")
    classifier.model.register_buffer("large", torch.empty(1).expand(2**29))  # 2 GiB that nobody has to hold
    with pytest.raises(UserError) as refused:
        export_onnx(classifier, tmp_path / "model.onnx", [])
    expected = (
        "the network's 2.15 GB do not fit in an ONNX file, whose format ends at 2.15 GB; take --to torch-export or "
        "safetensors"
    )
    assert str(refused.value) == expected
    assert list(tmp_path.iterdir()) == []


def test_images_to_check_with(odd_run, tmp_path):
    """The run's own, or those that are named; where there are none it is said how to name some."""
    classifier = load(odd_run, "cpu")
    assert checking_views(classifier, []).shape == (17, 3, 16, 16)
    assert checking_views(classifier, [odd_run.parent / "data" / "val"]).shape == (17, 3, 16, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        checking_views(classifier, [tmp_path / "empty"])
    (tmp_path / "x.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        checking_views(classifier, [tmp_path / "x.png"])
    write_hub_folder(tmp_path / "hub", classifier.checkpoint, None, None)
    how = "name pictures to check the file with: --images FOLDER"
    with pytest.raises(UserError, match=f"hub does not say where its data lies; {how}"):
        checking_views(load(tmp_path / "hub", "cpu"), [])
    data = odd_run.parent / "data"
    data.rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match=f"there is no file or folder at .*; or {how}"):
            checking_views(classifier, [])
    finally:
        (tmp_path / "away").rename(data)
