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

WORDS = (
    "--arch=resnet8",
    "--size=16",
    "--epochs=2",
    "--batch-size=6",
    "--holdout=0",
    "--device=cpu",
    "--feature-dim=8",
)


def png(size: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def animate(path: Path) -> None:
    Image.new("P", (9, 9)).save(path, "GIF", save_all=True, append_images=[Image.new("P", (9, 9), 1)])


HEADER_TELLS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("gone.png")),
    "bomb": lambda path: path.write_bytes(png()[:16] + bytes([0, 0, 200, 0, 0, 0, 200, 0]) + png()[24:]),
}
PIXELS_TELL = {"truncated": truncate, "noise": lambda path: path.write_bytes(png()[:60] + bytes(3000))}
GOOD = {
    "wrong ending": lambda path: Image.new("RGB", (30, 20)).save(path, "JPEG"),
    "one pixel": lambda path: Image.new("RGB", (1, 1)).save(path),
    "strip": lambda path: Image.new("RGB", (1, 10_000)).save(path),
    "alpha": lambda path: Image.new("RGBA", (30, 20)).save(path),
    "16 bits": lambda path: Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(path),
    "CMYK": lambda path: Image.new("CMYK", (30, 20)).save(path, "JPEG"),
    "animated": animate,
}


@pytest.fixture
def data(tmp_path):
    return draw_folder(tmp_path / "data", {"ant": 12, "bee": 6})


def no_run(tmp_path: Path) -> bool:
    return not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", HEADER_TELLS | PIXELS_TELL)
def test_an_error_names_the_file_and_leaves_nothing(kind, data, tmp_path, capsys):
    bad = data / "bee" / "3.png"
    (HEADER_TELLS | PIXELS_TELL)[kind](bad)
    assert main(["train", "--data", str(data), *WORDS, "--out", str(tmp_path / "run"), "-j", "0"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"equipoise: {bad} cannot be read \(.*\); repair .* --on-bad-image skip\n", said.err)
    assert ("run folder" in said.out) == (kind in PIXELS_TELL), "what headers tell is told before the plan is shown"
    assert no_run(tmp_path)


@pytest.mark.slow
def test_images_of_every_kind_are_trained_on(data, tmp_path):
    for number, make in enumerate(GOOD.values()):
        make(data / "ant" / f"{number}.png")
    recipe = load_recipe("pictures", data=str(data), arch="resnet8", size=16, epochs=1, batch_size=6, holdout=0)
    run = train(recipe, tmp_path / "run", progress=False)
    assert run.metrics["bad_images"] == {}


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
        assert train_line.startswith("6 images could not be read and were replaced by others of the same class: ")
        assert f"{data}/train/ant/0.png (it is no image" in train_line
        assert train_line.endswith("; and 1 more")
        assert test_line.startswith("1 image of the test part could not be read and was left out of its metrics: ")
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["bad_images"].keys() == {"train", "test"}
        assert metrics["bad_images"]["train"].keys() == bad.keys()
        assert metrics["bad_images"] == json.loads((run / "bad-images.json").read_text())
        assert metrics["test"]["images"] == 6
        weights.append(torch.load(run / "last.pt", weights_only=True)["weights"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_an_image_that_vanishes_during_training(data, tmp_path):
    recipe = load_recipe("pictures", data=str(data), arch="resnet8", size=16, epochs=1, batch_size=6, holdout=0)
    plan = prepare(recipe, tmp_path / "run")
    (data / "ant" / "7.png").unlink()
    reason = r"ant/7.png cannot be read \(no such file or directory\)"
    with pytest.raises(UserError, match=reason), start(plan) as session:
        session.run(progress=False)
    assert no_run(tmp_path)
    (data / "ant" / "7.png").write_bytes(png())
    plan = prepare(load_recipe("pictures", data=str(data), arch="resnet8", size=16, epochs=1, batch_size=6,
                               holdout=0, on_bad_image="skip"), tmp_path / "run")  # fmt: skip
    (data / "ant" / "7.png").unlink()
    with start(plan) as session:
        bad = session.run(progress=False).metrics["bad_images"]
    assert bad == {"train": {str(data / "ant" / "7.png"): "no such file or directory"}}


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_at_once() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "minutes"), [(ask_to_stop, 10.0), (stop_at_once, 0.00001)])
def test_an_interrupted_run_knows_the_bad_images_of_before(stop, minutes, data, tmp_path, monkeypatch):
    """The only bad one is in the first of three batches, and is not looked at again in that epoch: after a stop that
    was asked for, and after one at once that follows a save that was due."""
    recipe = load_recipe("pictures", data=str(data), arch="resnet8", size=16, epochs=2, batch_size=6, holdout=0,
                         workers=0, on_bad_image="skip", checkpoint_minutes=minutes, device="cpu")  # fmt: skip
    images = prepare(recipe, tmp_path / "run").parts.train
    bad = Path(images.images.name(int(permutation(recipe.seed, 0, len(images))[0])))
    truncate(bad)
    step, taken = torch.optim.SGD.step, []

    def stopping(self, *words):
        taken.append(1)
        if len(taken) == 2:
            stop()
        return step(self, *words)

    monkeypatch.setattr(torch.optim.SGD, "step", stopping)
    with pytest.raises((Stopped, KeyboardInterrupt)):
        train(recipe, tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == (3 if stop is ask_to_stop else 1)
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


def test_a_part_that_cannot_be_read_is_refused_with_skip_too(data, tmp_path, capsys):
    shutil.move(data, tmp_path / "train")
    shutil.move(tmp_path / "train", data / "train")
    draw_folder(data / "test", {"ant": 2})
    for number in range(2):
        HEADER_TELLS["text"](data / "test" / "ant" / f"{number}.png")
    words = ["train", "--data", str(data), *WORDS, "--out", str(tmp_path / "run"), "--on-bad-image=skip"]
    assert main(words) == 2
    assert f"{data}/test: none of the 2 images can be read; repair them" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_refuses_a_bad_image_or_leaves_it_out(data, tmp_path, capsys):
    recipe = load_recipe("pictures", data=str(data), arch="resnet8", size=16, epochs=1, batch_size=6, holdout=0.2)
    run = train(recipe, tmp_path / "run", progress=False)
    validation = prepare(recipe, tmp_path / "other").parts.validation
    assert validation is not None
    truncate(Path(validation.images.name(0)))
    assert main(["evaluate", str(run.path), "--device", "cpu"]) == 2
    assert f"{validation.images.name(0)} cannot be read" in capsys.readouterr().err
    assert main(["evaluate", str(run.path), "--device", "cpu", "--on-bad-image", "skip"]) == 0
    assert "1 image of the validation part could not be read and was left out" in capsys.readouterr().out
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
