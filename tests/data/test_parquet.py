"""Parquet as published for the `datasets` library: parts, columns, class names, and what is refused."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN, write_parquet

from equipoise import UserError
from equipoise.data.decode import decode
from equipoise.data.sources import Source, find_parts, open_parts


def test_parquet_parts_and_columns(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [2, 0])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [1])
    parts = open_parts(str(tmp_path))
    assert parts.train.class_counts == (2, 2, 1)
    assert parts.train.class_names == ("0", "1", "2")
    assert parts.test is not None
    assert parts.test.class_counts == (0, 1, 0)
    assert open_parts(str(tmp_path / "train-00000-of-00002.parquet")).train.class_counts == (1, 2)


def test_parquet_class_names_of_the_datasets_library(tmp_path):
    features = {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1, 2], metadata=metadata)
    assert open_parts(str(tmp_path)).train.class_names == ("cat", "dog", "emu")
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1, 3], metadata=metadata)
    with pytest.raises(UserError, match="row 2 has label 3, which is out of range: the classes are 0 to 2"):
        open_parts(str(tmp_path))


def test_parquet_columns_that_are_not_plain(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(path, [0, 1], label_column="fine_label", coarse_label=pa.array([0, 0], pa.int64()))
    assert open_parts(str(path)).train.class_counts == (1, 1), "CIFAR-100's own names: the fine label"
    write_parquet(path, [0, 1], label_column="fine", coarse=pa.array([0, 0], pa.int64()))
    with pytest.raises(UserError, match=r"fine, coarse; name it with --set data.label_column=NAME"):
        open_parts(str(path))
    assert open_parts(Source(str(path), label_column="fine")).train.class_counts == (1, 1)
    write_parquet(path, [0, 1], label_column="fine_label", coarse_label=pa.array([0, 0], pa.int64()))
    with pytest.raises(UserError, match="has no column 'labels'; it has img, fine_label, coarse_label"):
        open_parts(Source(str(path), label_column="labels"))
    with pytest.raises(UserError, match="column 'coarse_label' holds int64, not image bytes"):
        open_parts(Source(str(path), image_column="coarse_label", label_column="fine_label"))
    pq.write_table(pa.table({"label": [0, 1]}), path)
    with pytest.raises(UserError, match="has no column of images"):
        open_parts(str(path))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, -1, 1], "row 1 has label -1, which is out of range"),
        ([0, 2, 2], "class '1' has no training images"),
        ([0, 0], "has one class only"),
        ([], "has no rows"),
        ([0, None], "must hold a whole number in every row"),
        ([1700000000, 1700000001], "label 1700000001 is out of range: there are 2 rows only"),
    ],
)
def test_refused_labels(labels, sentence, tmp_path):
    write_parquet(tmp_path / "train.parquet", labels)
    with pytest.raises(UserError) as error:
        open_parts(str(tmp_path))
    assert sentence in str(error.value)


def test_a_test_label_that_training_does_not_know(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [0, 7])
    with pytest.raises(UserError, match=r"test.parquet: row 1 has label 7, which is out of range"):
        open_parts(str(tmp_path))


def test_parquet_files_of_no_part_are_not_trained_on(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "extra.parquet", [0, 1, 1])
    found = find_parts(str(tmp_path))
    assert found.parts["train"].class_counts == (1, 1)
    assert "extra.parquet" in found.notes[0]


def test_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"train.parquet needs pyarrow: .* -m pip install pyarrow"):
        open_parts(str(tmp_path))


def test_no_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_parts(str(tmp_path))


@pytest.mark.parametrize("names", ["[" * 100_000, '{"info":{"features":{"label":{"names":["a","a"]}}}}', "{}", '"x"'])
def test_odd_metadata_names_no_classes(names, tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1], metadata={"huggingface": names})
    assert open_parts(str(tmp_path)).train.class_names == ("0", "1")


def test_cifar10_as_published_for_the_datasets_library(shared_data):
    parts = open_parts(str(shared_data / "cifar10"), imbalance="exponential", imbalance_factor=100)
    assert parts.kind == "Parquet"
    assert list(parts.train.class_counts) == GOLDEN["long_tail_counts"]["cifar10_if100"]
    assert parts.test is not None
    assert parts.test.class_counts == (1000,) * 10
    assert decode(parts.test, 9999).shape == (32, 32, 3)
