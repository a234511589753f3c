"""Hub-style folders: the same when read, loaded by timm, and a card that means what it says."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import ODD_NAMES, draw_picture
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file
from synthetic import untrained

from equipoise import UserError, load
from equipoise.deploy.hub import read_hub_folder, write_hub_folder
from equipoise.runs.checkpoint import Checkpoint
from equipoise.views.views import short_side

NAMES = ("<b>x & y</b>", "a|b `c` *d* _e_ [f](g) #1 $2$ ~h~ !i", "<script>alert(1)</script>\n\n# no heading", "\\<i>")


def sample(names=NAMES, **fields) -> Checkpoint:
    counts = tuple(range(130, 130 - 35 * len(names), -35))
    return untrained(counts, names, epoch=7, step=70, **fields)


def figures(per_class) -> dict:
    names = ["top1", "top5", "mean_per_class", "many", "medium", "few", "worst_tenth", "worst_class", "macro_f1", "ece"]
    part = {name: (index + 1) / 100 for index, name in enumerate(names)}
    return {"validation": None, "test": {**part, "few": None, "images": 40, "per_class": per_class}}


def test_round_trip(tmp_path):
    checkpoint = sample(data="/home/somebody/secret", weights="/home/somebody/start.pth", lr=0.123)
    write_hub_folder(tmp_path / "hub", checkpoint, 1.25, None)
    read, temperature = read_hub_folder(tmp_path / "hub")
    assert temperature == 1.25
    assert (read.class_names, read.class_counts, read.epoch, read.step) == (NAMES, (130, 95, 60, 25), 7, 70)
    assert read.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(read.weights[name], value) for name, value in checkpoint.weights.items())
    assert read.recipe == sample(data="", lr=0.123).recipe
    for file in (tmp_path / "hub").iterdir():
        assert b"somebody" not in file.read_bytes(), "paths of the machine are nobody's business"
        assert file.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(tmp_path)) == ["hub"]
    assert sorted(os.listdir(tmp_path / "hub")) == ["README.md", "config.json", "head.safetensors", "model.safetensors"]


def test_an_existing_folder_is_not_written_over(tmp_path):
    (tmp_path / "hub").mkdir()
    write_hub_folder(tmp_path / "hub", sample(), None, None)  # an empty one is
    before = (tmp_path / "hub" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"hub could not be written \(directory not empty\); name another folder"):
        write_hub_folder(tmp_path / "hub", sample(), None, None)
    assert (tmp_path / "hub" / "model.safetensors").stat().st_mtime_ns == before
    assert os.listdir(tmp_path) == ["hub"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("head.safetensors", b"half", "(Error while deserializing header"),
        ("model.safetensors", None, "(no such file or directory: "),
        ("config.json", b'{"architecture": "resnet18"}', "missing required field `equipoise`"),
        ("config.json", b"{", "(Expecting property name"),
        ("recipe", {"epochs": -3}, "epochs must be a whole number, at least 1"),
        ("temperature", "hot", "at `$.equipoise.temperature`"),
        ("class_names", ["a", 3, "b", "c"], "Expected `str`, got `int` - at `$.equipoise.class_names[1]`"),
        ("class_names", ["a", "b"], "the checkpoint's weights do not fit the resnet8 and 2 classes"),
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
        config = json.loads((folder / "config.json").read_text())
        config["equipoise"][file] = content
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        load(folder)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_class_names_that_are_no_utf8(tmp_path):
    """As the folder of a class may be called."""
    checkpoint = sample(names=(os.fsdecode(b"\xff"), "b"))
    write_hub_folder(tmp_path / "hub", checkpoint, None, figures([0.5, 0.5]))
    assert read_hub_folder(tmp_path / "hub")[0].class_names == checkpoint.class_names


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 48), ("vit_tiny_patch16_224.augreg_in21k", 32)])
def test_timm_loads_the_encoder(arch, size, tmp_path):
    """By the two lines of the card; the same features, from a picture on the disk, as our network's encoder gives."""
    write_hub_folder(tmp_path / "hub", sample(arch=arch, size=size), 1.0, None)
    card = (tmp_path / "hub" / "README.md").read_text()
    lines = card.partition("```python\nencoder = ")[2].partition("```")[0]
    scope = {"timm": timm}
    exec(("encoder = " + lines).replace("FOLDER", str(tmp_path / "hub")), scope)
    encoder = scope["encoder"]
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert encoder.state_dict().keys() == stored.keys()
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert encoder.num_features == config["num_features"]
    draw_picture(tmp_path / "x.png", 1, 1, size=(90, 70))
    classifier = load(tmp_path / "hub", device="cpu")
    with Image.open(tmp_path / "x.png") as picture, torch.inference_mode():
        found = encoder(scope["transform"](picture)[None])
        view = torch.from_numpy(np.stack([classifier.view(np.asarray(picture))]))
        expected = classifier.model._encode(view.permute(0, 3, 1, 2))
    assert found.shape == (1, config["num_features"])
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("size", [24, 128, 224, 443, 815, 1000])
def test_timm_resizes_as_we_do(size, tmp_path):
    write_hub_folder(tmp_path / "hub", sample(size=size), None, None)
    crop = json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]["crop_pct"]
    assert int(size / crop) == short_side(size)
    assert "timm" not in (tmp_path / "hub" / "README.md").read_text(), "a small encoder is not one of timm's"


# ---- the card


def rendered(card: str) -> tuple[str, list[list[str]]]:
    """The card's HTML as a Markdown library makes it, and the cells of its tables as text."""
    assert card.startswith("---\n")
    body = card.split("---\n", 2)[2]
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    rows: list[list[str]] = []
    for token in parser.parse(body):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level > 3:  # in a table, not in a paragraph
            assert all(child.type == "text" for child in token.children or ()), token.content
            rows[-1].append("".join(child.content for child in token.children or ()))
    return parser.render(body), rows


def test_the_card_says_what_was_measured_and_how_long_the_tail_is(tmp_path):
    write_hub_folder(tmp_path / "hub", sample(), 1.234, figures([0.5, 0.25, None, 0.75]))
    card = (tmp_path / "hub" / "README.md").read_text()
    html, rows = rendered(card)
    for row in (
        ["percent", "test (40 images)"],
        ["top-1", "1.0"],
        ["mean over classes", "3.0"],
        ["many (more than 100 training images)", "4.0"],
        ["calibration error", "10.0"],
        ["many", "1", "130"],
        ["medium", "3", "180"],
        ["few", "0", "0"],
        ["all", "4", "310"],
    ):
        assert row in rows, row
    assert not any("few (" in row[0] for row in rows), "there is no such figure"
    assert "The largest class has 130 training images, the smallest 25: imbalance factor 5.2." in card
    assert "calibrated with the temperature 1.23, fitted on the validation part" in card
    worst = rows[rows.index(["class", "training images", "accuracy, percent"]) + 1 :][:3]
    assert [row[2] for row in worst] == ["25.0", "50.0", "75.0"], "the class without test images is not among them"
    assert [row[1] for row in worst] == ["95", "130", "25"]
    assert "<h1>resnet8 for 4 classes with a long tail</h1>" in html


def test_names_are_text_in_the_card(tmp_path):
    """Of a Markdown library that lets HTML through: no mark-up comes of a name, and the names are read back."""
    write_hub_folder(tmp_path / "hub", sample(), None, figures([0.1, 0.2, 0.3, 0.4]))
    html, rows = rendered((tmp_path / "hub" / "README.md").read_text())
    for mark in ("<b>", "<script", "<i>", "<em>x", "<a ", "<s>", "no heading</h1>"):
        assert mark not in html, mark
    worst = rows[rows.index(["class", "training images", "accuracy, percent"]) + 1 :][:4]
    assert [row[0] for row in worst] == [" ".join(name.split()) for name in NAMES]
    assert "not calibrated, since no validation part could fit a temperature" in html


def test_a_checkpoint_without_figures_or_counts(tmp_path):
    write_hub_folder(tmp_path / "hub", replace(sample(), class_counts=()), None, None)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "This checkpoint was exported without metrics." in card
    assert "The training images of each class are not known." in card
    assert read_hub_folder(tmp_path / "hub")[0].class_counts == ()


def test_the_card_of_a_run(odd_run, tmp_path):
    """The figures are those of the checkpoint that is exported."""
    metrics = json.loads((odd_run / "metrics.json").read_text())
    for name in ("best", "last"):
        classifier = load(odd_run / f"{name}.pt")
        write_hub_folder(tmp_path / name, classifier.checkpoint, classifier.temperature, classifier.metrics)
        _, rows = rendered((tmp_path / name / "README.md").read_text())
        scored = [metrics[name][part] for part in ("validation", "test")]
        assert ["top-1", *(f"{100 * part['top1']:.1f}" for part in scored)] in rows
        assert ["percent", "validation (20 images)", "test (18 images)"] in rows
        assert [row[0] for row in rows if row[0] in [" ".join(name.split()) for name in ODD_NAMES]]
