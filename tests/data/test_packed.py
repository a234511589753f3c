"""Packed files: shared, not copied; damaged ones are told from whole ones."""

import pickle
import shlex
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from conftest import draw_folder, refusal

from equipoise import UserError
from equipoise.cli.main import main
from equipoise.data.decode import content_of, decode
from equipoise.data.pack import pack
from equipoise.data.sources import find_parts, open_part


@pytest.fixture
def out(pictures, tmp_path) -> Path:
    pack(find_parts(str(pictures)), "", tmp_path / "out", 256, 0)
    return tmp_path / "out"


def test_subsets_and_other_processes_see_the_same(out):
    images = find_parts(str(out)).parts["train"]
    some = images.take(np.array([20, 3, 3]))
    assert [content_of(some, index) for index in range(3)] == [content_of(images, index) for index in (20, 3, 3)]
    assert some.images.name(0).startswith("cat/2.png in ")
    assert len({some.fingerprint(), images.fingerprint(), images.take(np.array([3, 20, 3])).fingerprint()}) == 3
    sent = pickle.dumps(images)
    assert len(sent) < (out / "train.pack").stat().st_size / 4, "to a process that does not share, the path is sent"
    assert content_of(pickle.loads(sent), 7) == content_of(images, 7)


def test_one_file_is_a_data_set_too(out):
    assert len(find_parts(str(out / "train.pack")).parts["train"]) == 21
    assert open_part(str(out), "test", ("ant", "bee", "cat")).class_counts == (12, 6, 3)


def test_a_changed_image_is_named(out):
    path = out / "train.pack"
    content = path.read_bytes()
    image = content_of(find_parts(str(out)).parts["train"], 0)
    place = content.index(image) + len(image) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    images = find_parts(str(out)).parts["train"]
    with pytest.raises(UserError) as error:
        decode(images, 0)
    assert str(error.value) == (
        f"ant/0.png in {out}/train.pack cannot be read (its bytes have changed since they were packed); "
        "repair or remove it, or pass over such images with --on-bad-image skip"
    )
    decode(images, 1)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_part_of_a_file_is_no_file(out, share):
    content = (out / "train.pack").read_bytes()
    (out / "train.pack").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"train.pack is no whole file of packed images"):
        find_parts(str(out))


def test_other_arrow_files_are_told(out):
    table = pa.table({"image": [b"x"]})
    with pa.ipc.new_file(str(out / "train.pack"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"train.pack is no whole file of packed images"):
        find_parts(str(out))


def test_the_format_of_earlier_versions_is_refused(out):
    (out / "train.pack").write_bytes(b"equipoise packed images 1\n" + bytes(200))
    with pytest.raises(UserError, match=r"train.pack was packed by an older version, .*; pack the images again"):
        find_parts(str(out))


def test_without_pyarrow(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"train.pack needs pyarrow: .* -m pip install pyarrow"):
        find_parts(str(out))


def test_files_that_do_not_belong_together(out, tmp_path):
    other = draw_folder(tmp_path / "other", {"dog": 3, "eel": 3})
    pack(find_parts(str(other)), "", tmp_path / "second", 256, 0)
    (tmp_path / "second" / "train.pack").rename(out / "test.pack")
    with pytest.raises(UserError, match=r"were not packed together"):
        find_parts(str(out))


def test_what_pack_says(tmp_path, capsys, monkeypatch):
    data, out = tmp_path / "my pictures", tmp_path / "it's packed"
    draw_folder(data / "train", {"ant": 2, "bee": 1})
    words = ["pack", str(data), "--out", str(out), "--workers", "0"]
    said = refusal(capsys, *words, "--set", "data.on_bad_image=skip")
    assert said == "pack leaves out no bad image: equipoise data FOLDER --check lists them; repair or remove them"
    assert main(words) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("train on it: ")
    assert shlex.split(command)[1:] == ["train", "--data", str(out)]
    draw_folder(data / "test", {"ant": 2, "bee": 1})
    monkeypatch.setattr("equipoise.data.pack._write", Mock(side_effect=OSError(28, "No space left on device")))
    assert refusal(capsys, *words) == (
        f"{out}/test.pack could not be written (no space left on device); make room there and start again: parts that "
        "are complete are kept"
    )
    assert [path.name for path in out.iterdir()] == ["train.pack"]
