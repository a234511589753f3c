"""Whole runs of several processes: they score what one scores, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder
from launch import ENVIRONMENT, TORCHRUN, largest_relative_error, messages, torchrun

from equipoise.runs.checkpoint import load_checkpoint


def train_command(out: Path, *arguments: str) -> list[str]:
    fixed = ["--epochs", "2", "--precision", "fp32", "--out", str(out)]
    return ["-m", "equipoise", "train", "digits-lt", *fixed, *arguments]


@pytest.mark.slow
def test_figures_of_three_processes_are_those_of_one(tmp_path):
    """Three ranks divide neither the 500 test images nor the last batch. The run is scored by three, then by one, then
    by three once more, from the file."""
    run = tmp_path / "run"
    done = torchrun(3, *train_command(run, "-b", "63", "--set", "data.holdout=0.2", "--ema", "0.9"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy on the test part") == 1, "one rank speaks"
    assert "3 processes, BatchNorm per-rank" in done.stdout
    of_three = json.loads((run / "metrics.json").read_text())
    assert of_three["test"]["images"] == 500
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if line["kind"] == "validation"][-1]
    assert validated["mean_per_class"] == of_three["last"]["validation"]["mean_per_class"], "all with rank 0's averages"
    with np.load(run / "observed.npz") as saved:
        observed_by_three = dict(saved)
    evaluate = ["-m", "equipoise", "evaluate", str(run)]
    subprocess.run([sys.executable, *evaluate], check=True, capture_output=True, env=ENVIRONMENT)
    assert json.loads((run / "metrics.json").read_text()) == of_three
    with np.load(run / "observed.npz") as saved:
        assert saved.files == list(observed_by_three)
        for name in saved.files:
            np.testing.assert_allclose(observed_by_three[name], saved[name], rtol=1e-6, atol=1e-7, err_msg=name)
    done = torchrun(3, *evaluate, "--split", "test", "--logits", str(tmp_path / "again.npz"))
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "again.npz") as saved:
        assert saved["logits"].shape == (500, 10)
        assert (saved["logits"].argmax(1) == saved["labels"]).mean() == of_three["test"]["top1"]


LAUNCH = """
import os, sys
from equipoise.cli.main import main
rank, folder = os.environ["RANK"], sys.argv[1]
arguments = ["train", "digits-lt", "--epochs", "1", "--out", "run"]
os.makedirs(f"{folder}/of {rank}")
os.chdir(f"{folder}/of {rank}")
DIFFERENCE
raise SystemExit(main(arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "said"),
    [
        pytest.param("", None, marks=pytest.mark.long),
        (
            "if rank == '1': arguments += ['--lr', '0.01']",
            "rank 1 has another optim.lr than rank 0: start all with the same recipe and data",
        ),
        (
            "arguments[1:2] = ['pictures', '--data', f'{folder}/data{rank}', '-b', '6']",
            "rank 1 has another content of the data, precision, kind of device or version than rank 0: start all .*",
        ),
        ("arguments += ['-b', '7']", r"rank 0: batch_size \(7\) is that of all 2 processes together; .*"),
    ],
)
def test_rank_0_alone_writes_or_all_refuse(difference, said, tmp_path):
    """Each rank has a working directory of its own, as on hosts that share no disk. What is refused is one line from
    all ranks, and nothing on the disk."""
    for number in range(2):
        draw_folder(tmp_path / f"data{number}", {"ant": 9 + number, "bee": 6})
    (tmp_path / "launch.py").write_text(LAUNCH.replace("DIFFERENCE", difference))
    done = torchrun(2, str(tmp_path / "launch.py"), str(tmp_path))
    assert os.listdir(tmp_path / "of 1") == []
    if said is None:
        assert done.returncode == 0, done.stderr
        assert load_checkpoint(tmp_path / "of 0" / "run" / "last.pt").epoch == 1
        return
    codes = set(re.findall(r"exitcode *: (-?\d+)", done.stderr))  # torchrun ends the slower one
    assert {"2"} <= codes <= {"2", "-15"}
    (line,) = messages(done.stderr)
    assert re.fullmatch(said, line)
    assert os.listdir(tmp_path / "of 0") == []


SMALL = ["--arch=resnet8", "--size=16", "--epochs=1", "-b6", "-j1", "--precision=fp32", "--set", "data.holdout=0"]


@pytest.mark.long
def test_bad_images_of_all_ranks_are_replaced_and_counted(tmp_path):
    """Each rank decodes its own images, so that none sees all the bad ones; one process finds the same."""
    data = draw_folder(tmp_path / "data" / "train", {"ant": 12, "bee": 9}).parent
    draw_folder(data / "test", {"ant": 300, "bee": 4})  # two batches: one for each rank
    bad = [f"train/{name}" for name in ("ant/1", "ant/2", "ant/7", "bee/0", "bee/5")] + ["test/ant/0", "test/bee/3"]
    for path in (data / f"{name}.png" for name in bad):
        path.write_bytes(path.read_bytes()[:200])
    (data / "train" / "bee" / "8.png").write_bytes(b"what headers tell")
    arguments = ["-m", "equipoise", "train", "--data", str(data), *SMALL, "--on-bad-image=skip"]
    arguments += ["--set", "model.batch_norm=frozen"]
    found = {}
    for processes in (1, 2):
        run = tmp_path / f"of {processes}"
        done = torchrun(processes, *arguments, "--out", str(run))
        assert done.returncode == 0, done.stderr
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["test"]["images"] == 302
        assert metrics["bad_images"] == json.loads((run / "bad-images.json").read_text())
        assert [len(metrics["bad_images"][part]) for part in ("train", "test")] == [6, 2]
        found[processes] = metrics["bad_images"], load_checkpoint(run / "last.pt").weights
    assert found[1][0] == found[2][0]
    assert largest_relative_error(found[2][1], found[1][1]) < 1e-3, "what stands in is the same"


# ---- failures


def start(processes: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in their order."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False)
    return sorted(int(word) for word in found.stdout.split())


def steps_of(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def wait_for_steps(run: Path, count: int, launcher: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 150
    while len(steps_of(run)) <= count:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_all_ranks_end_after_one_is_killed(tmp_path):
    launcher = start(2, *train_command(tmp_path / "run", "--epochs", "2000", "--log-every", "1"))
    wait_for_steps(tmp_path / "run", 10, launcher)
    ranks = ranks_of(launcher)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = launcher.communicate(timeout=150)
    assert launcher.returncode != 0
    (line,) = messages(said)
    assert re.fullmatch(r"an exchange with the other ranks failed \(.*\): one has ended; it or torchrun says why", line)
    assert re.search(r"Root Cause[^$]*rank +: 1 ", said)
    for process in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert load_checkpoint(tmp_path / "run" / "last.pt").step > 0


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_restart_goes_on_to_the_same_end(processes, tmp_path):
    arguments = ["--epochs", "20", "--log-every", "1", "--checkpoint-minutes", "0.005"]
    launcher = start(processes, *train_command(tmp_path / "killed", *arguments), restarts=1)
    wait_for_steps(tmp_path / "killed", 20, launcher)
    os.kill(ranks_of(launcher)[-1], signal.SIGKILL)
    out, said = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, said
    assert "goes on" in out
    assert steps_of(tmp_path / "killed") == list(range(1, 121))
    done = torchrun(processes, *train_command(tmp_path / "whole", *arguments))
    assert done.returncode == 0, done.stderr
    one, other = (load_checkpoint(tmp_path / name / "last.pt") for name in ("killed", "whole"))
    assert all(torch.equal(one.weights[name], value) for name, value in other.weights.items())


@pytest.mark.slow
def test_a_terminated_launch_is_saved(tmp_path):
    """As Slurm ends a job: it sends SIGTERM to all its processes, and torchrun sends it to its ranks once more. They
    agree on the step to stop at."""
    launcher = start(2, *train_command(tmp_path / "run", "--epochs", "2000", "--log-every", "1"))
    wait_for_steps(tmp_path / "run", 10, launcher)
    for process in ranks_of(launcher):
        os.kill(process, signal.SIGTERM)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=100)
    step = load_checkpoint(tmp_path / "run" / "last.pt").step
    assert [line for line in messages(said) if "terminated" not in line] == []
    assert said.count(f"equipoise: terminated: step {step} is done and saved; go on with:\ntorchrun --standalone ") == 1
    assert steps_of(tmp_path / "run")[-1] == step


@pytest.mark.slow
def test_a_rank_says_which_file_it_cannot_read(tmp_path):
    data = draw_folder(tmp_path / "data", {"ant": 12, "bee": 6})
    broken = data / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])  # a good header and no pixels
    done = torchrun(2, "-m", "equipoise", "train", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL)
    assert done.returncode != 0
    (line,) = [line for line in messages(done.stderr) if "an exchange with" not in line]
    assert re.fullmatch(r"rank [01]: .*bee/3.png cannot be read \(.*\); repair .* --on-bad-image skip", line)
    assert not (tmp_path / "run").exists(), "taken back by rank 0, whichever rank could not read"


SCRIPT = """
import os, signal, sys
import equipoise.cli.main
from equipoise.base.errors import Stopped, UserError
from equipoise.base.world import join
def no_on(rank):
    if os.environ["RANK"] == rank: raise UserError("no")
def stop():
    if os.environ["RANK"] == "1": raise Stopped("terminated", "all is saved", "a command")
def work(arguments):
    with join() as world:
        EVENT
        world.gather_objects(world.rank)
equipoise.cli.main._run = work
raise SystemExit(equipoise.cli.main.main([]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("no_on('1')", ["rank 1: no"]),
        ("world.each_makes(lambda: no_on('1'))", ["rank 1: no"]),
        pytest.param("world.first_makes(lambda: no_on('0'))", ["rank 0: no"], marks=pytest.mark.long),
        pytest.param("world.each_makes(stop)", ["terminated: all is saved; go on with:"], marks=pytest.mark.long),
        ("if world.rank == 1: raise KeyError('no more')", []),
    ],
)
def test_an_error_of_one_rank_ends_all(event, expected, tmp_path):
    """It comes between two exchanges, as in `evaluate` or while data is opened. A bug has its traceback."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("EVENT", event))
    done = torchrun(2, str(tmp_path / "script.py"))
    assert done.returncode != 0
    assert [line for line in messages(done.stderr) if "an exchange with" not in line] == expected
    assert ("[rank1]: KeyError: 'no more'" in done.stderr) == ("KeyError" in event)
    assert "[rank0]" not in done.stderr


@pytest.mark.long
def test_ranks_on_two_hosts_meet_again_after_a_restart(tmp_path):
    """Two launchers of one rank each. torchrun's store still holds the addresses of the ranks that have ended."""
    mark = tmp_path / "killed"
    kill = f"if world.rank == 1 and not os.path.exists({str(mark)!r}): os.mkdir({str(mark)!r}); os.kill(os.getpid(), 9)"
    (tmp_path / "script.py").write_text(SCRIPT.replace("EVENT", f"world.gather_objects(0)\n        {kill}"))
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:29471", "--rdzv-id=job", str(tmp_path / "script.py")]
    launchers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in range(2)]
    try:
        ends = [(launcher.wait(timeout=150), launcher.communicate()[1]) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [code for code, _ in ends] == [0, 0], ends
    assert mark.exists()
