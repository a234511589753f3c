"""A finished run of two epochs on digits, for tests of what goes on from it."""

import shutil
from pathlib import Path

import pytest
from synthetic import TWO_EPOCHS

from equipoise import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(TWO_EPOCHS, tmp_path_factory.mktemp("runs") / "run", progress=False).path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")
