"""The benchmarks start, and `make bench` names what has fallen. Their figures are not tested: no clock here."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import EXPECTED, HIGHER_IS_BETTER, fallen
from benchmarks.gpu.__main__ import STAGES, end_with_all, run_stage
from benchmarks.gpu.figures import Figures, table
from benchmarks.gpu.kit import copy

NAMES = sorted(path.stem for path in EXPECTED.parent.glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_package(name):
    """One that takes from the package what is no longer there cannot be imported."""
    assert importlib.import_module(f"benchmarks.{name}").__doc__, "it says what it measures"


def test_expected_figures_are_of_benchmarks_that_are_there():
    expected = json.loads(EXPECTED.read_text())
    assert set(expected) <= set(NAMES)
    others = {(name, figure) for name in set(expected) - {"loss"} for figure in expected[name]}
    assert {f"{name}.{figure}" for name, figure in others if figure.startswith("ratio")} == HIGHER_IS_BETTER
    assert all(value > 0 for figures in expected.values() for value in figures.values())


def test_what_is_worse_by_more_than_a_fifth_is_named():
    expected = {"input": {"ratio": 5.0}, "loss": {"ratio": 1.0}}
    assert fallen({"input": {"ratio": 4.2}, "loss": {"ratio": 1.19}}, expected) == []
    wide = {"loss": {"memory_share_wide": 0.1}}
    assert fallen({"loss": {"memory_share_wide": 0.05}}, wide) == []
    assert fallen({"loss": {"memory_share_wide": 0.5}}, wide) == ["loss: memory_share_wide is 0.5, 0.1 was expected"]
    assert fallen({"input": {"ratio": 9.0}, "loss": {"ratio": 0.2}}, expected) == [], "better is no fault"
    assert fallen({"input": {"ratio": 4.1}, "loss": {"ratio": 1.21}}, expected) == [
        "input: ratio is 4.1, 5 was expected",
        "loss: ratio is 1.21, 1 was expected",
    ]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_nothing_grows_over_twelve_epochs():
    """The short form of `make long-run`."""
    command = [sys.executable, "-m", "benchmarks.long_run", "--epochs", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"digits", "photographs"}
    assert all(figures.keys() == {"memory", "more_files", "more_processes"} for figures in found.values())


# ---- what a machine with a GPU is tried with


@pytest.mark.long
def test_every_stage_of_the_gpu_kit_is_rehearsed(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = tmp_path / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text(encoding="utf-8")[-3000:]
    lines = Figures(tmp_path / "figures.jsonl").read()
    assert list(dict.fromkeys(line["stage"] for line in lines)) == [*STAGES]
    assert done.stdout.count("seconds of this stage") == len(STAGES)
    metrics = json.loads((tmp_path / "cifar10-lt-bcl-0.json").read_text(encoding="utf-8"))
    top1 = next(line for line in lines if line["figure"] == "bcl, seed 0, top-1")
    assert top1["value"] == pytest.approx(100 * metrics["last"]["test"]["top1"])


@pytest.mark.long
def test_a_stage_that_fails_says_why_and_the_next_one_runs(tmp_path):
    """There is a folder of photographs, but none is in it; the stage after `input` needs none."""
    (tmp_path / "photos").mkdir()
    words = f"-m benchmarks.gpu --photos {tmp_path}/photos --only input resume --rehearse --out {tmp_path}/out".split()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = Figures(tmp_path / "out" / "figures.jsonl").read()
    said = f"{tmp_path / 'photos'} holds no JPEG files (.jpg, .jpeg); name a folder of photographs"
    assert {line["stage"]: line["value"] for line in lines if line["figure"] == "failed"} == {
        "input": f"exit code 1: {said}"
    }
    assert any(line["figure"].startswith("killed, resumed from step") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_what_a_stage_has_started_ends_with_it(tmp_path):
    """A child in a process group of its own, as torchrun's ranks are."""
    program = "import subprocess, sys, time; child = subprocess.Popen(['sleep', '600'], start_new_session=True); "
    program += "print(child.pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        end_with_all(process)
    assert process.returncode == -9
    end = time.monotonic() + 20
    while (status := Path(f"/proc/{child}/stat")).exists() and " Z " not in status.read_text(encoding="utf-8"):
        assert time.monotonic() < end, "the child lives"
        time.sleep(0.02)


def test_a_stage_is_ended_at_its_limit(tmp_path):
    words = ["--stage", "facts", "--rehearse", "--out", str(tmp_path), "--seconds", "9"]
    assert "it was not done after" in (run_stage(words, 0.2, tmp_path / "log.txt") or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that must be missing")
def test_without_a_gpu_only_a_rehearsal_is_run(tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", "--only", "facts", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch finds no CUDA GPU here; --rehearse" in done.stderr


def test_what_travels_to_a_machine_with_a_gpu(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    copy([tmp_path / "a.jpg", tmp_path / "b.jpg"], tmp_path / "kit")
    assert {(path.name, path.read_bytes()) for path in (tmp_path / "kit").iterdir()} == {
        ("a.jpg", b"a.jpg"),
        ("b.jpg", b"b.jpg"),
    }
    with pytest.raises(SystemExit, match="nothing to copy"):
        copy([], tmp_path / "other")


def test_the_table_of_figures(tmp_path):
    figures = Figures(tmp_path / "figures.jsonl")
    figures.add("step", "bf16", 1631.4, "images/s", batch=256)
    figures.add("step", "failed", "no memory")
    rows = [line.split() for line in table(figures.read()).splitlines()]
    assert rows == [[], ["step", "bf16", "1,631", "images/s"], ["failed", "no", "memory"]]
