"""Hub-style folders: the same when read, loaded by timm, and a card that means what it says."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import draw_picture
from PIL import Image
from safetensors.torch import load_file
from synthetic import untrained

from equipoise import UserError, load
from equipoise.deploy.hub import read_hub_folder, write_hub_folder
from equipoise.runs.checkpoint import Checkpoint
from equipoise.views.views import evaluation_view, short_side

NAMES = ("<b>x & y</b>", "a|b `c`", "\n\n# no heading", os.fsdecode(b"\xff"))  # the last one is no UTF-8


def sample(names=NAMES, **fields) -> Checkpoint:
    counts = tuple(range(130, 130 - 35 * len(names), -35))
    return untrained(counts, names, epoch=7, **fields)


def figures(per_class) -> dict:
    names = ["top1", "top5", "mean_per_class", "many", "medium", "few", "worst_tenth", "worst_class", "macro_f1", "ece"]
    part = {name: (index + 1) / 100 for index, name in enumerate(names)}
    part |= {"few": None, "false_head_rate": None, "images": 40, "per_class": per_class}
    return {"validation": None, "test": part}


def write_config(folder, **changed) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["equipoise"] |= changed
    (folder / "config.json").write_text(json.dumps(config))


def test_round_trip(tmp_path):
    checkpoint = sample(
        data="/home/somebody/secret", weights="/home/somebody/start.pth", lr=0.123, sampler="square-root"
    )
    write_hub_folder(tmp_path / "hub", checkpoint, 1.25, None)
    read, temperature, known = read_hub_folder(tmp_path / "hub")
    assert (temperature, known) == (1.25, None)
    assert (read.class_names, read.class_counts, read.epoch) == (NAMES, (130, 95, 60, 25), 7)
    assert read.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(read.weights[name], value) for name, value in checkpoint.weights.items())
    assert read.recipe == sample(data="", lr=0.123, sampler="square-root").recipe, "the prior depends on the sampler"
    for file in (tmp_path / "hub").iterdir():
        assert b"somebody" not in file.read_bytes(), "paths of the machine are nobody's business"
    assert sorted(os.listdir(tmp_path / "hub")) == ["README.md", "config.json", "head.safetensors", "model.safetensors"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("head.safetensors", b"half", "(Error while deserializing header"),
        ("model.safetensors", None, "o such file or directory: "),
        ("config.json", b'{"architecture": "resnet18"}', "(its content makes no sense)"),
        ("recipe", {"epochs": -3}, "epochs must be a whole number, at least 1"),
        ("temperature", "hot", "Expected `float | null`, got `str`"),
        ("class_names", ["a", "b"], "do not fit method bcl with a resnet8 and 2 classes"),
    ],
)
def test_damaged_folders(file, content, reason, tmp_path):
    folder = tmp_path / "hub"
    write_hub_folder(folder, sample(), 1.5, None)
    if content is None:
        (folder / file).unlink()
    elif "." in file:
        (folder / file).write_bytes(content)
    else:
        write_config(folder, **{file: content})
    with pytest.raises(UserError, match=re.escape(reason)):
        load(folder)


@pytest.mark.parametrize(
    ("arch", "size", "tune"),
    [("resnet18", 48, "full"), ("vit_tiny_patch16_224.augreg_in21k", 32, "scratch"), ("test_vit", 160, "lora")],
)
def test_timm_loads_the_encoder(arch, size, tune, tmp_path):
    """By the two lines of the card; the same features, from a picture on the disk, as our network's encoder gives."""
    write_hub_folder(tmp_path / "hub", sample(arch=arch, size=size, tune=tune), 1.0, None)
    card = (tmp_path / "hub" / "README.md").read_text()
    lines = card.partition("```python\nencoder = ")[2].partition("```")[0]
    scope = {"timm": timm}
    exec(("encoder = " + lines).replace("FOLDER", str(tmp_path / "hub")), scope)
    encoder = scope["encoder"]
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert encoder.state_dict().keys() == stored.keys()
    draw_picture(tmp_path / "x.png", 1, 1, size=(90, 70))
    classifier = load(tmp_path / "hub", device="cpu")
    with Image.open(tmp_path / "x.png") as picture, torch.inference_mode():
        found = encoder(scope["transform"](picture)[None])
        view = torch.from_numpy(np.stack([evaluation_view(np.asarray(picture), size)]))
        expected = classifier.model.encode(view.permute(0, 3, 1, 2))
    assert found.shape == (1, encoder.num_features)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("size", [24, 128, 224, 443, 815, 1000])
def test_timm_resizes_as_we_do(size, tmp_path):
    write_hub_folder(tmp_path / "hub", sample(size=size), None, None)
    crop = json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]["crop_pct"]
    assert int(size / crop) == short_side(size)
    assert "timm" not in (tmp_path / "hub" / "README.md").read_text(), "a small encoder is not one of timm's"


# ---- the card


def rows_of(folder) -> list[list[str]]:
    """The cells of the tables of the card."""
    lines = (folder / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_card_says_what_was_measured_and_how_long_the_tail_is(tmp_path):
    write_hub_folder(tmp_path / "hub", sample(), 1.234, figures([0.5, 0.25, None, 0.75]))
    card, rows = (tmp_path / "hub" / "README.md").read_text(), rows_of(tmp_path / "hub")
    for row in (
        ["percent", "test (40 images)"],
        ["top-1", "1.0"],
        ["many (more than 100 training images)", "4.0"],
        ["calibration error", "10.0"],
        ["medium", "3", "180"],
        ["all", "4", "310"],
    ):
        assert row in rows, row
    assert not any("few (" in row[0] for row in rows), "there is no such figure"
    for said in (
        "# resnet8 for 4 classes with a long tail\n",
        "The largest class has 130 training images, the smallest 25: imbalance factor 5.2.",
        "calibrated with the temperature 1.23, fitted on the validation part",
    ):
        assert said in card


def test_the_card_of_a_run(odd_run, tmp_path):
    """The figures are those of the checkpoint that is exported; without any, and without counts, it says so."""
    metrics = json.loads((odd_run / "metrics.json").read_text())
    for name in ("best", "last"):
        classifier = load(odd_run / f"{name}.pt")
        write_hub_folder(tmp_path / name, classifier.checkpoint, classifier.temperature, classifier.metrics)
        scored = [metrics[name][part] for part in ("validation", "test")]
        assert ["top-1", *(f"{100 * part['top1']:.1f}" for part in scored)] in rows_of(tmp_path / name)
        assert ["percent", "validation (20 images)", "test (18 images)"] in rows_of(tmp_path / name)
    write_hub_folder(tmp_path / "bare", replace(sample(), class_counts=()), None, None)
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "This checkpoint was exported without metrics." in card
    assert "The training images of each class are not known." in card
    assert "they are not calibrated.\n" in card
    assert read_hub_folder(tmp_path / "bare")[0].class_counts == ()
