"""Signals: what they ask for, and what a real process does when it gets one."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import draw_folder, figures_of

from equipoise import load_recipe, train
from equipoise.base.errors import Stopped
from equipoise.evaluation import predictions as evaluate
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training import loop as training
from equipoise.training.loop import Requests

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")


def test_saving_is_asked_for_once_and_stopping_for_good():
    before = signal.getsignal(signal.SIGTERM)
    with Requests() as requests:
        assert requests.votes() == [0, 0, 0]
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.votes() == [1, 0, 1]
        assert requests.votes() == [0, 0, 1]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_signal_before_there_is_a_run_does_not_end_it(tmp_path):
    """As Slurm may send it to a job that has just been started again."""
    words = ["digits-lt", "--method", "ce", "--epochs", "1", "--out", str(tmp_path / "run")]
    code = (
        "import os, signal, sys; import equipoise.cli.main as cli; run = cli._run\n"
        "def started(words): os.kill(os.getpid(), signal.SIGUSR1); return run(words)\n"
        "cli._run = started; sys.exit(cli.main(sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", code, "train", *words], check=True, capture_output=True)
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_the_second_interruption_stops_at_once(capsys):
    with Requests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert "once more to stop at once" in capsys.readouterr().err
        requests.votes()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_torchrun_a_second_sigterm_is_the_first_one_again(monkeypatch):
    """Slurm sends it to the ranks, and torchrun hands it on to them."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with Requests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.votes() == [0, 0, 1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_when_all_is_saved_a_signal_stops_at_once(number, code):
    with Requests() as requests:
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            requests.stop_at_once("training is done", "equipoise train --resume x")
    with Requests() as requests:
        requests.stop_at_once("training is done", "equipoise train --resume x")
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
    assert stopped.value.code == code
    assert str(stopped.value).splitlines()[-1] == "equipoise train --resume x"


@pytest.mark.slow
def test_a_signal_during_validation_stops_after_the_batch(tmp_path, monkeypatch):
    """The end is that of an undisturbed run all the same."""
    monkeypatch.setattr(evaluate, "_BATCH", 10)  # seven batches
    recipe = load_recipe("digits-lt", epochs=3, precision="fp32", method="ce", log_every=1, holdout=0.2)
    whole = train(recipe, tmp_path / "whole", progress=False).path
    seen: list[int] = []
    honest = training.predict

    def predict(*given, looks, **more):
        def observe_and_ask(*arguments) -> None:
            if len(seen) == 7 + 2:  # in the second epoch
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(1)
            looks[0](*arguments)

        return honest(*given, looks=[observe_and_ask], **more)

    monkeypatch.setattr(training, "predict", predict)
    run = tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        train(recipe, run, progress=False)
    monkeypatch.setattr(training, "predict", honest)
    steps = load_checkpoint(whole / "last.pt").step // 3
    assert len(seen) == 7 + 2 + 1
    assert stopped.value.code == 143
    assert str(stopped.value).splitlines()[0] == f"terminated: step {2 * steps} is done and saved; go on with:"
    stopped_at = load_checkpoint(run / "last.pt")
    assert (stopped_at.epoch, stopped_at.step) == (1, 2 * steps)
    assert [line["step"] for line in lines_of(run) if line["kind"] == "validation"] == [steps]
    train(load_recipe(run), progress=False, resume=run)
    same(run, whole)


# ---- real processes


SMALL = [
    "--epochs=3",
    "-b=8",
    "--arch=resnet8",
    "--set=views.size=16",
    "--log-every=1",
    "--precision=fp32",
    "--lr=0.01",
]


def start(folder: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """A training of photographs with two loader threads, in a group of processes of its own, as a terminal has it."""
    command = [sys.executable, "-m", "equipoise", "train", "--data", str(folder), "--out", str(out)]
    return subprocess.Popen(
        [*command, *SMALL, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def wait_for(what, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "pictures", {"ant": 60, "bee": 30, "cat": 12})


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = start(data, run, "--workers", "2")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return run


def same(run: Path, other: Path) -> None:
    for name in ("last.pt", "best.pt"):
        one, two = load_checkpoint(run / name), load_checkpoint(other / name)
        assert all(torch.equal(one.weights[key], value) for key, value in two.weights.items())
        assert (one.epoch, one.step, one.best) == (two.epoch, two.step, two.best)
    assert lines_of(run) == lines_of(other)
    assert figures_of(run) == figures_of(other)


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        pytest.param(signal.SIGTERM, 143, "1", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "0", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(number, code, workers, data, undisturbed, tmp_path):
    """After SIGUSR1, which saves and goes on. The signal goes to the workers too, as from a terminal or Slurm; then
    another number of workers goes on."""
    run = tmp_path / "a run"
    process = start(data, run, "--workers", "2")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(lines_of(run)) >= 2, process)
    assert not (run / "last.pt").exists(), "no epoch has ended"
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: (run / "last.pt").exists(), process)
    saved = load_checkpoint(run / "last.pt").step
    wait_for(lambda: len(lines_of(run)) > saved, process)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=100)
    assert process.returncode == code, said
    *_, reason, command = said.strip().splitlines()
    step = load_checkpoint(run / "last.pt").step
    how = {130: "interrupted", 143: "terminated"}[code]
    assert reason == f"equipoise: {how}: step {step} is done and saved; go on with:"
    assert command == f"equipoise train --resume '{run}'"
    assert 2 <= saved < step < 33
    assert len(lines_of(run)) >= step, "all that was done was logged"
    process = start(data, run, "--workers", workers, "--resume", "auto")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    same(run, undisturbed)


@pytest.mark.slow
def test_a_terminal_that_is_gone(data, tmp_path):
    """As when an ssh connection breaks off: the run is saved, though nobody can be told."""
    run = tmp_path / "run"
    ours, theirs = os.openpty()
    code = (
        "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "runpy.run_module('equipoise', None, '__main__')"
    )
    words = ["train", "pictures", "--data", str(data), *SMALL, "--epochs", "500", "--out", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    while process.poll() is None and not ((run / "metrics.jsonl").exists() and len(lines_of(run)) >= 2):
        os.read(ours, 10_000)
    os.close(ours)
    assert process.wait(100) == 143
    assert load_checkpoint(run / "last.pt").step >= 2


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Requests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.votes() == [0, 0, 0]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
def test_the_command_is_one_that_the_shell_finds(tmp_path):
    """Called by its path, with nothing of it on PATH, as after `make setup`: it is what a user pastes."""
    program = Path(sys.executable).with_name("equipoise")
    if not program.exists():
        pytest.skip("the command is not installed beside this Python")
    words = ["train", "digits-lt", "--method", "ce", "--epochs", "500", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    running = subprocess.Popen([program, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while running.poll() is None and not (tmp_path / "run" / "last.pt").exists():
        time.sleep(0.05)
    running.terminate()
    _, said = running.communicate()
    assert running.returncode == 143
    assert said.decode().splitlines()[-1] == shlex.join([str(program), "train", "--resume", str(tmp_path / "run")])
