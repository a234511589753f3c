"""Files written whole or not at all; files of tensors: read as written, refused in one line, and never executed."""

import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from equipoise import UserError
from equipoise.base.files import atomic_file, load_tensors


def test_a_file_takes_its_name_when_it_is_complete(tmp_path):
    """A link stays a link to it."""
    path, link = tmp_path / "x", tmp_path / "link"
    path.write_bytes(b"before")
    link.symlink_to("x")
    with atomic_file(link) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "x"]


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


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    synced: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_size, os.listdir(tmp_path))))
    with atomic_file(tmp_path / "x") as file:
        file.write(b"after")
    assert synced[0][0] == len(b"after")
    assert "x" not in synced[0][1]


# ---- tensors


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("best", [57.25, torch.tensor(57.25), np.float64(57.25), np.float32(57.25)], ids=repr)
def test_files_as_torch_writes_them(zipped, best, tmp_path):
    weight = torch.randn(2, 3).T  # not contiguous
    table = {"state_dict": OrderedDict(a=weight), "best": best, "names": ("a", "b"), 3: [None]}
    torch.save(table, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=zipped)
    read = load_tensors(tmp_path / "x.pth.tar", "checkpoint")
    assert isinstance(read, dict)
    assert torch.equal(read["state_dict"]["a"], weight)
    assert float(read["best"]) == 57.25
    assert (read["names"], read[3]) == (("a", "b"), [None])


def test_a_number_of_an_older_numpy_and_safetensors(tmp_path):
    path = tmp_path / "x"
    torch.save({"best_acc1": np.float64(57.25)}, path, pickle_protocol=2, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"cnumpy._core.multiarray\nscalar\n" in content
    path.write_bytes(content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert load_tensors(path, "checkpoint") == {"best_acc1": 57.25}
    save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    assert load_tensors(tmp_path / "x.safetensors", "file of weights")["a"].tolist() == [0, 1, 2]


class Payload:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", [os.mkdir, os.system, exec, eval], ids=lambda function: function.__name__)
def test_a_payload_is_refused_and_not_run(function, zipped, tmp_path):
    mark, file = tmp_path / "executed", tmp_path / "x"
    code = {
        "mkdir": str(mark),
        "system": f"mkdir {mark}",
        "exec": f"import os; os.mkdir({str(mark)!r})",
        "eval": f"__import__('os').mkdir({str(mark)!r})",
    }[function.__name__]
    torch.save({"weights": Payload(function, code)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        load_tensors(file, "checkpoint")
    named = rf"it asks for '[\w.]*{function.__name__}', which was not run"
    assert re.search(named, str(error.value))
    assert "\n" not in str(error.value)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "it would have run"


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_absent_and_damaged_files(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(UserError, match="there is no checkpoint at"):
        load_tensors(path, "checkpoint")
    torch.save({"a": torch.zeros(1000)}, path)
    for content in (path.read_bytes()[:3000], b"", b"PK\x03\x04", b"\x80", b"hello", pickle.dumps([1]), None):
        path.unlink(missing_ok=True)
        path.write_bytes(content) if content is not None else path.mkdir()
        with pytest.raises(UserError, match=r"is no checkpoint that can be read \(.*\); take another, or copy it anew"):
            load_tensors(path, "checkpoint")
