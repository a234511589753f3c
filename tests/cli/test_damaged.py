"""Commands on run folders that were damaged, changed by hand, or hold names that are no text."""

import itertools
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_picture

from equipoise.cli.main import main
from equipoise.runs.checkpoint import load_checkpoint


@pytest.fixture
def run(odd_run, tmp_path):
    return shutil.copytree(odd_run, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", '{"last": {}, "best": 3}'])
def test_no_command_ends_in_a_traceback(content, run, tmp_path, capsys):
    (run / "metrics.json").write_text(content)
    picture = tmp_path / "a.png"
    draw_picture(picture, 0, 0)
    for words in (["report", run], ["predict", run, picture], ["export", run, "--to", "safetensors"]):
        assert main([str(word) for word in words]) == 2
        assert "metrics.json is damaged (" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 0, "which writes it anew"
    assert main(["predict", str(run), str(picture)]) == 0
    (run / "run.json").write_text(content)
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert "run.json is damaged (" in capsys.readouterr().err


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.slow
def test_a_pickle_among_what_the_report_draws_is_not_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("pickles.npz", **{"test/labels_N": np.array([Payload()]), "test/confidence_N": np.array([Payload()])})
    for planted in (pickle.dumps(Payload()), Path("pickles.npz").read_bytes()):
        (run / "observed.npz").write_bytes(planted)
        assert main(["report", str(run)]) == 2
        assert "observed.npz is damaged (" in capsys.readouterr().err
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert Path("executed").exists(), "it would have run"


@pytest.mark.long
def test_names_that_are_no_text(tmp_path, capsys, monkeypatch):
    """Of a picture, and of a class: they are carried through."""
    monkeypatch.chdir(tmp_path)
    seeds = itertools.count()
    for part, count in {"train": 6, "val": 3, "test": 3}.items():
        for label, name in enumerate(("ant", os.fsdecode(b"b\xffe"))):
            for number in range(count):
                draw_picture(Path("data") / part / name / f"{number}.png", label, next(seeds))
            Path(f"data/{part}/{name}/0.png").rename(f"data/{part}/{name}/\udcff.png")
    small = ["--arch", "resnet8", "--size", "16", "--epochs", "1", "-b", "4", "--workers", "0"]
    small += ["--set", "optim.warmup_epochs=0"]
    for words in (
        ["data", "data"], ["data", "data", "--check"], ["train", "--data", "data", "--out", "run", *small],
        ["report", "run"], ["evaluate", "run", "--logits", "logits.npz"], ["predict", "run", "data/test"],
        ["predict", "run", "data/test", "--csv", "o.csv"], ["predict", "run", "data/test", "--json", "o.json"],
        ["export", "run", "--to", "onnx"], ["export", "run", "--to", "torch-export"],
        ["export", "run", "--to", "safetensors"], ["pack", "data", "--out", "packed"], ["data", "packed"],
        ["train", "--data", "packed", "--out", "again", *small], ["train", "--resume", "again", "--epochs", "2"],
    ):  # fmt: skip
        assert main(words) == 0, (words, capsys.readouterr().err)
    files = [row["file"] for row in json.loads(Path("o.json").read_text())["predictions"]]
    assert sum("\udcff.png" in file for file in files) == 2
    assert r"\udcff.png" in Path("o.csv").read_text()
    assert r"b\udcffe" in Path("run/report.html").read_text()
    assert load_checkpoint("again/last.pt").class_names == ("ant", "b\udcffe")
