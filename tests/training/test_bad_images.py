"""Bad images through whole commands: named before training or at once, or replaced and counted."""

import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image

from equipoise import UserError, load_recipe, train
from equipoise.base.errors import Stopped
from equipoise.cli.main import main
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training.plan import prepare
from equipoise.training.session import start
from equipoise.views.draws import permutation

WORDS = [
    "--arch=resnet8",
    "--size=16",
    "--epochs=2",
    "--batch-size=6",
    "--holdout=0",
    "--device=cpu",
    "--feature-dim=8",
]


def png(size: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


HEADER_TELLS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("gone.png")),
    "bomb": lambda path: path.write_bytes(png()[:16] + bytes([0, 0, 200, 0, 0, 0, 200, 0]) + png()[24:]),
}
PIXELS_TELL = {"truncated": truncate, "noise": lambda path: path.write_bytes(png()[:60] + bytes(3000))}
SMALL = {"arch": "resnet8", "size": 16, "epochs": 1, "batch_size": 6, "holdout": 0}


@pytest.fixture
def data(tmp_path):
    return draw_folder(tmp_path / "data", {"ant": 12, "bee": 6})


def no_run(tmp_path: Path) -> bool:
    return not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", HEADER_TELLS | PIXELS_TELL)
def test_an_error_names_the_file_and_leaves_nothing(kind, data, tmp_path, capsys):
    bad = data / "bee" / "3.png"
    (HEADER_TELLS | PIXELS_TELL)[kind](bad)
    assert main(["train", "pictures", "--data", str(data), *WORDS, "--out", str(tmp_path / "run"), "-j", "0"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"equipoise: {bad} cannot be read \(.*\); repair .* --on-bad-image skip\n", said.err)
    assert ("run folder" in said.out) == (kind in PIXELS_TELL), "what headers tell is told before the plan is shown"
    assert no_run(tmp_path)


@pytest.mark.slow
def test_with_skip_they_are_replaced_counted_and_the_same_whatever_the_workers(data, tmp_path, capsys):
    draw_folder(data / "test", {"ant": 4, "bee": 3})
    for name in ("ant", "bee"):
        shutil.move(data / name, data / "train" / name)
    bad = {}
    for number, make in enumerate([*HEADER_TELLS.values(), *PIXELS_TELL.values()]):
        bad[str(data / "train" / "ant" / f"{number}.png")] = make(data / "train" / "ant" / f"{number}.png")
    truncate(data / "test" / "bee" / "1.png")
    weights = []
    for workers in ("0", "2"):
        run = tmp_path / f"run{workers}"
        words = ["train", "--data", str(data), *WORDS, "--out", str(run), "-j", workers, "--on-bad-image", "skip"]
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        [train_line, test_line] = lines[-2:]
        assert train_line.startswith("train part: 6 images could not be read, replaced by others of the same class: ")
        assert f"{data}/train/ant/0.png (it is empty: 0 bytes)" in train_line
        assert train_line.endswith("; and 1 more")
        assert test_line.startswith("test part: 1 image could not be read, left out of the metrics: ")
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["bad_images"].keys() == {"train", "test"}
        assert metrics["bad_images"]["train"].keys() == bad.keys()
        assert metrics["bad_images"] == json.loads((run / "bad-images.json").read_text())
        assert metrics["test"]["images"] == 6
        weights.append(torch.load(run / "last.pt", weights_only=True)["weights"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_an_image_that_vanishes_during_training(skip, data, tmp_path):
    recipe = load_recipe("pictures", data=str(data), on_bad_image="skip" if skip else "error", **SMALL)
    plan = prepare(recipe, tmp_path / "run")
    (data / "ant" / "7.png").unlink()
    if skip:
        with start(plan) as session:
            bad = session.run(progress=False).metrics["bad_images"]
        assert bad == {"train": {str(data / "ant" / "7.png"): "no such file or directory"}}
    else:
        with pytest.raises(UserError, match=r"ant/7\.png cannot be read"), start(plan) as session:
            session.run(progress=False)
        assert no_run(tmp_path)


@pytest.mark.slow
def test_an_interrupted_run_knows_the_bad_images_of_before(data, tmp_path, monkeypatch):
    """The only bad one is in the first of three batches, and is not looked at again in that epoch."""
    recipe = load_recipe("pictures", data=str(data), workers=0, on_bad_image="skip", device="cpu", **SMALL)
    images = prepare(recipe, tmp_path / "run").parts.train
    bad = Path(images.images.name(int(permutation(recipe.seed, 0, len(images))[0])))
    truncate(bad)
    step, taken = torch.optim.SGD.step, []

    def stopping(self, *words):
        taken.append(1)
        if len(taken) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *words)

    monkeypatch.setattr(torch.optim.SGD, "step", stopping)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", progress=False)
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 2
    known = json.loads((tmp_path / "run" / "bad-images.json").read_text())
    assert list(known["train"]) == [str(bad)]


@pytest.mark.parametrize("how", [HEADER_TELLS["empty"], truncate])
def test_a_class_that_cannot_be_read_is_refused_with_skip_too(how, data, tmp_path, capsys):
    for number in range(6):
        how(data / "bee" / f"{number}.png")
    words = ["train", "--data", str(data), *WORDS, "--out", str(tmp_path / "run"), "--on-bad-image=skip", "-j0"]
    assert main(words) == 2
    assert (
        f"{data}: none of the 6 images of class 'bee' can be read (first: {data}/bee/0.png)" in capsys.readouterr().err
    )
    assert no_run(tmp_path)


@pytest.mark.slow
def test_evaluation_refuses_a_bad_image_or_leaves_it_out(data, tmp_path, capsys):
    recipe = load_recipe("pictures", data=str(data), **{**SMALL, "holdout": 0.2})
    run = train(recipe, tmp_path / "run", progress=False)
    validation = prepare(recipe, tmp_path / "other").parts.validation
    assert validation is not None
    truncate(Path(validation.images.name(0)))
    assert main(["evaluate", str(run.path), "--device", "cpu"]) == 2
    assert f"{validation.images.name(0)} cannot be read" in capsys.readouterr().err
    assert main(["evaluate", str(run.path), "--device", "cpu", "--on-bad-image", "skip"]) == 0
    assert "validation part: 1 image could not be read, left out" in capsys.readouterr().out
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics["validation"]["images"] == len(validation) - 1
    assert list(metrics["bad_images"]) == ["validation"]
    words = ["evaluate", str(run.path), "--split=validation", "--on-bad-image=skip", "--out", str(tmp_path / "x.json")]
    assert main([*words, "--logits", str(tmp_path / "x.npz")]) == 0
    assert list(json.loads((tmp_path / "x.json").read_text())["bad_images"]) == ["validation"]
    with np.load(tmp_path / "x.npz") as logits:
        assert len(logits["labels"]) == len(validation) - 1


# ---- equipoise data --check


def test_check_decodes_everything_and_names_every_bad_file(data, capsys):
    assert main(["data", str(data), "--check"]) == 0
    said = capsys.readouterr().out
    assert "image 18/18  decoding train" in said
    assert "no problems found (every image was decoded)" in said
    kinds = [*HEADER_TELLS.values(), *PIXELS_TELL.values()]
    for number, make in enumerate(kinds):
        make(data / "ant" / f"{number}.png")
    assert main(["data", str(data), "--check"]) == 1
    said = capsys.readouterr().out
    assert f"problems ({len(kinds)})" in said
    for number in range(len(kinds)):
        assert re.search(rf"- {data}/ant/{number}.png cannot be read \(.+\)\n", said)
    assert main(["data", str(data)]) == 0
    said = capsys.readouterr().out
    assert f"problems ({len(HEADER_TELLS)})" in said


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    """Neither escape sequences, nor lines, nor markup."""
    data = draw_folder(tmp_path / "data", {"ant": 3, "\x1b]0;bee\x07\nequipoise: all is well": 2})
    for name in ("\x1b[31mred.png", "a\nb.png", "[red]c[red].png"):
        (data / "ant" / name).write_bytes(b"bad")
    assert main(["data", str(data), "--check"]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert r"\x1b[31mred.png cannot be read" in said
    assert r"a\nb.png cannot be read" in said
    assert "[red]c[red].png cannot be read" in said
    assert "\nequipoise: all is well" not in said
    assert main(["train", "--data", str(data), *WORDS, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "\x1b" not in said
