"""`equipoise data`: what it says of a folder, and how it ends."""

import os
import re
import shutil
from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import draw_folder, refusal
from PIL import Image

from equipoise.base.errors import UserError
from equipoise.cli.main import main
from equipoise.data.inspection import Place
from equipoise.evaluation import labels
from equipoise.evaluation.labels import Doubt


def test_data_of_a_folder_with_problems(capsys, tmp_path):
    draw_folder(tmp_path, {"ant": 12, "[bold]bee": 3})
    (tmp_path / "cow").mkdir()
    (tmp_path / "ant" / "3.png").write_bytes(b"broken")
    (tmp_path / "ant" / "readme.txt").write_text("none")
    assert main(["data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for said in (
        "class folders",
        "train: 15 images, 2 classes, imbalance factor 4",
        "notes (2)",
        "problems (1)",
        "cow is empty and was passed over",
        "3.png cannot be read (it is no image: not JPEG",
        "1 file passed over: .txt, no image (of 'ant' 1)",
    ):
        assert said in " ".join(text.split()), said  # long paths wrap lines
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if re.match(r"^(ant|\[bold\]bee) ", line)}
    assert bars == {"ant": 30, "[bold]bee": 7}


def test_check_fails_where_train_refuses(capsys, tmp_path):
    """One class, an empty class, missing images, parts that overlap; what is odd only is no failure."""
    draw_folder(tmp_path / "odd", {"ant": 3, "bee": 3})
    (tmp_path / "odd" / "ant" / "readme.txt").write_text("")
    draw_folder(tmp_path / "one", {"ant": 3})
    draw_folder(tmp_path / "empty", {"ant": 3, "bee": 3})
    (tmp_path / "empty" / "cow").mkdir()
    (tmp_path / "empty" / "cow" / "notes.txt").write_text("none yet")
    for name, lines in (("all", ["ant/0.png 0", "bee/0.png 1"]), ("missing", ["ant/0.png 0", "bee/9.png 1"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    lists = ["data", str(tmp_path / "odd"), "--train-list"]
    refused = {
        "has one class only": ["data", str(tmp_path / "one")],
        "class 'cow' has no training images": ["data", str(tmp_path / "empty")],
        "are missing": [*lists, str(tmp_path / "missing.txt")],
        "figures on them would be too good": [
            *lists,
            str(tmp_path / "all.txt"),
            "--test-list",
            str(tmp_path / "all.txt"),
        ],
    }
    for said, words in refused.items():
        assert main(words) == 0
        assert main([*words, "--check"]) == 1
        assert said in capsys.readouterr().out
    assert main(["data", str(tmp_path / "odd"), "--check"]) == 0
    said = capsys.readouterr().out
    assert "notes (1)" in said
    assert "no problems found" in said


def test_data_says_what_the_usual_remedies_do(capsys, tmp_path):
    """For 30 and 3 images; not where classes are nearly balanced, nor where one is empty."""
    draw_folder(tmp_path, {"ant": 30, "bee": 3})
    assert main(["data", str(tmp_path)]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "what usual remedies do to the largest class and the rarest (30 and 3 images):" in rows
    for figures in (
        "class weights 1/n 0.182 1.82", "by effective number 0.182 1.82", "class-balanced sampler 0.55 5.5",
        "square-root sampler 0.836 2.64", "logit adjustment 0 2.3", "BCL 0 2.3",
    ):  # fmt: skip
        assert any(row.startswith(f"{figures} ") for row in rows), figures
    assert any(
        "recipe frozen, method logit-adjusted; --method takes another: balanced-softmax, bcl, " in row for row in rows
    )
    draw_folder(tmp_path, {"bee": 20})  # 30 to 20
    assert main(["data", str(tmp_path)]) == 0
    for file in (tmp_path / "bee").iterdir():
        file.unlink()
    assert main(["data", str(tmp_path)]) == 0
    assert "usual remedies" not in capsys.readouterr().out


def test_data_of_many_classes_shows_the_ends(capsys, tmp_path):
    draw_folder(tmp_path, {f"class{number:02}": 1 + number % 5 for number in range(50)})
    assert main(["data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if re.match(r"class\d", line)] == [
        *["5"] * 10, *["4"] * 10, *["2"] * 10, *["1"] * 10
    ]  # fmt: skip
    assert "(40 of 50 classes, the largest and the smallest)" in said


def test_copies_between_parts_and_classes_end_with_1(capsys, tmp_path):
    """Copies within a class do not: they make no figure wrong."""
    data = tmp_path / "data"
    for part, name, number in product(("train", "test"), ("ant", "bee"), range(4)):
        (data / part / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([len(part), ord(name[0]), number]).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(data / part / name / f"{number}.png")
    assert main(["data", str(data), "--check"]) == 0
    assert "no problems found (every image was decoded)" in capsys.readouterr().out
    shutil.copy(data / "train" / "ant" / "0.png", data / "train" / "ant" / "again.png")
    assert main(["data", str(data), "--check"]) == 0
    assert "images that are twice in a class of a part: 1 (1 pixel for pixel, 0 nearly" in capsys.readouterr().out
    for copy, said in (("test/ant", "test images that are in the train part too: 1"), ("train/bee", "two labels: 1")):
        copied = shutil.copy(data / "train" / "ant" / "1.png", data / copy / "copy.png")
        assert main(["data", str(data)]) == 0
        assert main(["data", str(data), "--check"]) == 1
        assert main(["data", str(data), "--report", str(tmp_path / "page.html")]) == 1
        out = capsys.readouterr().out
        assert out.count(said) == 2
        assert f"report: {tmp_path / 'page.html'}" in out
        assert "copy.png" in (tmp_path / "page.html").read_text()
        os.remove(copied)
    (tmp_path / "notes.txt").write_text("mine")
    assert "--report must be a new file or a .html file" in refusal(
        capsys, "data", str(data), "--report", str(tmp_path / "notes.txt")
    )


@pytest.mark.slow
def test_labels_to_look_at(capsys, tmp_path, monkeypatch):
    """A table of them, the first twenty of many; they are no failure, and the page has them too."""
    data = draw_folder(tmp_path / "data", {"ant": 14, "bee": 12})
    given: list[Any] = []

    def doubtful(parts):
        given.append(parts)
        return [Doubt(Place("train", parts["train"], row), 0.0123, "an <odd> [bold]", 0.9) for row in range(23)]

    monkeypatch.setattr(labels, "doubtful_labels", doubtful)
    assert main(["data", str(data), "--check-labels"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "an <odd>" in line]
    assert len(rows) == 20
    assert rows[0] == [str(data / "ant" / "0.png"), "ant", "1.2", "an", "<odd>", "[bold]", "90.0"]
    assert "labels to look at (23)" in out
    assert "… and 3 more" in out
    assert [*given[0]] == ["train"]
    assert main(["data", str(data), "--check-labels", "--report", str(tmp_path / "page.html")]) == 0
    assert "Labels to look at: 23." in (tmp_path / "page.html").read_text()
    monkeypatch.setattr(labels, "doubtful_labels", lambda parts: [])
    assert main(["data", str(data), "--check-labels"]) == 0
    assert "labels to look at (0)" in capsys.readouterr().out


def test_without_pretrained_weights_labels_are_not_checked(capsys, tmp_path, monkeypatch):
    data = draw_folder(tmp_path / "data", {"ant": 4, "bee": 4})

    def absent(name):
        raise UserError(f"the pretrained weights of {name} could not be had")

    monkeypatch.setattr("equipoise.method.encoders.find_pretrained", absent)
    assert main(["data", str(data), "--check-labels"]) == 2
    said = capsys.readouterr().err
    assert said == "equipoise: the pretrained weights of tf_efficientnet_lite0 could not be had\n"
