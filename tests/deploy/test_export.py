"""Exported files against the model, in environments without it."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ODD_NAMES, draw_picture
from PIL import Image
from synthetic import untrained

from equipoise import UserError, load
from equipoise.data.decode import decode_bytes
from equipoise.deploy.export import NOTES, check, export_file, made_up_images
from equipoise.views.views import evaluation_view

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
HERE = os.fsencode(str(Path(__file__).parents[2]))


def classifier_of(folder: Path, counts=(9, 3, 1), **fields):
    """An untrained network, saved and loaded."""
    untrained(counts, **fields).save(folder / "last.pt")
    return load(folder, "cpu")


@pytest.fixture(scope="module")
def onnx_file(odd_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model.onnx"
    assert export_file(load(odd_run, "cpu"), "onnx", out).startswith("checked on 16 made-up images")
    return out


@pytest.fixture(scope="module")
def torch_file(odd_run, onnx_file):
    out = onnx_file.with_name("model.pt2")
    assert export_file(load(odd_run, "cpu"), "torch-export", out).startswith("checked on 16 made-up images")
    return out


def test_exported_files_give_what_predict_gives(odd_run, onnx_file, torch_file):
    """Any number of images, as uint8; softmax of the scores is predict's probability."""
    session = onnxruntime.InferenceSession(onnx_file)
    ends = [(end.name, end.type, end.shape) for end in (*session.get_inputs(), *session.get_outputs())]
    expected = [("images", "tensor(uint8)", ["batch", 3, 16, 16]), ("scores", "tensor(float)", ["batch", 3])]
    assert ends == expected
    module = torch.export.load(torch_file).module()
    classifier = load(odd_run, "cpu")
    test = odd_run.parent / "data" / "test"
    predicted = classifier.predict(test)
    views = [evaluation_view(decode_bytes(Path(file).read_bytes()), 16) for file in predicted.files]
    views_N3SS = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()
    for size in (1, 2, 18):
        with torch.inference_mode():
            found = [module(views_N3SS[:size])]
        found += map(torch.from_numpy, session.run(None, {"images": views_N3SS[:size].numpy()}))
        for scores_NC in found:
            shares_NC = scores_NC.softmax(1)
            assert shares_NC.argmax(1).tolist() == predicted.ranked_NK[:size, 0].tolist()
            assert shares_NC.amax(1).numpy() == pytest.approx(predicted.probability_NK[:size, 0], abs=1e-5)


def test_exported_files_say_what_is_needed_to_use_them(odd_run, onnx_file, torch_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["class_names"]) == list(ODD_NAMES)
    assert json.loads(notes["train_counts"]) == [30, 12, 5]
    view = json.loads(notes["preprocessing"])
    assert (view["size"], view["short_side"]) == (16, 18)
    assert view["mean"] == [0.485, 0.456, 0.406]
    assert "16-bit gray v becomes (v + 128) // 257" in view["decoding"]
    assert "alpha is dropped" in view["decoding"]
    assert json.loads(notes["temperature"]) == load(odd_run).temperature
    assert notes["method"] == "bcl"
    beside = {NOTES: ""}
    torch.export.load(torch_file, extra_files=beside)
    assert json.loads(beside[NOTES])["class_names"] == list(ODD_NAMES)
    for file in (onnx_file, torch_file):
        assert HERE not in file.read_bytes(), "no paths of this machine"


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


def assert_example_agrees(classifier, model: Path, files) -> None:
    """The example, without this package, gives predict's first class and its probability."""
    predicted = classifier.predict(files)
    words = [sys.executable, "-c", BLOCKED, EXAMPLE, model, *files]
    lines = [line.split("\t") for line in subprocess.check_output(words, text=True).splitlines()]
    assert len(lines) == len(predicted) == len(files)
    for (file, name, share), (expected_file, classes) in zip(lines, predicted, strict=True):
        assert (file, name) == (expected_file, " ".join(classes[0][0].split()))
        assert float(share) == pytest.approx(classes[0][1], abs=1e-3)


def test_the_example_without_this_package(odd_run, onnx_file, tmp_path):
    """Pictures of odd shapes, one of them on its side by EXIF."""
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        draw_picture(file, number % 3, number, size=(31 + 7 * number, 120 - 5 * number))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(files[0]) as picture:
        picture.save(tmp_path / "turned.jpg", exif=exif)
    assert_example_agrees(load(odd_run), onnx_file, [*files, tmp_path / "turned.jpg"])


def write_odd_pictures(folder: Path) -> list[Path]:
    """A picture of one colour a file, in each of the forms whose conversion to 8 bits RGB is a choice."""
    colour, hidden = (150, 140, 110), (90, 120, 128)
    plain, other = (Image.new("RGB", (40, 30), of) for of in (colour, hidden))
    gray = np.linspace(20_000, 45_000, 1200).reshape(30, 40).astype(np.uint16)
    rgb16_BGR = np.stack([gray // 2, gray, gray + 9000], axis=2)
    clear = other.copy()
    clear.putalpha(Image.new("L", (40, 30), 0))
    clear.paste((*colour, 255), (0, 0, 20, 30))
    palette = plain.quantize(4)
    exif = Image.Exif()
    exif[0x0112] = 6
    written = {
        "gray16.png": lambda file: Image.fromarray(gray).save(file),
        "gray16.tif": lambda file: Image.fromarray(gray.astype(">u2")).save(file),
        "rgb16.png": lambda file: cv2.imwrite(str(file), rgb16_BGR),
        "palette.png": palette.save,
        "palette-bytes.png": lambda file: palette.save(file, transparency=b"\x00\x80"),
        "palette.gif": lambda file: palette.save(file, transparency=0),
        "la.png": clear.convert("LA").save,
        "cmyk.jpg": plain.convert("CMYK").save,
        "alpha.png": clear.save,
        "turned16.png": lambda file: Image.fromarray(gray).save(file, exif=exif),
        "1-bit.png": lambda file: Image.fromarray(gray > 30_000).save(file),
        "animated.gif": lambda file: plain.save(file, save_all=True, append_images=[other]),
        "clear.webp": lambda file: clear.save(file, lossless=True, exact=True),
    }
    for name, write in written.items():
        write(folder / name)
    return [folder / name for name in written]


def test_the_example_on_odd_pictures(odd_run, onnx_file, tmp_path):
    """16 bits, palettes, alpha, CMYK and others; what nobody can decode so, both refuse."""
    files = write_odd_pictures(tmp_path)
    assert_example_agrees(load(odd_run), onnx_file, files)
    Image.fromarray(np.full((30, 40), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(subprocess.CalledProcessError):
        assert_example_agrees(load(odd_run), onnx_file, [tmp_path / "float.tif"])


@pytest.mark.long
@pytest.mark.parametrize(("arch", "size"), [("resnet18", 128), ("vit_tiny_patch16_224", 32)])
def test_the_example_on_photographs(arch, size, shared_data, tmp_path):
    """160 ImageNet photographs, plain cross-entropy of a known training prior."""
    counts = tuple(int(600 * 0.9**label) + 1 for label in range(40))
    classifier = classifier_of(tmp_path, counts, arch=arch, size=size, method="ce")
    photos = sorted((shared_data / "photos").glob("*.JPEG"))
    assert len(photos) == 160
    export_file(classifier, "onnx", tmp_path / "model.onnx")
    assert_example_agrees(classifier, tmp_path / "model.onnx", photos)


def test_the_example_on_images_without_a_crop(tmp_path):
    """Policy `cifar`: resized as they are."""
    draw_picture(tmp_path / "x.png", 1, 1, size=(60, 41))
    classifier = classifier_of(tmp_path, recipe="cifar10-lt", arch="resnet8", method="logit-adjusted")
    export_file(classifier, "onnx", tmp_path / "model.onnx")
    assert_example_agrees(classifier, tmp_path / "model.onnx", [tmp_path / "x.png"])


# ---- what is refused


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_file_that_differs_from_the_model_is_not_left(form, odd_run, tmp_path, monkeypatch):
    """A network that answers differently each time: what was exported cannot be it."""
    classifier = load(odd_run, "cpu")
    forward, calls = classifier.model.forward, []

    def drifting(images):
        if not torch.compiler.is_exporting():
            calls.append(None)
        return forward(images) + 0.01 * len(calls)

    monkeypatch.setattr(classifier.model, "forward", drifting)
    with pytest.raises(UserError, match=r"differ from the model's by 0\.0\d+, more than 0\.0001"):
        export_file(classifier, form, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("off", "allowed"), [(1.9e-3, True), (2.1e-3, False), (np.nan, False)])
def test_of_cold_scores_more_is_allowed(off, allowed, odd_run):
    """At a temperature of 0.05 they are twenty times the logits, and so are the errors of float32."""
    classifier = replace(load(odd_run, "cpu"), temperature=0.05)
    views = made_up_images(16)
    exact = classifier.calibrated(views).detach().numpy()
    run = lambda images: (exact[: len(images)] + np.float32(off),)  # noqa: E731
    with contextlib.nullcontext() if allowed else pytest.raises(UserError, match=r"more than 0\.002"):
        check(classifier, views, run)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(package, odd_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"the package {package} is missing; pip install onnx onnxscript"):
        export_file(load(odd_run, "cpu"), "onnx", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
