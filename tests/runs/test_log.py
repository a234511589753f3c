"""The log of a run: each step and each validation has one line and one point, whatever interrupted it."""

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equipoise.runs.log import RunLog

LINES = [("train", 1, 0), ("train", 2, 0), ("train", 3, 0), ("validation", 3, 0),
         ("train", 4, 1), ("train", 5, 1), ("train", 6, 1), ("validation", 6, 1)]  # fmt: skip


def lines_of(folder: Path) -> list[tuple[str, int, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["epoch"]) for line in lines]


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
    assert lines_of(tmp_path) == LINES[:kept]


@pytest.mark.parametrize("rest", [b'{"kind": "train", "st', b"null\n", b"[" * 1000, bytes(1000), b"\xff\n"])
def test_a_line_that_a_killed_run_left_half_written_is_dropped(rest, tmp_path):
    with RunLog(tmp_path, 0, 0) as log:
        log.write("train", 1, 0, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    with RunLog(tmp_path, 0, 1) as log:
        log.write("train", 2, 0, {"loss": 1.0})
    assert lines_of(tmp_path) == LINES[:2]


def test_curves_of_a_run_that_goes_on_have_one_point_a_step(tmp_path):
    """Steps 3 and 4 were logged, but no checkpoint was written after step 2. What is absent is no point."""
    for first, last, loss in ((1, 4, 1.0), (3, 5, 2.0)):
        with RunLog(tmp_path, 0, first - 1) as log:
            for step in range(first, last + 1):
                log.write("train", step, 0, {"loss": loss, "few": None})
                assert lines_of(tmp_path)[-1] == ("train", step, 0), "it can be read as soon as it is written"
            log.sync()
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert curves.Tags()["scalars"] == ["train/loss"]
    points = [(point.step, point.value) for point in curves.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_curves_are_left_out_where_tensorboard_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, 0, 0) as log:
        log.write("train", 1, 0, {"loss": 1.0})
        log.sync()
    said = capsys.readouterr().out
    assert "TensorBoard" in said
    assert said.count("\n") == 1
    assert lines_of(tmp_path) == LINES[:1]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a path of nothing would lead
    with RunLog(None, 0, 0) as log:
        log.write("train", 1, 0, {"loss": 1.0})
        log.sync()
    assert list(tmp_path.iterdir()) == []
