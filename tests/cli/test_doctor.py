"""What people are asked to paste into a bug report."""

import re

import pytest
import torch

from equipoise.cli import doctor
from equipoise.cli.main import main

NAMES = ["packages", "disk", "memory", "equipoise", "codecs", "machine", "devices", "threads", "hub"]
NAMES += ["weights", "speed"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMED_FOR", 0.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
def test_doctor(quick, capsys):
    assert main(["doctor"]) == 0
    said = dict(re.split(r"\s+", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == NAMES
    assert f"torch {torch.__version__.partition('+')[0]}" in said["packages"]
    assert "pytest" not in said["packages"], "what users do not need"
    assert "GiB here" in said["disk"]
    assert "jpg" in said["codecs"]
    assert f"{torch.get_num_threads()} of torch" in said["threads"]
    assert said["hub"] == "not reached"
    assert said["weights"].startswith("tf_efficientnet_lite0: ")
    time = r"[\d.]+ (s|min|h)"
    assert re.fullmatch(rf"1,000 images .* --tune frozen {time}, an epoch of --tune full {time}", said["speed"])


def test_what_is_broken_is_the_last_line(quick, capsys, monkeypatch):
    monkeypatch.setattr("PIL.features.get_supported", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    *before, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in before] == NAMES[:4]
    assert last == "FAILED    ZeroDivisionError: division by zero"
