"""A session: what it needs is refused before the folder is made, nothing is lost where it fails, and failures are one
line that says how to go on."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import TWO_EPOCHS as RECIPE

from benchmarks.crash import crash
from equipoise import UserError, load_recipe, train
from equipoise.cli.main import main
from equipoise.method.encoders import create_encoder
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training import loop, session
from equipoise.training.plan import prepare
from equipoise.training.session import start


@pytest.mark.long
def test_a_killed_run_ends_where_an_undisturbed_one_ends(tmp_path):
    """The short form of `make crash-test`."""
    assert sum(crash(tmp_path, 3, 3, "digits-lt", "--precision", "fp32", "--epochs", "20").values()) == 3


def test_a_session_holds_its_folder_until_it_ends(tmp_path, monkeypatch):
    """Both are planned before either is there, as in a sweep that starts in one second."""
    monkeypatch.chdir(tmp_path)
    plan, named = prepare(RECIPE), prepare(RECIPE, "mine")
    with start(plan) as one, start(plan) as other, start(named) as third:
        assert one.plan.folder == plan.folder
        assert other.plan.folder not in (one.plan.folder, third.plan.folder)
        assert json.loads(Path("mine/run.json").read_text())["processes"] == 1
        for wanted in (named, prepare(RECIPE, resume="mine")):
            with pytest.raises(UserError, match="another run is writing into mine; wait for it, or name another"):
                start(wanted).__enter__()
    assert not Path("mine/run.lock").exists()


def test_an_interruption_before_training_removes_a_new_folder_only(run, tmp_path):
    def interrupted(plan) -> None:
        with start(plan):
            raise KeyboardInterrupt

    for name in ("last.pt", "previous.pt"):
        (run / name).unlink()
    for plan in (prepare(RECIPE, resume=run), prepare(RECIPE, tmp_path / "new")):
        with pytest.raises(KeyboardInterrupt):
            interrupted(plan)
    assert (run / "metrics.jsonl").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("run.json", "{"), ("metrics.jsonl", "null\n"), ("metrics.jsonl", '{"kind": "train", "st')]
)
def test_records_that_are_damaged_do_not_stop_a_run(name, content, run):
    before = (run / "metrics.jsonl").read_text() if content.endswith("st") else ""  # its last line is half-written
    (run / name).write_text(before + content)
    train(load_recipe(run, epochs=3), progress=False, resume=run)
    assert json.loads((run / "run.json").read_text())["resumed"]["after_epoch"] == 2
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(13 if content == "null\n" else 1, 19))


def test_a_run_goes_on_without_the_weights_that_it_started_from(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(create_encoder("resnet8", 16)[0].state_dict(), weights)
    run = train(
        replace(RECIPE, model=replace(RECIPE.model, weights=str(weights), tune="full")),
        tmp_path / "run",
        progress=False,
    )
    weights.unlink()
    assert train(load_recipe(run.path, epochs=3), progress=False, resume=run.path).metrics["last"]["epoch"] == 3


def test_another_method_cannot_go_on(finished, tmp_path):
    with pytest.raises(UserError, match=r"method ce, .* do not fit method bcl with a resnet8"):
        train(load_recipe("digits-lt", epochs=3), tmp_path / "run", progress=False, resume=finished)
    assert not (tmp_path / "run").exists()


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """The lines of the log, the best checkpoint, and the names of both in the folder: each time, in this order."""
    events: list[str] = []
    sync, move = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        events.append(f"sync {name}")
        sync(handle)

    def noted_move(path: Path, to: Path) -> Path:
        events.append(f"move {to.name}")
        return move(path, to)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_move)
    train(replace(RECIPE, epochs=1, data=replace(RECIPE.data, holdout=0.2)), tmp_path / "run", progress=False)
    events = [event for event in events if not event.startswith("sync .")]  # of the files before they have their names
    first = events.index("sync metrics.jsonl")
    assert events[first : first + 8] == [
        "sync metrics.jsonl", "move last.pt", "sync run",  # before validation
        "sync metrics.jsonl", "move best.pt", "sync run", "move last.pt", "sync run",
    ]  # fmt: skip


# ---- memory


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "loop.Step.__call__",
            "^there is not enough memory for batches of 64 images on cpu; train anew with --micro-batch, ",
        ),
        ("session.evaluate_run", "Training is done and kept; then: equipoise evaluate "),
    ],
)
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")], ids=["CPU", "GPU"])
def test_too_little_memory_is_one_line(error, where, said, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"equipoise.training.{where}", fail)
    with pytest.raises(UserError, match=said):
        train(replace(RECIPE, epochs=1), tmp_path / "run", progress=False)
    assert (tmp_path / "run").exists() is ("kept" in said)


# ---- disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB: three of these checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def fill_before(monkeypatch, module, name: str, disk: Path) -> None:
    """Have the disk full when a function is called."""
    honest = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **more: (fill(disk), honest(*given, **more))[1])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in its checkpoint", "in its log", "in its metrics"])
def test_a_disk_that_is_full(when, small_disk, monkeypatch):
    run = small_disk / "run"
    train(RECIPE, run, progress=False)
    before = load_checkpoint(run / "last.pt")
    if when == "in its checkpoint":  # a hundred kilobytes are less than one takes
        (run / "previous.pt").unlink()
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
    elif when == "in its log":
        fill_before(monkeypatch, loop, "learning_rate", small_disk)
    else:
        fill_before(monkeypatch, session, "evaluate_run", small_disk)
    with pytest.raises(UserError) as error:
        train(load_recipe(run, epochs=3), progress=False, resume=run)
    monkeypatch.undo()
    said = str(error.value)
    assert said.startswith(f"{run} could not be written (no space left on device")
    assert said.endswith(f"; once it can, go on with: equipoise train --resume {run}")
    assert load_checkpoint(run / "last.pt").step >= before.step
    assert not list(run.glob(".*.pt.*")), "nothing half-written is left"
    (small_disk / "ballast").unlink()
    assert train(load_recipe(run, epochs=3), progress=False, resume=run).metrics["last"]["epoch"] == 3


@pytest.mark.slow
def test_a_disk_that_is_full_before_the_first_checkpoint(small_disk, monkeypatch):
    fill_before(monkeypatch, loop, "learning_rate", small_disk)
    with pytest.raises(UserError, match=r"once it can, start again$"):
        train(RECIPE, small_disk / "run", progress=False)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--split", "test"]])
def test_a_read_only_disk(more, small_disk, finished, capsys):
    copy = small_disk / "copy"
    copy.mkdir()
    for name in ("recipe.toml", "run.json"):
        shutil.copy(finished / name, copy)
    (copy / "last.pt").symlink_to(finished / "last.pt")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"run cannot be had \(read-only file system\); name another with --out"):
        train(RECIPE, small_disk / "run", progress=False)
    assert main(["evaluate", str(copy), *more]) == 2
    said = capsys.readouterr()
    assert f"--out must be a new file or a .json file, in a folder that may be written, not {copy}" in said.err
    assert said.out == "", "it is refused before the work"
    assert main(["evaluate", str(copy), *more, "--out", str(finished / "x.json")]) == 0
    assert (finished / "x.json").is_file()
    assert main(["report", str(copy)]) == 2
    assert "--out must be a new file or a .html file, in a folder that may be written" in capsys.readouterr().err


@pytest.mark.long
def test_a_folder_that_is_removed_under_a_run(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "equipoise", "train", "digits-lt", "--epochs", "400", "--method", "ce"]
    process = subprocess.Popen(
        [*command, "--out", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (run / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    moved = run.rename(tmp_path / "moved")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("equipoise: ")]  # TensorBoard's thread speaks too
    assert "could not be written" in line
    assert load_checkpoint(moved / "last.pt").step >= 6
