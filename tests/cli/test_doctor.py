"""What people are asked to paste into a bug report."""

import os
import re
import subprocess
import sys

import pytest
import torch

from equipoise import UserError
from equipoise.cli.main import main

NAMES = ["packages", "disk", "memory", "equipoise", "codecs", "machine", "devices", "threads", "hub"]
NAMES += ["weights", "speed"]


@pytest.mark.slow
def test_doctor():
    """In a process of its own, since huggingface_hub asks once, when it is imported, whether it is offline."""
    command = [sys.executable, "-m", "equipoise", "doctor"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(re.split(r"\s+", line, maxsplit=1) for line in done.stdout.splitlines())
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


def test_what_is_broken_is_the_last_line(capsys, monkeypatch):
    monkeypatch.setattr("PIL.features.get_supported", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    *before, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in before] == NAMES[:4]
    assert last == "FAILED    ZeroDivisionError: division by zero"


def test_neither_hub_nor_weights(capsys, monkeypatch):
    def find(_):
        raise UserError("the hub cannot be reached")

    monkeypatch.setattr("equipoise.method.pretrained.find_pretrained", find)
    assert main(["doctor"]) == 1
    *_, hub, last = capsys.readouterr().out.splitlines()
    assert hub.split(maxsplit=1) == ["hub", "not reached"]
    assert last == "FAILED    UserError: the hub cannot be reached"
