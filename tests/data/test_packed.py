"""Packed files: shared, not copied; damaged ones are told from whole ones."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import draw_folder

from equipoise import UserError
from equipoise.config.recipe import Data
from equipoise.data.decode import decode
from equipoise.data.pack import pack
from equipoise.data.sources import find_parts, open_part


@pytest.fixture
def out(pictures, tmp_path) -> Path:
    pack(find_parts(str(pictures)), tmp_path / "out", 256, 0)
    return tmp_path / "out"


def test_subsets_and_other_processes_see_the_same(out):
    images = find_parts(str(out)).parts["train"]
    some = images.take(np.array([20, 3, 3]))
    contents = [images.images.content(index) for index in (20, 3, 3)]
    assert [some.images.content(index) for index in range(3)] == contents
    assert some.images.name(0).startswith("cat/2.png in ")
    assert len({some.fingerprint(), images.fingerprint(), images.take(np.array([3, 20, 3])).fingerprint()}) == 3
    sent = pickle.dumps(some)
    assert len(sent) < (out / "train.pack").stat().st_size / 4, "to a process that does not share, the path is sent"
    assert pickle.loads(sent).images.content(0) == contents[0]


def test_one_file_is_a_data_set_too(out):
    assert len(find_parts(str(out / "train.pack")).parts["train"]) == 21
    assert open_part(Data(str(out)), "test", ("ant", "bee", "cat")).class_counts == (12, 6, 3)


def test_a_changed_image_is_named(out):
    path = out / "train.pack"
    content = path.read_bytes()
    image = find_parts(str(out)).parts["train"].images.content(0)
    place = content.index(image) + len(image) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    images = find_parts(str(out)).parts["train"]
    with pytest.raises(UserError) as error:
        decode(images, 0)
    assert str(error.value).startswith(
        f"ant/0.png in {out}/train.pack cannot be read (its bytes have changed since they were packed); "
    )
    decode(images, 1)


def other_arrow_file(path: Path) -> bytes:
    table = pa.table({"image": [b"x"]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        *[lambda path, share=share: path.read_bytes()[: int(share * path.stat().st_size)] for share in (0, 0.3, 0.999)],
        lambda path: b"equipoise packed images 1\n" + bytes(200),  # the first format
        other_arrow_file,
    ],
)
def test_what_is_no_whole_file_of_packed_images(damage, out):
    (out / "train.pack").write_bytes(damage(out / "train.pack"))
    with pytest.raises(UserError, match=r"train.pack is no whole file of packed images .*; copy it again, or pack"):
        find_parts(str(out))


def test_without_pyarrow(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"train.pack needs pyarrow: .* -m pip install pyarrow"):
        find_parts(str(out))


def test_files_that_do_not_belong_together(out, tmp_path):
    other = draw_folder(tmp_path / "other", {"dog": 3, "eel": 3})
    pack(find_parts(str(other)), tmp_path / "second", 256, 0)
    (tmp_path / "second" / "train.pack").rename(out / "test.pack")
    with pytest.raises(UserError, match=r"were not packed together"):
        find_parts(str(out))
