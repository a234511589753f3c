"""A model to serve."""

import threading
from pathlib import Path

import pytest
from conftest import ODD_NAMES

from equipoise import load
from equipoise.deploy import serve


@pytest.fixture(scope="module")
def classifier(odd_run, tmp_path_factory):
    """Of `odd_run`; the features of its training images are kept in this object."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    loaded = load(odd_run)
    _ = loaded.train
    patch.undo()
    return loaded


@pytest.fixture
def picture(odd_run) -> Path:
    return odd_run.parent / "data" / "test" / ODD_NAMES[1] / "2.png"


@pytest.fixture
def held(monkeypatch):
    """The server's work on the first picture lasts until this is set; what was worked on is in `order`."""
    free, order, real = threading.Event(), list[bytes](), serve.look_at

    def look_at(classifier, content, *options):
        order.append(content)
        if len(order) == 1:
            free.wait(20)
        return real(classifier, content, *options)

    monkeypatch.setattr(serve, "look_at", look_at)
    yield free, order
    free.set()
