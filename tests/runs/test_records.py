"""run.json, metrics.json and bad-images.json: what is written is read, and what was damaged is one clear line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from equipoise import UserError
from equipoise.runs.folder import write_json
from equipoise.runs.records import read_bad_images, read_metrics, read_record

COUNTS = {"ant": 120, "bee": 30, "cat": 2}


def a_record() -> dict[str, Any]:
    return {
        "command": "equipoise train", "started": "2026-11-24T12:00:00Z", "precision": "fp32", "launch": "",
        "processes": 1, "versions": {"torch": "2.14.1"}, "machine": {"device": "cpu", "threads": 1},
        "git": {"commit": "f00", "changed": False}, "class_counts": dict(COUNTS),
        "data": {"kind": "class folders", "lists": [], "notes": [], "fingerprints": {"train": "f00", "test": "f01"},
                 "images": {"train": 152, "test": 9}},
    }  # fmt: skip


def some_metrics() -> dict[str, Any]:
    row = {"tau": 1.0, "top1": 0.7, "mean_per_class": 0.5, "many": 1.0, "medium": 0.5, "few": 0.0}
    part = {
        "images": 9, "top1": 0.7, "top5": None, "mean_per_class": 0.5, "many": 1.0, "medium": 0.5, "few": 0.0,
        "macro_f1": 0.5, "worst_class": 0.0, "worst_tenth": 0.0, "ece": 0.1, "per_class": [1.0, 0.5, None],
        "prior_sweep": [{**row, "tau": 0.0}, row],
    }  # fmt: skip
    post_hoc = {"tau": 1.0, "chosen_on": "validation", "validation": row, "test": row}
    block = {"epoch": 2, "step": 6, "validation": part, "test": part, "post_hoc": post_hoc, "temperature": 1.5}
    return copy.deepcopy(
        {"method": "bcl", "test": part, "validation": part, "last": block, "best": {**block, "epoch": 1},
         "bad_images": {"test": {"a.jpg": "empty"}}, "class_names": list(COUNTS),
         "train_counts": list(COUNTS.values())}
    )  # fmt: skip


def changed(table: Any, place: str, value: Any) -> Any:
    """`table` with another value at `place`, a path of keys with dots between; without that key where it is `...`."""
    table = copy.deepcopy(table)
    inner, (*path, last) = table, [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in path:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return table


def refused(read: Any, file: Path) -> str:
    with pytest.raises(UserError) as error:
        read(file)
    said = str(error.value)
    assert said.startswith(f"{file} is damaged (")
    assert "\n" not in said
    return said


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / "metrics.json", {**some_metrics(), "best_lost": None})  # as an earlier version did
    assert read_metrics(tmp_path / "metrics.json") == some_metrics()
    write_json(tmp_path / "run.json", {**a_record(), "of a later version": 1})
    assert read_record(tmp_path / "run.json") == a_record()
    bad = {"test": {"p\udcff.png": "empty"}}  # a file name that is no UTF-8
    write_json(tmp_path / "bad-images.json", bad)
    assert read_bad_images(tmp_path / "bad-images.json") == bad


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("best", None), ("bad_images", ...), ("validation", None), ("last.step", ...), ("last.post_hoc", None),
        ("last.temperature", None), ("test.per_class", [None] * 3), ("test.prior_sweep", None),
    ],
)  # fmt: skip
def test_what_may_be_absent(place, value, tmp_path):
    """Nothing absent becomes 0."""
    table = changed(some_metrics(), place, value)
    write_json(tmp_path / "metrics.json", table)
    assert read_metrics(tmp_path / "metrics.json") == table


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("last", ...), ("best", 3), ("method", None), ("class_names", ["ant", 1, "cat"]), ("test.top1", None),
        ("test.top1", "0.5"), ("last.epoch", 0.5), ("best.validation.prior_sweep.1.tau", None),
        ("last.post_hoc.validation", ...), ("bad_images", {"test": ["a.jpg"]}),
    ],
)  # fmt: skip
def test_metrics_that_were_changed(place, value, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(changed(some_metrics(), place, value)))
    assert refused(read_metrics, tmp_path / "metrics.json").endswith("write it anew with equipoise evaluate")


@pytest.mark.parametrize(
    ("place", "value"),
    [("data", ...), ("data.fingerprints.train", 3), ("started", 5), ("class_counts.ant", "3"), ("processes", [1])],
)
def test_a_record_that_was_changed(place, value, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(changed(a_record(), place, value)))
    assert refused(read_record, tmp_path / "run.json").endswith("name another run, or train it anew")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("read", [read_metrics, read_record, read_bad_images])
def test_a_file_that_is_something_else(read, content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    assert "file.json is damaged" in refused(read, tmp_path / "file.json")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        read_record(tmp_path / "run.json")
