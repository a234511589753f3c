"""The log of a run: each step and each validation has one line, whatever interrupted it."""

import json
import os
import tracemalloc

import pytest

from equipoise.base.log import RunLog

LINES = [("train", 1, 0), ("train", 2, 0), ("train", 3, 0), ("validation", 3, 0),
         ("train", 4, 1), ("train", 5, 1), ("train", 6, 1), ("validation", 6, 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("epoch", "step", "kept"),
    [
        (2, 6, 8),
        (1, 6, 7),  # all steps of an epoch are done, but a validation that no checkpoint knows will be done again
        (1, 5, 6),
        (1, 3, 4),
        (0, 3, 3),
        (0, 2, 2),
        (0, 0, 0),
    ],
)
def test_what_will_be_done_again_is_dropped(epoch, step, kept, tmp_path):
    with RunLog(tmp_path, 0, 0) as log:
        for kind, of_step, of_epoch in LINES:
            log.write(kind, of_step, of_epoch, {"loss": 1.0})
    with RunLog(tmp_path, epoch, step):
        pass
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["epoch"]) for line in lines] == LINES[:kept]


def test_a_log_that_is_one_long_line_does_not_fill_the_memory(tmp_path):
    """As a disk may leave it that was full or lost power: a hole of zeros."""
    with RunLog(tmp_path, 0, 0) as log:
        log.write("train", 1, 0, {"loss": 1.0})
    length = (tmp_path / "metrics.jsonl").stat().st_size
    os.truncate(tmp_path / "metrics.jsonl", 2**28)
    tracemalloc.start()
    with RunLog(tmp_path, 0, 1):
        pass
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 2**24
    assert (tmp_path / "metrics.jsonl").stat().st_size == length


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a path of nothing would lead
    with RunLog(None, 0, 0) as log:
        log.write("train", 1, 0, {"loss": 1.0})
        log.sync()
    assert list(tmp_path.iterdir()) == []
