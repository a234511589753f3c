"""Parquet as published for the `datasets` library: parts, columns, class names, and what is refused."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN, opened, write_parquet

from equipoise import UserError
from equipoise.data.decode import decode


def test_parts_are_told_by_the_names_of_files(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [2, 0])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [1])
    write_parquet(tmp_path / "extra.parquet", [0, 1, 1])
    parts = opened(tmp_path)
    assert parts.train.class_counts == (2, 2, 1)
    assert parts.train.class_names == ("0", "1", "2")
    assert parts.test.class_counts == (0, 1, 0)
    assert "extra.parquet" in parts.notes[0]
    assert opened(tmp_path / "train-00000-of-00002.parquet").train.class_counts == (1, 2)


def test_class_names_of_the_datasets_library(tmp_path):
    features = {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1, 2], metadata=metadata)
    assert opened(tmp_path).train.class_names == ("cat", "dog", "emu")
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1, 3], metadata=metadata)
    with pytest.raises(UserError, match="row 2 has label 3, which is out of range: the classes are 0 to 2"):
        opened(tmp_path)


def test_columns_that_are_not_plain(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(path, [0, 1], label_column="fine_label", coarse_label=pa.array([0, 0], pa.int64()))
    assert opened(path).train.class_counts == (1, 1), "CIFAR-100's own names: the fine label"
    for column in ({"label_column": "labels"}, {"image_column": "coarse_label"}):
        with pytest.raises(UserError, match=r"which column is data.\w+_column\? name it with --set .*there is \w+"):
            opened(path, **column)
    write_parquet(path, [0, 1], label_column="fine", coarse=pa.array([0, 0], pa.int64()))
    with pytest.raises(UserError, match=r"with --set data.label_column=NAME; of its type there is fine, coarse"):
        opened(path)
    assert opened(path, label_column="fine").train.class_counts == (1, 1)
    pq.write_table(pa.table({"label": [0, 1]}), path)
    with pytest.raises(UserError, match=r"train.parquet: no column names images below its folder \(columns: .label.;"):
        opened(path)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, -1, 1], "row 1 has label -1, which is out of range"),
        ([0, 2, 2], "class '1' has no training images"),
        ([0, 0], "has one class only"),
        ([], "has no rows"),
        ([0, None], "must hold a label in every row"),
        ([1700000000, 1700000001], "label 1700000001 is out of range: there are 2 rows only"),
    ],
)
def test_refused_labels(labels, sentence, tmp_path):
    write_parquet(tmp_path / "train.parquet", labels)
    with pytest.raises(UserError) as error:
        opened(tmp_path)
    assert sentence in str(error.value)


def test_refused_files(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [0, 7])
    with pytest.raises(UserError, match=r"test.parquet: row 1 has label 7, which is out of range"):
        opened(tmp_path)
    (tmp_path / "test.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        opened(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"\.parquet needs pyarrow: .* -m pip install pyarrow"):
        opened(tmp_path)


@pytest.mark.parametrize("names", ["[" * 100_000, '{"info":{"features":{"label":{"names":["a","a"]}}}}', "{}", '"x"'])
def test_odd_metadata_names_no_classes(names, tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1], metadata={"huggingface": names})
    assert opened(tmp_path).train.class_names == ("0", "1")


def test_cifar10_as_published_for_the_datasets_library(shared_data):
    parts = opened(shared_data / "cifar10", imbalance_factor=100)
    assert parts.kind == "Parquet"
    assert list(parts.train.class_counts) == GOLDEN["long_tail_counts"]["cifar10_if100"]
    assert parts.test.class_counts == (1000,) * 10
    assert decode(parts.test, 9999).shape == (32, 32, 3)
