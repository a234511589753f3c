"""The benchmarks start, and `make bench` names what has fallen. Their figures are not tested: no clock here."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import ALLOWED, EXPECTED, HIGHER_IS_BETTER, fallen

NAMES = sorted(path.stem for path in EXPECTED.parent.glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_package(name):
    """One that takes from the package what is no longer there cannot be imported."""
    assert importlib.import_module(f"benchmarks.{name}").__doc__, "it says what it measures"


def test_expected_figures_are_of_benchmarks_that_are_there():
    expected = json.loads(EXPECTED.read_text())
    assert set(expected) <= set(NAMES)
    assert {
        f"{name}.{figure}"
        for name, figures in expected.items()
        for figure in figures
        if figure.startswith("ratio") and name != "loss"
    } == HIGHER_IS_BETTER
    assert all(value > 0 for figures in expected.values() for value in figures.values())
    assert Path(EXPECTED).name == "expected.json"


def test_what_is_worse_by_more_than_a_fifth_is_named():
    expected = {"input": {"ratio": 5.0}, "loss": {"ratio": 1.0}}
    assert ALLOWED == 1.2
    assert fallen({"input": {"ratio": 4.2}, "loss": {"ratio": 1.19}}, expected) == []
    wide = {"loss": {"memory_share_wide": 0.1}}
    assert fallen({"loss": {"memory_share_wide": 0.05}}, wide) == []
    assert fallen({"loss": {"memory_share_wide": 0.5}}, wide) == ["loss: memory_share_wide is 0.5, 0.1 was expected"]
    assert fallen({"input": {"ratio": 9.0}, "loss": {"ratio": 0.2}}, expected) == [], "better is no fault"
    assert fallen({"input": {"ratio": 4.1}, "loss": {"ratio": 1.21}}, expected) == [
        "input: ratio is 4.1, 5 was expected",
        "loss: ratio is 1.21, 1 was expected",
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_nothing_grows_over_twelve_epochs():
    """The short form of `make long-run`."""
    command = [sys.executable, "-m", "benchmarks.long_run", "--epochs", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"digits", "photographs"}
    assert all(figures.keys() == {"memory", "more_files", "more_processes"} for figures in found.values())
