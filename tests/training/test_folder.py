"""Run folders: one process each, nothing lost when the disk fails, nothing left where nothing came of it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from conftest import draw_folder

import equipoise
from benchmarks.crash import crash
from equipoise import UserError, load_recipe, train
from equipoise.base.world import World
from equipoise.cli.main import main
from equipoise.method.encoders import create_encoder
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.runs.log import RunLog
from equipoise.training import folder as folder_module
from equipoise.training import loop as training
from equipoise.training.folder import RunFolder, _git_state
from equipoise.training.plan import Plan, _find_place, prepare

RECIPE = load_recipe("digits-lt", epochs=2, precision="fp32", method="ce", log_every=1)


@pytest.mark.slow
def test_a_killed_run_ends_where_an_undisturbed_one_ends(tmp_path):
    """The short form of `make crash-test`."""
    assert sum(crash(tmp_path, kills=3, epochs=20, seed=3).values()) == 3


# ---- whose folder it is


def test_a_folder_belongs_to_one_process(tmp_path):
    plan = prepare(RECIPE, tmp_path / "run")
    code = (
        "import sys, time\n"
        "from equipoise import load_recipe\nfrom equipoise.training.folder import RunFolder\n"
        "from equipoise.training.plan import prepare\n"
        "with RunFolder(prepare(load_recipe('digits-lt'), sys.argv[1])) as folder:\n"
        "    folder.take()\n    print('taken', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=r"another run is writing into .*run; wait for it, or name another"):
            RunFolder(plan).take()
        resumed = prepare(load_recipe("digits-lt"), resume=tmp_path / "run")
        with pytest.raises(UserError, match="another run is writing into"):
            RunFolder(resumed).take()
        assert (tmp_path / "run" / "recipe.toml").exists(), "the other's files are not touched"
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    # A dead process holds nothing, and a run without a checkpoint begins again.
    resumed = prepare(load_recipe("digits-lt"), resume=tmp_path / "run")
    assert resumed.describe()["goes on"] == "from its beginning: it had no checkpoint yet"
    with RunFolder(resumed) as folder:
        assert folder.take() == tmp_path / "run"
    assert not (tmp_path / "run" / "run.lock").exists()


def test_an_interrupted_resume_does_not_remove_the_folder(tmp_path):
    train(RECIPE, tmp_path / "run", progress=False)
    (tmp_path / "run" / "last.pt").unlink()
    (tmp_path / "run" / "previous.pt").unlink()

    def interrupted() -> None:
        with RunFolder(prepare(RECIPE, resume=tmp_path / "run")) as folder:
            folder.take()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_killed_in_its_first_moment_is_no_obstacle(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.lock", "recipe.toml", ".recipe.toml.x7.equipoise-part", ".run.json.abc.equipoise-part"):
        (folder / name).touch()
    assert prepare(RECIPE, folder).folder == folder
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare(RECIPE, folder)


def test_only_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    train(RECIPE, tmp_path / "run", progress=False)
    run = tmp_path / "run"
    for name in (".notes.txt", ".last.pt.original", ".last.pt.x7.equipoise-part", ".recipe.toml.a.equipoise-part"):
        (run / name).write_text("mine")
    (run / ".cache.d").mkdir()
    (run / ".mine.equipoise-part").mkdir()
    with RunFolder(prepare(load_recipe(run, epochs=3), resume=run)) as folder:
        folder.take()
    hidden = sorted(entry.name for entry in run.iterdir() if entry.name.startswith("."))
    assert hidden == [".cache.d", ".last.pt.original", ".mine.equipoise-part", ".notes.txt"]


def test_a_lock_that_was_removed_keeps_nobody_out(tmp_path, monkeypatch):
    """One process opens the file, the other ends and removes it, a third makes it anew: then one alone may have it."""
    path, lock = tmp_path / "run.lock", folder_module._lock
    opened = []

    def removed_meanwhile(file):
        if not opened:
            path.unlink()
        opened.append(file)
        return lock(file)

    monkeypatch.setattr(folder_module, "_lock", removed_meanwhile)
    with folder_module._locked(path) as held:
        assert os.path.samestat(os.fstat(held.fileno()), path.stat())
    assert [file.closed for file in opened] == [True, True]
    assert len(opened) == 2


def test_the_start_is_said_in_universal_time(tmp_path, monkeypatch):
    """Else runs of two time zones, or of the night when the clock is set back, would not be in order."""
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    before = datetime.now(UTC).replace(microsecond=0)
    run = fake_run(tmp_path / "run", "")
    monkeypatch.undo()
    time.tzset()
    started = json.loads((run / "run.json").read_text())["began"]
    assert started.endswith("Z")
    assert before <= datetime.fromisoformat(started) <= datetime.now(UTC)


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    def git(*words: str, folder: Path) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    source = Path(equipoise.__file__).parent
    monkeypatch.chdir(tmp_path)
    git("init", folder=tmp_path)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "theirs", folder=tmp_path)
    ours = git("rev-parse", "HEAD", folder=source)
    assert _git_state()["commit"] == ours
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook
    assert _git_state()["commit"] == ours
    monkeypatch.delenv("GIT_DIR")
    # As it would be in an environment within that repository.
    installed = tmp_path / "lib" / "folder.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr("equipoise.training.folder.__file__", str(installed))
    assert _git_state() is None


# ---- auto


def fake_run(folder: Path, started: str, recipe=RECIPE, finished: bool = False, launch: str = "") -> Path:
    with RunFolder(prepare(recipe, folder)) as taken:
        taken.take()
    record = json.loads((folder / "run.json").read_text())
    record |= {"began": record["started"], "started": started, "launch": launch}
    (folder / "run.json").write_text(json.dumps(record))
    if finished:
        (folder / "metrics.json").write_text("{}")
    return folder


def test_auto_is_the_newest_unfinished_run_of_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find = lambda recipe=RECIPE, out=None: _find_place(recipe, out, "auto", World())  # noqa: E731
    assert not find().taken, "there is none: a new one"
    assert prepare(RECIPE, resume="auto").describe()["goes on"] == (
        "with none: a new run begins, since runs holds no unfinished one of this recipe"
    )
    for name, content in {"list": "[]", "deep": "[" * 100_000, "null": "null"}.items():
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / "run.json").write_text(content)
        shutil.copy(fake_run(Path("elsewhere") / name, "") / "recipe.toml", Path("runs") / name)
    assert not find().taken, "strange folders are no runs"
    older = fake_run(Path("runs/older"), "2026-01-01T10:00:00")
    assert find().folder == older
    # A clock that was set back: what counts is what the record says, not the order of the files.
    newer = fake_run(Path("runs/a-newer"), "2026-01-01T11:00:00")
    os.utime(older / "run.json", (2e9, 2e9))
    assert find().folder == newer
    fake_run(Path("runs/finished"), "2026-01-01T12:00:00", finished=True)
    fake_run(Path("runs/another"), "2026-01-01T12:00:00", load_recipe("digits-lt", epochs=3))
    (Path("runs") / "broken").mkdir()
    (Path("runs") / "broken" / "run.json").write_text("{")
    assert find().folder == newer
    assert find(load_recipe("digits-lt", epochs=2, precision="bf16", method="ce", log_every=7)).folder == newer
    assert find(out=older).folder == older
    assert find(out=tmp_path / "new").folder == tmp_path / "new"


def test_a_restart_by_torchrun_goes_on_with_its_own_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = fake_run(Path("runs/own"), "2026-01-01T10:00:00", launch="7f3")
    fake_run(Path("runs/other"), "2026-01-01T11:00:00", launch="aaa")
    assert _find_place(RECIPE, None, None, World(launch="7f3")).folder == own
    assert not _find_place(RECIPE, None, None, World(launch="bbb")).taken
    assert not _find_place(RECIPE, None, None, World(launch="none")).taken, "torchrun's name for no name"
    unnamed = fake_run(Path("runs/unnamed"), "2026-01-01T12:00:00", launch="none")
    assert _find_place(RECIPE, None, None, World(launch="none", restarted=True)).folder == unnamed


def test_another_number_of_processes_is_told(tmp_path, finished):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "metrics.json").unlink()
    recipe = replace(load_recipe(run), epochs=9)
    said = prepare(recipe, resume=run).describe()["goes on"]
    assert "processes" not in said
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "processes": 4}))
    said = prepare(recipe, resume=run).describe()["goes on"]
    assert "1 processes instead of 4: so BatchNorm is over more or fewer images at a time" in said


@pytest.mark.slow
def test_after_a_kill_the_folder_is_free_at_once(tmp_path):
    """The loader's processes live for some seconds more."""
    data = draw_folder(tmp_path / "data", {"ant": 12, "bee": 6})
    words = ["train", "--data", str(data), "--arch=resnet8", "--size=16", "-b6", "-j2", "--set", "data.holdout=0"]
    words += ["--epochs=500", "--log-every=1", "--out", str(tmp_path / "run")]
    killed = subprocess.Popen([sys.executable, "-m", "equipoise", *words], stdout=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 3):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    plan = prepare(load_recipe(tmp_path / "run"), resume=tmp_path / "run")
    with RunFolder(plan) as folder:
        assert folder.take() == tmp_path / "run"


# ---- damaged checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(RECIPE, tmp_path_factory.mktemp("runs") / "run", progress=False).path


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "flipped in the middle"])
def test_the_checkpoint_before_a_damaged_one_is_used(damage, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = (run / "last.pt").read_bytes()
    # Where a weight is, a flipped bit gives another number and no other sign than the checksum.
    weight = load_checkpoint(run / "last.pt").weights["encoder.stem.weight"].numpy().tobytes()
    at = {"flipped": whole.index(weight) + 2, "flipped in the middle": len(whole) // 2}.get(damage)
    if at is not None:
        content = bytearray(whole)
        content[at] ^= 0x10
        (run / "last.pt").write_bytes(content)
    else:
        (run / "last.pt").write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    plan = prepare(load_recipe(run), resume=run)
    assert plan.resumed.path == run / "previous.pt"
    assert plan.resumed.checkpoint.epoch == 1
    reason = "is damaged: its checksum does not fit" if damage == "flipped" else "last.pt is "
    assert reason in plan.describe()["goes on"]
    train(load_recipe(run), progress=False, resume=run)
    one, other = load_checkpoint(run / "last.pt"), load_checkpoint(finished / "last.pt")
    assert all(torch.equal(one.weights[name], value) for name, value in other.weights.items())
    assert (run / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()
    # Both damaged: then there is nothing, and it is said.
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"x")
    both = "last.pt is no checkpoint .*; .*previous.pt is no checkpoint .*: without either, train anew into another"
    with pytest.raises(UserError, match=both):
        prepare(load_recipe(run), resume=run)
    (run / "last.pt").unlink()
    (run / "last.pt").mkdir()
    with pytest.raises(UserError, match=r"last.pt is a folder, where a checkpoint belongs; move it away"):
        prepare(load_recipe(run), resume=run)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Path:
    """A finished run with a validation part."""
    recipe = load_recipe("digits-lt", epochs=3, precision="fp32", method="ce", log_every=1, holdout=0.2)
    return train(recipe, tmp_path_factory.mktemp("runs") / "run", progress=False).path


def going_on(run: Path, **overrides: object) -> Plan:
    return prepare(load_recipe(run, **overrides), resume=run)


def take(plan: Plan) -> None:
    with RunFolder(plan) as folder:
        folder.take()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:9000])])
@pytest.mark.parametrize("holder", ["last.pt", "previous.pt"])
def test_a_best_checkpoint_that_cannot_be_read_is_written_anew(damage, holder, chosen, tmp_path):
    """From another one of the same weights: the last one is of epoch 3, and the one before it was saved before that
    epoch was validated."""
    run = shutil.copytree(chosen, tmp_path / "run")
    last = load_checkpoint(run / "last.pt")
    assert load_checkpoint(run / "previous.pt").step == last.step
    replace(last, best=(0.75, 3)).save(run / "last.pt")
    if holder == "previous.pt":
        replace(last, best=(0.75, 3), epoch=3, step=last.step + 1).save(run / "last.pt")  # as in epoch 4
    damage(run / "best.pt")
    plan = going_on(run, epochs=4)
    assert plan.describe()["goes on"].endswith(f"; it is written anew, with the weights of {holder})")
    assert f"{run}/best.pt" in plan.describe()["goes on"]
    take(plan)
    best = load_checkpoint(run / "best.pt")
    assert (best.epoch, best.step, best.best) == (3, last.step, (0.75, 3))
    assert all(torch.equal(best.weights[name], value) for name, value in last.weights.items())


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:9000])])
def test_a_run_goes_on_without_its_best_checkpoint(damage, chosen, tmp_path, capsys):
    run = shutil.copytree(chosen, tmp_path / "run")
    last = load_checkpoint(run / "last.pt")
    replace(last, best=(0.75, 1)).save(run / "last.pt")  # of epoch 1 nothing else is there
    damage(run / "best.pt")
    # Scored as it is: the last one, and it is said.
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{run}/best.pt" in metrics["best_lost"]
    assert metrics["best"] is None
    assert metrics["last"] == json.loads((chosen / "metrics.json").read_text())["last"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"{run}/best.pt" in said
    assert "the metrics are of the last checkpoint" in said
    # Going on, the next epoch is the best.
    plan = going_on(run, epochs=4)
    assert "the best of the epochs that follow takes its place" in plan.describe()["goes on"]
    metrics = training.fit(plan, progress=False).metrics
    assert metrics["best_lost"] is None
    assert metrics["best"]["epoch"] == load_checkpoint(run / "best.pt").epoch == 4


def test_what_a_run_leaves_behind_when_it_goes_on(finished, tmp_path):
    """Not the figures of its earlier end, and not a damaged checkpoint, which would become the one before the last."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "last.pt").write_bytes(b"x")
    plan = going_on(run, epochs=3)
    assert (run / "metrics.json").exists(), "nothing is written yet"
    take(plan)
    assert not (run / "metrics.json").exists()
    assert not (run / "last.pt").exists()
    assert load_checkpoint(run / "previous.pt").epoch == 1


def test_a_run_does_not_go_on_with_other_images(chosen, tmp_path):
    """Of which part they ever are: the best is chosen on one, and figures of two data sets would be mixed."""
    data = tmp_path / "data"
    for part in ("train", "val", "test"):
        draw_folder(data / part, {"ant": 6, "bee": 4})
    recipe = load_recipe("pictures", data=str(data), arch="resnet8", size=16, epochs=1, batch_size=4, workers=0)
    run = train(recipe, tmp_path / "run", progress=False).path
    assert going_on(run, epochs=2).resumed
    for part, called in {"train": "train", "val": "validation", "test": "test"}.items():
        (data / part / "ant" / "0.png").rename(data / part / "ant" / "new.png")
        with pytest.raises(UserError) as error:
            going_on(run, epochs=2)
        assert str(error.value) == (
            f"the {called} part of {data} is not what {run}/last.pt was trained with (images were added, removed or "
            "renamed); restore it, name the data it was trained on, or start a new run"
        )
        (data / part / "ant" / "new.png").rename(data / part / "ant" / "0.png")
    shutil.rmtree(data / "test")
    with pytest.raises(UserError, match=r"the test part of .* is not what"):
        going_on(run, epochs=2)


def test_a_state_that_no_run_has_is_refused(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    last = load_checkpoint(run / "last.pt")
    for step in (11, 19):  # of 12, after two epochs of six
        replace(last, step=step).save(run / "last.pt")
        with pytest.raises(
            UserError, match=rf"damaged or was changed: after 2 epochs of 6 steps no run has done {step}"
        ):
            going_on(run, epochs=4)
    for state in ({0: {"momentum_buffer": torch.zeros(3)}}, {999: {"momentum_buffer": torch.zeros(3)}}):
        replace(last, optimizer={**last.optimizer, "state": state}).save(run / "last.pt")
        with pytest.raises(
            UserError, match=r"last.pt is damaged or was changed: its momentum does not fit its weights"
        ):
            train(load_recipe(run, epochs=4), progress=False, resume=run)
    assert (run / "metrics.json").exists(), "nothing was touched"


# ---- the order of what reaches the disk


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
    recipe = load_recipe("digits-lt", epochs=1, precision="fp32", method="ce", holdout=0.2)
    train(recipe, tmp_path / "run", progress=False)
    events = [event for event in events if not event.startswith("sync .")]  # of the files before they have their names
    first = events.index("sync metrics.jsonl")
    assert events[first : first + 8] == [
        "sync metrics.jsonl", "move last.pt", "sync run",  # before validation
        "sync metrics.jsonl", "move best.pt", "sync run", "move last.pt", "sync run",
    ]  # fmt: skip


def test_a_half_written_line_is_dropped(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(before + '{"kind": "train", "st')
    train(load_recipe(run, epochs=3), progress=False, resume=run)
    lines = (run / "metrics.jsonl").read_text()
    assert lines.startswith(before)
    assert [json.loads(line)["step"] for line in lines.splitlines()] == list(range(1, 19))


def test_a_last_line_without_its_end_is_dropped(finished, tmp_path):
    """Whole as it may look, the next line would be written behind it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(before.removesuffix("\n"))
    train(load_recipe(run, epochs=3), progress=False, resume=run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = json.loads(before.splitlines()[-1])
    assert last not in lines, "and it is not half there"
    assert [line["step"] for line in lines] == [*range(1, last["step"]), *range(last["step"] + 1, 19)]


@pytest.mark.parametrize("content", ["[" * 100_000, '{"step": "x"}', "null", '{"step": 1, "kind": {}, "epoch": 1}\n'])
def test_a_log_that_was_changed_does_not_stop_a_run(content, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.jsonl").write_text(content)
    train(load_recipe(run, epochs=3), progress=False, resume=run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"][-6:] == list(range(13, 19))


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "null", '{"processes": [1]}'])
def test_a_record_that_was_changed_is_written_anew(content, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "run.json").write_text(content)
    train(load_recipe(run, epochs=3), progress=False, resume=run)
    assert json.loads((run / "run.json").read_text())["resumed"]["after_epoch"] == 2


def test_a_run_goes_on_without_the_weights_that_it_started_from(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(create_encoder("resnet8", 16)[0].state_dict(), weights)
    run = train(replace(RECIPE, model=replace(RECIPE.model, weights=str(weights))), tmp_path / "run", progress=False)
    weights.unlink()
    assert train(load_recipe(run.path, epochs=3), progress=False, resume=run.path).metrics["last"]["epoch"] == 3


def test_another_method_cannot_go_on(finished, tmp_path):
    with pytest.raises(UserError, match=r"do not fit method bcl with a resnet8; it was trained with ce$"):
        train(load_recipe("digits-lt", epochs=3), tmp_path / "run", progress=False, resume=finished)
    assert not (tmp_path / "run").exists()


# ---- disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB: three of these checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk):
    run, ballast = small_disk / "run", small_disk / "ballast"
    train(RECIPE, run, progress=False)
    before = load_checkpoint(run / "last.pt")
    # While there is one before the last, it makes room for the next.
    (run / "previous.pt").unlink()
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
    recipe = load_recipe(run, epochs=4)
    with pytest.raises(UserError) as error:
        train(recipe, progress=False, resume=run)
    said = str(error.value)
    assert "could not be written into" in said
    assert "no space left on device" in said
    assert f"equipoise train --resume {run}" in said
    assert "\n" not in said
    assert load_checkpoint(run / "last.pt").step == before.step
    assert not list(run.glob(".*.pt.*")), "nothing half-written is left"
    ballast.unlink()
    train(recipe, progress=False, resume=run)
    assert load_checkpoint(run / "last.pt").epoch == 4


def fill(disk: Path) -> None:
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before it starts", "in its log", "in its figures"])
def test_a_disk_that_is_full_at_other_times(when, small_disk, monkeypatch):
    """Where it is, and how to go on, is said whatever is being written."""
    run = small_disk / "run"
    train(RECIPE, run, progress=False)
    if when == "before it starts":
        fill(small_disk)
    else:
        at = {"in its log": "learning_rate", "in its figures": "evaluate_run"}[when]
        honest = getattr(training, at)
        monkeypatch.setattr(training, at, lambda *words, **more: (fill(small_disk), honest(*words, **more))[1])
    with pytest.raises(UserError) as error:
        train(load_recipe(run, epochs=3), progress=False, resume=run)
    monkeypatch.undo()
    said = str(error.value)
    assert said.startswith(f"{run} could not be written (no space left on device")
    assert said.endswith(f". Make room there, then: equipoise train --resume {run}")
    assert "\n" not in said
    (small_disk / "ballast").unlink()
    assert training.fit(going_on(run, epochs=3), progress=False).metrics["last"]["epoch"] == 3


@pytest.mark.slow
def test_a_log_on_a_full_disk_does_not_hide_what_came_before(small_disk):
    """Closing it fails too, since it has lines that were not written."""

    def interrupted() -> None:
        with RunLog(small_disk, 0, 0) as log:
            fill(small_disk)
            with suppress(OSError):
                log.write("train", 1, 0, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.slow
def test_a_disk_that_is_full_before_the_first_checkpoint(small_disk, monkeypatch):
    honest = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda *words, **more: (fill(small_disk), honest(*words, **more))[1])
    with pytest.raises(UserError) as error:
        train(RECIPE, small_disk / "run", progress=False)
    assert str(error.value).endswith("Make room there and start again: the folder was taken back")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--split", "test"]])
def test_a_read_only_disk(words, small_disk, finished, capsys):
    (small_disk / "copy").mkdir()
    for name in ("recipe.toml", "run.json"):
        shutil.copy(finished / name, small_disk / "copy")
    (small_disk / "copy" / "last.pt").symlink_to(finished / "last.pt")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"run cannot be made \(read-only file system\); name another with --out"):
        train(RECIPE, small_disk / "run", progress=False)
    assert main(["evaluate", str(finished), "--split", "test", "--out", str(small_disk / "x.json")]) == 2
    said = capsys.readouterr()
    assert said.err == f"equipoise: --out must be a file in a folder that may be written, not {small_disk}/x.json\n"
    assert main(["evaluate", str(small_disk / "copy"), *words]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"equipoise: the metrics cannot be written into {small_disk}/copy; name a file elsewhere with --out FILE\n"
    )
    assert said.out == "", "it is refused before the work"
    assert main(["evaluate", str(small_disk / "copy"), *words, "--out", str(finished / "x.json")]) == 0
    assert (finished / "x.json").is_file()
    capsys.readouterr()
    assert main(["train", "--reload", "True", "--resume", str(small_disk / "copy" / "last.pt")]) == 0
    said = capsys.readouterr().out
    assert "top-1" in said
    assert said.endswith(f"not written: {small_disk}/copy is read-only\n")
    assert main(["report", str(small_disk / "copy")]) == 2
    assert capsys.readouterr().err == (
        f"equipoise: the report cannot be written into {small_disk}/copy; name a file elsewhere with --out FILE\n"
    )


@pytest.mark.slow
def test_a_folder_that_is_removed_under_a_run(tmp_path):
    run = tmp_path / "run"
    words = ["digits-lt", "--epochs", "400", "--method", "ce", "--log-every", "1", "--out", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "equipoise", "train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    moved = tmp_path / "moved"
    run.rename(moved)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert said.count("\n") == 1
    assert "could not be written into" in said
    assert load_checkpoint(moved / "last.pt").step >= 6
