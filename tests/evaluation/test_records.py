"""Run folders that were changed by hand: every value of every file replaced, and a line or a result for each."""

import copy
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_picture

from benchmarks.fuzz import _log, _metrics, _npz, _observed, _read_run_folder, _record
from equipoise import UserError
from equipoise.cli.main import main
from equipoise.report.read import read_runs
from equipoise.runs.checkpoint import load_checkpoint

NUMBERS = [True, -1, 0, 2**70, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf")]
ODD = [None, *NUMBERS, "", "x", "\ud800", [], [[]], {}, {"a": 1}]
GONE = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def with_odd(table: Any, path: tuple[Any, ...], odd: object) -> Any:
    if not path:
        return None if odd is GONE else odd
    changed = copy.deepcopy(table)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if odd is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return changed


def read(folder: Path, name: str, content: bytes) -> str:
    """What is said against it; '' of what can be shown."""
    (folder / name).write_bytes(content)
    try:
        _read_run_folder(folder / name)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "table"), [("metrics.json", _metrics()), ("run.json", _record())])
def test_any_value_replaced(name, table, tmp_path):
    said = [
        read(tmp_path, name, json.dumps(with_odd(table, path, odd)).encode())
        for path in places(table)
        for odd in (*ODD, GONE)
        if len(path) < 3 or (path[0] not in ("test", "validation") and path[1] != "validation")
    ]
    assert len(said) > 400
    assert not any("\n" in text for text in said)
    assert 0.5 < sum(map(bool, said)) / len(said) < 1
    assert read(tmp_path, name, json.dumps(table).encode()) == ""


def test_any_value_of_a_line_replaced(tmp_path):
    lines = [json.loads(line) for line in _log().splitlines()]
    for path in places(lines[1], ()):
        for odd in (*ODD, GONE):
            changed = [lines[0], with_odd(lines[1], path, odd), lines[2]]
            said = read(tmp_path, "metrics.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in changed))
            assert said == "" or "metrics.jsonl, line 2 is damaged; remove that line" in said
    assert "line 1 is damaged" in read(tmp_path, "metrics.jsonl", _log().replace(b"2.5", b"NaN"))


def test_a_whole_last_line_counts_without_its_end_and_a_half_one_does_not(tmp_path):
    _read_run_folder(tmp_path / "recipe.toml.bak")  # which writes all of them

    def lines(content: bytes) -> int:
        (tmp_path / "metrics.jsonl").write_bytes(content)
        return len(read_runs([tmp_path])[0].log)

    assert lines(_log()) == 3
    assert lines(_log().removesuffix(b"\n")) == 3
    assert lines(_log().removesuffix(b"}\n")) == 2


def arrays(**changed: Any) -> bytes:
    kept = {name: values for name, values in {**_observed(), **changed}.items() if values is not None}
    files = {name: io.BytesIO() for name in kept}
    for name, file in files.items():
        np.save(file, kept[name], allow_pickle=True)
    return _npz({name: file.getvalue() for name, file in files.items()})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"labels_N": np.repeat(np.arange(4), 3)[:9] + 1}, "labels_N holds what it cannot"),
        ({"labels_N": -np.ones(9, np.int64)}, "labels_N holds what it cannot"),
        ({"labels_N": np.zeros(9)}, "labels_N is not of its kind"),
        ({"labels_N": np.zeros((9, 1), np.int64)}, "labels_N is not of its kind"),
        ({"labels_N": np.zeros(0, np.int64)}, "arrays of no images"),
        ({"labels_N": None}, "labels_N is missing"),
        ({"predicted_N": np.zeros(8, np.int64)}, "predicted_N is not of its kind"),
        ({"predicted_N": None}, "predicted_N is missing"),
        ({"confidence_N": np.full(9, np.nan)}, "confidence_N holds what it cannot"),
        ({"confidence_N": np.full(9, 2.0)}, "confidence_N holds what it cannot"),
        ({"calibrated_N": np.array(["x"] * 9)}, "calibrated_N is not of its kind"),
        ({"calibrated_N": np.array([{}] * 9)}, "its content makes no sense"),
        ({"map_MF": np.ones((9, 1))}, "arrays of no images"),
        ({"map_MF": np.full((9, 4), np.inf)}, "map_MF holds what it cannot"),
        ({"map_rows_M": np.arange(9) + 1}, "map_rows_M holds what it cannot"),
        ({"encoder_spread_C": np.zeros(4)}, "encoder_spread_C is not of its kind"),
        ({"classifier_cosines_GK": np.zeros((3, 10), np.int64)}, "classifier_cosines_GK is not of its kind"),
        ({"classifier_cosines_GK": np.full((3, 200), 2**62)}, "classifier_cosines_GK holds what it cannot"),
        ({"something": np.zeros(2)}, "something is not of its kind"),
    ],
)
def test_changed_arrays(changed, reason, tmp_path):
    said = read(tmp_path, "observed.npz", arrays(**changed))
    assert "observed.npz is damaged (" in said
    assert reason in said
    assert said.endswith(f"write it anew: equipoise evaluate {tmp_path}")


def test_features_that_are_all_the_same_have_no_map(tmp_path):
    observed = _observed()
    rows = {"map_rows_M": np.arange(20) % 9}
    assert read(tmp_path, "observed.npz", arrays(**observed | rows | {"map_MF": np.full((20, 4), 0.5)})) == ""


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_a_pickle_among_the_arrays_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted = pickle.dumps(Payload())
    assert "observed.npz is damaged (" in read(tmp_path, "observed.npz", planted)
    assert "observed.npz is damaged (" in read(
        tmp_path, "observed.npz", _npz({"labels_N": planted, "confidence_N": planted})
    )
    assert "is damaged (" in read(tmp_path, "observed.npz", arrays(labels_N=np.array([Payload()])))
    assert not Path("executed").exists()
    pickle.loads(planted)
    assert Path("executed").exists(), "it would have run"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"last": {}, "best": 3}'])
def test_no_command_ends_in_a_traceback(content, odd_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(odd_run, run)
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


# ---- names that are no UTF-8


@pytest.mark.slow
def test_names_that_are_no_text(tmp_path, capsys, monkeypatch):
    """Of a picture, and of a class: they are carried through."""
    monkeypatch.chdir(tmp_path)
    for part, count in {"train": 6, "val": 3, "test": 3}.items():
        for label, name in enumerate(("ant", os.fsdecode(b"b\xffe"))):
            for number in range(count):
                draw_picture(Path("data") / part / name / f"{number}.png", label, 10 * label + number)
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
    capsys.readouterr()
    for words, said in (
        (
            ["train", "--data", "data", "--out", "r\udcff", *small],
            r"r\udcff has a name that is no UTF-8",
        ),
        (["train", "--data", "d\udcff", *small], r"there is no file or folder at d\udcff"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
