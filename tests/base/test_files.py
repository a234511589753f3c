"""Files that are written whole or not at all."""

import os

import pytest

from equipoise.base.files import atomic_file


def test_a_file_takes_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with atomic_file(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()], ids=repr)
def test_what_fails_leaves_the_file_as_it_was(error, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with pytest.raises(type(error)) as raised, atomic_file(path) as file:  # noqa: PT012
        file.write(b"after")
        raise error
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["x"]
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(path), "the system does not say which file had no room"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_bytes(b"before")
    (tmp_path / "link").symlink_to("target")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"after"


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    synced: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_size, os.listdir(tmp_path))))
    with atomic_file(tmp_path / "x") as file:
        file.write(b"after")
    assert synced[0][0] == len(b"after")
    assert "x" not in synced[0][1]
