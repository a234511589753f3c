"""A run folder belongs to one process at a time, and is left as it was where nothing came of a run."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from equipoise import UserError
from equipoise.runs.folder import RunFolder, RunLog, is_used

HOLDER = """
import os, sys, time
from pathlib import Path
from equipoise.runs.folder import RunFolder
with RunFolder() as folder:
    print(folder.take(Path(sys.argv[1]), goes_on=False), flush=True)
    if os.fork() == 0:  # as torch starts its loader processes, which live for seconds after the death of this one
        time.sleep(20)
        os._exit(0)
    time.sleep(60)
"""


def take(path: Path, goes_on: bool = False) -> bool:
    with RunFolder() as folder:
        return folder.take(path, goes_on)


@pytest.mark.slow
def test_a_folder_belongs_to_one_process_until_it_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        assert not take(tmp_path / "run")
        assert not take(tmp_path / "run", goes_on=True)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert take(tmp_path / "run"), "a dead process holds nothing, whatever processes it has left behind"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_another_run_has_used_meanwhile_is_not_taken(tmp_path):
    (tmp_path / "run.json").touch()
    assert not take(tmp_path)
    assert take(tmp_path, goes_on=True)


def fail_in(path: Path, error: type[BaseException], goes_on: bool = False, keep: bool = False, more: str = "") -> None:
    def run() -> None:
        with RunFolder() as folder:
            folder.take(path, goes_on)
            for name in ("recipe.toml", *more.split()):
                (path / name).touch()
            (path / "tensorboard").mkdir()
            if keep:
                folder.kept = True
            raise error

    with pytest.raises(error):
        run()


@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt])
def test_what_a_failed_run_has_written_is_removed(error, tmp_path):
    fail_in(tmp_path / "new", error)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    fail_in(tmp_path / "empty", error)
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "how", [{"goes_on": True}, {"keep": True}, {"more": "last.pt"}, {"error": RuntimeError}], ids=str
)
def test_a_run_with_a_past_or_a_checkpoint_or_a_bug_stays(how, tmp_path):
    fail_in(tmp_path / "run", **{"error": UserError, **how})
    assert (tmp_path / "run" / "recipe.toml").exists()
    assert not (tmp_path / "run" / "run.lock").exists()


def test_only_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    for name in (".notes.txt", ".last.pt.original", ".last.pt.x7.equipoise-part", ".recipe.toml.a.equipoise-part"):
        (tmp_path / name).write_text("mine")
    assert take(tmp_path, goes_on=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".last.pt.original", ".notes.txt"]


@pytest.mark.parametrize("name", ["notes.txt", "run.json", "metrics.json", "last.pt"])
def test_a_run_killed_in_its_first_moment_is_no_obstacle(name, tmp_path):
    for leftover in ("run.lock", "recipe.toml", ".recipe.toml.x7.equipoise-part", ".run.json.abc.equipoise-part"):
        (tmp_path / leftover).touch()
    assert not is_used(tmp_path)
    assert take(tmp_path)
    (tmp_path / name).touch()
    assert is_used(tmp_path)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_folder_that_cannot_be_had_is_refused(goes_on, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the run folder .*run cannot be .*; name another with --out"):
        take(tmp_path / "file" / "run", goes_on)
    (tmp_path / "run" / "run.lock").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be"):
        take(tmp_path / "run", goes_on)


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
    with closing(RunLog(tmp_path, 0, 0)) as log:
        for kind, of_step, of_epoch in LINES:
            log.write(kind, of_step, of_epoch, {"loss": 1.0})
    with closing(RunLog(tmp_path, epoch, step)):
        pass
    assert lines_of(tmp_path) == LINES[:kept]


@pytest.mark.parametrize("rest", [b'{"kind": "train", "st', b"null\n", b"[" * 1000, bytes(1000), b"\xff\n"])
def test_a_line_that_a_killed_run_left_half_written_is_dropped(rest, tmp_path):
    with closing(RunLog(tmp_path, 0, 0)) as log:
        log.write("train", 1, 0, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    with closing(RunLog(tmp_path, 0, 1)) as log:
        log.write("train", 2, 0, {"loss": 1.0})
    assert lines_of(tmp_path) == LINES[:2]


def test_a_line_can_be_read_as_soon_as_it_is_written_and_is_tracked(tmp_path):
    """What is absent is no point of a curve."""
    tracked = []
    with closing(RunLog(tmp_path, 0, 0, lambda figures, step: tracked.append((figures, step)))) as log:
        log.write("train", 1, 0, {"loss": 1.0, "few": None})
        assert lines_of(tmp_path) == LINES[:1]
    assert tracked == [({"train/loss": 1.0}, 1)]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a path of nothing would lead
    with closing(RunLog(None, 0, 0)) as log:
        log.write("train", 1, 0, {"loss": 1.0})
        log.sync()
    assert list(tmp_path.iterdir()) == []
