"""run.json, metrics.json and bad-images.json: what is written is read, and what was damaged is one clear line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_run

from equipoise import UserError
from equipoise.runs.folder import write_json
from equipoise.runs.records import read_bad_images, read_metrics, read_record

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Any]:
    """What the files of a run hold, by name."""
    run = write_run(tmp_path_factory.mktemp("run") / "run", (120, 30, 2), names=CLASSES)
    return {name: json.loads((run / name).read_text()) for name in ("run.json", "metrics.json")}


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


@pytest.mark.parametrize(("name", "read"), [("metrics.json", read_metrics), ("run.json", read_record)])
def test_what_is_written_is_read(name, read, files, tmp_path):
    """And what other versions write beside it is passed over."""
    assert files["metrics.json"]["class_names"] == CLASSES
    write_json(tmp_path / name, {**files[name], "best_lost": None, "of a later version": 1})
    assert read(tmp_path / name) == files[name]


def test_names_that_are_no_text(tmp_path):
    bad = {"test": {"p\udcff.png": "empty"}}
    write_json(tmp_path / "bad-images.json", bad)
    assert read_bad_images(tmp_path / "bad-images.json") == bad


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("bad_images", {"test": {"a.jpg": "empty"}}), ("validation", None), ("last.step", 6), ("last.post_hoc", None),
        ("last.temperature", None), ("test.per_class", [None] * 3), ("test.prior_sweep", None),
    ],
)  # fmt: skip
def test_what_may_be_absent(place, value, files, tmp_path):
    """Nothing absent becomes 0."""
    table = changed(files["metrics.json"], place, value)
    write_json(tmp_path / "metrics.json", table)
    assert read_metrics(tmp_path / "metrics.json") == table


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("last", ...), ("best", 3), ("method", None), ("class_names", ["ant", 1, "cat"]), ("test.top1", None),
        ("test.top1", "0.5"), ("last.epoch", 0.5), ("last.validation.prior_sweep.1.tau", None),
        ("last.post_hoc.validation", ...), ("bad_images", {"test": ["a.jpg"]}),
    ],
)  # fmt: skip
def test_metrics_that_were_changed(place, value, files, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(changed(files["metrics.json"], place, value)))
    assert refused(read_metrics, tmp_path / "metrics.json").endswith("write it anew with equipoise evaluate")


@pytest.mark.parametrize(
    ("place", "value"),
    [("data", ...), ("data.fingerprints.train", 3), ("started", 5), ("class_counts.ant", "3"), ("processes", [1])],
)
def test_a_record_that_was_changed(place, value, files, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(changed(files["run.json"], place, value)))
    assert refused(read_record, tmp_path / "run.json").endswith("name another run, or train it anew")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("read", [read_metrics, read_record, read_bad_images])
def test_a_file_that_is_something_else(read, content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    assert "file.json is damaged" in refused(read, tmp_path / "file.json")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        read_record(tmp_path / "run.json")
