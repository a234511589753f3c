"""Several processes: they train what one trains, score what one scores, and end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_folder

from equipoise import UserError
from equipoise.base.world import ALONE, World, join
from equipoise.runs.checkpoint import load_checkpoint
from equipoise.training.loop import _step_seed

HERE = Path(__file__).resolve().parents[1]
CASES = {
    "bcl": {"method": "bcl", "micro_batch": 0, "batch_norm": "frozen", "images": 83},
    # The last batch has three images: of four ranks, three have none.
    "three-left": {"method": "bcl", "micro_batch": 0, "batch_norm": "frozen", "images": 67},
    "supcon": {"method": "supcon+la", "micro_batch": 0, "batch_norm": "frozen", "images": 83},
    "ce": {"method": "ce", "micro_batch": 0, "batch_norm": "frozen", "images": 67},
    "micro": {"method": "bcl", "micro_batch": 3, "batch_norm": "frozen", "images": 83},
    "synchronised": {"method": "bcl", "micro_batch": 0, "batch_norm": "synchronised", "images": 83},
    "per-rank": {"method": "bcl", "micro_batch": 0, "batch_norm": "per-rank", "images": 83},
}


def torchrun(processes: int, *words: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **more},
    )  # fmt: skip


# ---- gradients


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """What every case came to on 1, 2 and 4 processes."""
    results: dict[int, dict[str, Any]] = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp("ranks")
        done = torchrun(processes, str(HERE / "ranks.py"), str(folder), json.dumps(CASES))
        assert done.returncode == 0, done.stderr
        results[processes] = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in CASES}
    return results


def largest_relative_error(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    # Relative to the tensor's own largest entry, or to the largest of all where a tensor is as good as zero.
    return max(
        float((ours[name] - value).abs().max() / max(float(value.abs().max()), 1e-3 * scale))
        for name, value in expected.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", [name for name in CASES if name != "per-rank"])
def test_many_processes_train_what_one_trains(trained, case, processes):
    one, many = trained[1][case], trained[processes][case]
    assert one["gradients"].keys() == many["gradients"].keys() == {32, CASES[case]["images"] % 32}
    for rows, gradients in one["gradients"].items():
        assert largest_relative_error(many["gradients"][rows], gradients) < 1e-9, f"after a batch of {rows}"
    assert largest_relative_error(many["state"], one["state"]) < 1e-6
    assert len(one["terms"]) >= 20
    for ours, expected in zip(many["terms"], one["terms"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-9)
        assert expected["loss"] > 0


@pytest.mark.slow
def test_the_cases_are_as_hard_as_they_say(trained):
    four = trained[4]["three-left"]
    assert four["rows"][2] == [(0, 3), (3, 3), (3, 3), (3, 3)]
    every_class = set(range(5))
    assert any(set(own) != every_class for ranks in trained[4]["bcl"]["classes"] for own in ranks)
    assert any(set().union(*ranks) == every_class for ranks in trained[4]["bcl"]["classes"])


@pytest.mark.slow
def test_statistics_of_each_rank_are_another_thing(trained):
    """BatchNorm over a quarter of the batch is not BatchNorm over all of it: what 'synchronised' is there for."""
    one, four = trained[1]["per-rank"]["gradients"][32], trained[4]["per-rank"]["gradients"][32]
    assert largest_relative_error(four, one) > 0.05
    assert largest_relative_error(trained[1]["synchronised"]["gradients"][32], one) == 0


@pytest.mark.slow
def test_micro_batches_give_the_gradients_of_the_batch(trained):
    for rows, gradients in trained[1]["bcl"]["gradients"].items():
        assert largest_relative_error(trained[1]["micro"]["gradients"][rows], gradients) < 1e-9


# ---- shares


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [2, 3, 5, 8, 31, 256])
def test_shares_are_the_batch(size, rows):
    shares = [World(rank, size).share(rows) for rank in range(size)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    sizes = [share.stop - share.start for share in shares]
    assert all(count != 1 for count in sizes), "BatchNorm cannot normalise one image"
    given = [count for count in sizes if count]
    assert max(given) - min(given) <= 1


# ---- one process


def test_alone_nothing_is_exchanged():
    with join() as world:
        assert world == ALONE
    x = torch.ones(3, 2, requires_grad=True)
    assert world.gather_rows(x, 3) is x
    assert world.sum(x) is x
    assert world.gather_objects("x") == ["x"]
    assert world.first_makes(lambda: 7) == world.each_makes(lambda: 7) == 7


def test_a_world_that_cannot_be_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK is not set; start several processes with torchrun"):
        join().__enter__()


# ---- whole runs


def train_words(out: Path, *words: str) -> list[str]:
    return ["-m", "equipoise", "train", "digits-lt", "--epochs", "2", "--precision", "fp32", "--out", str(out), *words]


@pytest.mark.slow
def test_figures_of_three_processes_are_those_of_one(tmp_path):
    """Three ranks divide neither the 500 test images nor the last batch. The run is scored by three, then by one, then
    by three once more, from the file."""
    done = torchrun(3, *train_words(tmp_path / "run", "-b", "63", "--set", "data.holdout=0.2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy on the test part") == 1, "one rank speaks"
    assert "3 processes, BatchNorm per-rank" in done.stdout
    of_three = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert of_three["test"]["images"] == 500
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if line["kind"] == "validation"][-1]
    assert validated["mean_per_class"] == of_three["last"]["validation"]["mean_per_class"], "all with rank 0's averages"
    with np.load(tmp_path / "run" / "observed.npz") as saved:
        observed_by_three = dict(saved)
    alone = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "equipoise", "evaluate", str(tmp_path / "run")]
    subprocess.run(words, check=True, capture_output=True, env=alone)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == of_three
    with np.load(tmp_path / "run" / "observed.npz") as saved:
        assert saved.files == list(observed_by_three)
        for name in saved.files:
            np.testing.assert_allclose(observed_by_three[name], saved[name], rtol=1e-6, atol=1e-7, err_msg=name)
    words = ["--split", "test", "--out", str(tmp_path / "again.json"), "--logits", str(tmp_path / "again.npz")]
    done = torchrun(3, "-m", "equipoise", "evaluate", str(tmp_path / "run"), *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again.json").read_text())["test"] == of_three["test"]
    with np.load(tmp_path / "again.npz") as saved:
        assert saved["logits"].shape == (500, 10)
        assert (saved["logits"].argmax(1) == saved["labels"]).mean() == of_three["test"]["top1"]


@pytest.mark.slow
@pytest.mark.parametrize("differing", ["recipe", "data"])
def test_ranks_that_differ_are_refused(differing, tmp_path):
    for number in range(2):
        draw_folder(tmp_path / f"data{number}", {"ant": 9 + number, "bee": 6})
    launcher = tmp_path / "launch.py"
    launcher.write_text(
        "import os, sys\n"
        "from equipoise.cli.main import main\n"
        "rank, out, differing = os.environ['RANK'], *sys.argv[1:]\n"
        "words = ['train', 'digits-lt', '--epochs', '1', '--out', out, *['--lr', '0.01'][: 2 * int(rank)]]\n"
        "if differing == 'data':\n"
        "    words = ['train', 'pictures', '--data', f'{os.path.dirname(out)}/data{rank}', '-b', '6', '--out', out]\n"
        "raise SystemExit(main(words))\n"
    )
    done = torchrun(2, str(launcher), str(tmp_path / "run"), differing)
    codes = set(re.findall(r"exitcode *: (-?\d+)", done.stderr))  # torchrun ends the slower one
    assert {"2"} <= codes <= {"2", "-15"}, "and no process was aborted"
    said = {
        "recipe": "rank 1 has optim.lr = 0.01, but rank 0 has 0.05",
        "data": r"rank 1 has the train images = \w+, but rank 0 has \w+",
    }[differing]
    assert len(re.findall(f"equipoise: {said}: start all ranks with the same recipe and data", done.stderr)) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rank_0_alone_writes(tmp_path):
    """Each rank has a working directory of its own, as on hosts that share no disk."""
    launcher = tmp_path / "launch.py"
    launcher.write_text(
        "import os, sys\n"
        "from equipoise.cli.main import main\n"
        "os.makedirs(place := f'{sys.argv[1]}/of {os.environ[\"RANK\"]}')\n"
        "os.chdir(place)\n"
        "raise SystemExit(main(['train', 'digits-lt', '--epochs', '1', '--out', 'run']))\n"
    )
    done = torchrun(2, str(launcher), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "of 0" / "run" / "last.pt").epoch == 1
    assert os.listdir(tmp_path / "of 1") == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_synchronised_batch_norm_is_over_all_processes(precision, tmp_path):
    words = ["-b", "60", "--log-every", "1", "--set", "model.batch_norm=synchronised", "--precision", precision]
    first = {}
    for processes in (1, 2):
        run = tmp_path / f"of {processes}"
        done = torchrun(processes, *train_words(run, *words))
        assert done.returncode == 0, done.stderr
        first[processes] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()][:2]
    # The second loss comes after a step. In bfloat16 the two kinds of BatchNorm round differently.
    assert first[2] == pytest.approx(first[1], rel=1e-4 if precision == "fp32" else 2e-2)


def test_a_process_group_of_ones_own_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(UserError, match="has a process group already; start the processes with torchrun"):
        join().__enter__()


def test_what_a_rank_draws_is_its_own():
    """Dropout of images that are not the same must not be."""
    seeds = {_step_seed(0, step, rank) for step in range(100) for rank in range(8)}
    assert len(seeds) == 800


# ---- failures


def start(processes: int, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         f"--max-restarts={restarts}", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in their order."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False)
    return sorted(int(word) for word in found.stdout.split())


def steps_of(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What it comes to, once it is something."""
    end = time.monotonic() + 150
    while not (come := what()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return come


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_soon_after_one_is_killed(rank, tmp_path):
    launcher = start(2, *train_words(tmp_path / "run", "--epochs", "2000", "--log-every", "1"))
    wait_for(lambda: len(steps_of(tmp_path / "run")) > 10, launcher)
    ranks = ranks_of(launcher)
    begun = time.monotonic()
    os.kill(ranks[rank], signal.SIGKILL)
    _, said = launcher.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert launcher.returncode != 0
    assert [line for line in said.splitlines() if line.startswith("equipoise: ")] == [
        f"equipoise: rank {rank} (on {os.uname().nodename}) is lost: no sign of life for 12 s; all ranks stop"
    ]
    for process in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert load_checkpoint(tmp_path / "run" / "last.pt").step > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_restart_goes_on_to_the_same_end(processes, tmp_path):
    words = ["--epochs", "60", "--log-every", "1", "--checkpoint-minutes", "0.005"]
    launcher = start(processes, *train_words(tmp_path / "killed", *words), restarts=1)
    wait_for(lambda: len(steps_of(tmp_path / "killed")) > 20, launcher)
    os.kill(ranks_of(launcher)[-1], signal.SIGKILL)
    out, said = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, said
    assert "goes on" in out
    assert steps_of(tmp_path / "killed") == list(range(1, 361))
    done = torchrun(processes, *train_words(tmp_path / "whole", *words))
    assert done.returncode == 0, done.stderr
    one, other = (load_checkpoint(tmp_path / name / "last.pt") for name in ("killed", "whole"))
    assert all(torch.equal(one.weights[name], value) for name, value in other.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True])
def test_a_terminated_launch_is_saved(slow, tmp_path):
    """As Slurm ends a job: it sends SIGTERM to all its processes, and torchrun hands it on to its ranks, which agree on
    the step to stop at. Also where a step and saving take their time."""
    words = train_words(tmp_path / "run", "--epochs", "2000", "--log-every", "1")
    if slow:
        launcher = tmp_path / "launch.py"
        launcher.write_text(
            "import sys, time\n"
            "from equipoise.runs.checkpoint import Checkpoint\n"
            "from equipoise.cli.main import main\n"
            "from equipoise.training.step import Step\n"
            "save, step = Checkpoint.save_last, Step.__call__\n"
            "Checkpoint.save_last = lambda *words: (time.sleep(15), save(*words))\n"
            "Step.__call__ = lambda *words: (time.sleep(1.5), step(*words))[1]\n"
            "raise SystemExit(main(sys.argv[1:]))\n"
        )
        words = [str(launcher), *words[2:]]
    launcher = start(2, *words)
    wait_for(lambda: len(steps_of(tmp_path / "run")) > (1 if slow else 10), launcher)
    for process in ranks_of(launcher):
        os.kill(process, signal.SIGTERM)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=100)
    step = load_checkpoint(tmp_path / "run" / "last.pt").step
    assert (
        said.count(
            f"equipoise: terminated: step {step} is done and saved; go on with:\n"
            "torchrun --standalone --nproc-per-node 2 -m "
        )
        == 1
    )
    assert steps_of(tmp_path / "run")[-1] == step
    assert "all ranks stop" not in said, "nobody is ended by another one"


@pytest.mark.slow
def test_ranks_stop_together_in_validation(tmp_path):
    """Where one alone was asked to: nobody is left waiting in an exchange."""
    script = tmp_path / "launch.py"
    script.write_text(
        "import os, signal, sys\n"
        "from equipoise import evaluate, training\n"
        "from equipoise.cli.main import main\n"
        "predict, evaluate._BATCH, left = training.predict, 10, [2]\n"
        "def interrupted(*words, observe, **more):\n"
        "    left[0] -= 1\n"
        "    if os.environ['RANK'] == '1' and not left[0] and '--resume' not in sys.argv:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return predict(*words, observe=observe, **more)\n"
        "training.predict = interrupted\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    words = [*train_words(tmp_path / "run", "--epochs", "3", "--log-every", "1"), "--set", "data.holdout=0.2"]
    done = torchrun(2, str(script), *words[2:])
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last.epoch == 1
    said = f"equipoise: terminated: step {last.step} is done and saved; go on with:\n"
    assert done.stderr.count(said) == 1
    assert "all ranks stop" not in done.stderr
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert last.step == len(logged) - 1, "all steps of two epochs and one validation"
    done = torchrun(2, str(script), "train", "--resume", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rank_says_which_file_it_cannot_read(tmp_path):
    data = draw_folder(tmp_path / "data", {"ant": 12, "bee": 6})
    broken = data / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])  # a good header and no pixels
    small = [
        "--arch",
        "resnet8",
        "--set",
        "views.size=16",
        "--epochs",
        "1",
        "-b",
        "6",
        "--set",
        "data.holdout=0",
        "-j",
        "1",
    ]
    done = torchrun(2, "-m", "equipoise", "train", "--data", str(data), "--out", str(tmp_path / "run"), *small)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    assert re.fullmatch(
        r"equipoise: rank [01]: .*bee/3.png cannot be read \(.*\); repair .* --on-bad-image skip", said[0]
    )
    assert not (tmp_path / "run").exists(), "taken back by rank 0, whoever could not read"
    broken.write_bytes(b"none")  # and what headers tell, before training
    done = torchrun(2, "-m", "equipoise", "train", "--data", str(data), "--out", str(tmp_path / "other"), *small)
    said = [line for line in done.stderr.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    assert re.search(r"rank [01]: .*bee/3.png cannot be read \(it is no image: .*\)", said[0])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_bad_images_of_all_ranks_are_replaced_and_counted(tmp_path):
    """Each rank decodes its own images, so that none sees all the bad ones; one process finds the same."""
    data = draw_folder(tmp_path / "data" / "train", {"ant": 12, "bee": 9}).parent
    draw_folder(data / "test", {"ant": 300, "bee": 4})  # two batches: one for each rank
    for name in ("ant/1", "ant/2", "ant/7", "bee/0", "bee/5"):
        path = data / "train" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    (data / "train" / "bee" / "8.png").write_bytes(b"what headers tell")
    for name in ("ant/0", "bee/3"):
        (data / "test" / f"{name}.png").write_bytes((data / "test" / f"{name}.png").read_bytes()[:200])
    small = ["--arch=resnet8", "--size=16", "--epochs=1", "-b6", "-j1", "--precision=fp32", "--on-bad-image=skip"]
    small += ["--set", "data.holdout=0", "--set", "model.batch_norm=frozen"]
    words = ["-m", "equipoise", "train", "--data", str(data), *small]
    found = {}
    for processes in (1, 2):
        run = tmp_path / f"of {processes}"
        done = torchrun(processes, *words, "--out", str(run))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("6 images could not be read and were replaced by others of the same class") == 1
        assert done.stdout.count("2 images of the test part could not be read and were left out of its figures") == 1
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["test"]["images"] == 302
        assert metrics["bad_images"] == json.loads((run / "bad-images.json").read_text())
        assert [len(metrics["bad_images"][part]) for part in ("train", "test")] == [6, 2]
        found[processes] = metrics["bad_images"], load_checkpoint(run / "last.pt").weights
    assert found[1][0] == found[2][0]
    assert largest_relative_error(found[2][1], found[1][1]) < 1e-3, "what stands in is the same"
    for number in range(12):
        (data / "train" / "ant" / f"{number}.png").write_bytes(b"none")
    done = torchrun(2, *words, "--out", str(tmp_path / "other"))
    said = [line for line in done.stderr.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    assert "none of the 12 images of class 'ant' can be read" in said[0]
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("event", "expected"), [
    ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 \(on .*\) is lost: no sign of life for 12 s; all ranks stop"),
    ("raise OSError(5, 'Input/output error', '/data/x.jpg')", "rank 1: input/output error: /data/x.jpg"),
    ("raise MemoryError", "rank 1: there is not enough memory for this on this device; free some, or try another"),
    ("raise KeyError('no more')", "rank 1: KeyError: 'no more'; all ranks stop"),
])  # fmt: skip
def test_what_comes_over_a_rank_outside_training_ends_all(event, expected, tmp_path):
    """While the data is opened, or in `evaluate`: the others wait for it in an exchange."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "import equipoise.cli.main, equipoise.base.world\n"
        "def work(words):\n"
        "    with equipoise.base.world.join() as world:\n"
        "        if world.rank == 1:\n"
        f"            {event}\n"
        "        world.gather_objects(world.rank)\n"
        "equipoise.cli.main._run = work\n"
        "raise SystemExit(equipoise.cli.main.main([]))\n"
    )
    launcher = start(2, str(script))
    begun = time.monotonic()
    ranks = wait_for(lambda: ranks_of(launcher)[1:], launcher)
    time.sleep(20 if "STOP" in event else 0)
    for process in ranks if "STOP" in event else []:
        os.kill(process, signal.SIGCONT)
    _, said = launcher.communicate(timeout=60)
    assert time.monotonic() - begun < 60
    lines = [line for line in said.splitlines() if line.startswith("equipoise: ")]
    assert len(lines) == 1
    assert re.fullmatch(f"equipoise: {expected}", lines[0])


@pytest.mark.slow
def test_too_little_memory_of_every_rank_is_said_once(tmp_path):
    """As on several GPUs, which come to their end in the same step. What is advised is what a run takes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import re, resource, sys\n"
        "import timm, torch\n"
        "import equipoise.training.loop\n"
        "from equipoise.cli.main import main\n"
        'used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10\n'
        "resource.setrlimit(resource.RLIMIT_DATA, (used + (1500 << 20),) * 2)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["train", "digits-lt", "--arch=resnet50", "--size=224", "-b64", "-j0", "--device=cpu"]
    way = "set a smaller --batch-size, --size or --arch"
    for batch_norm, advice in {
        "per-rank": rf": --micro-batch 16 computes the same batch in parts \(BatchNorm is then over a part\); or {way}",
        "synchronised": f"; {way}",
    }.items():
        done = torchrun(
            2, str(script), *words, "--set", f"model.batch_norm={batch_norm}", "--out", str(tmp_path / "out")
        )
        assert done.returncode != 0
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("equipoise: ")]
        what = "the memory of this machine is too small for 32 images in 3 views of 224 pixels at a time through a"
        assert re.fullmatch(rf"equipoise: rank [01]: {what} resnet50{advice}", line)
        assert not (tmp_path / "out").exists()


# ---- hosts


@dataclass
class Hosts:
    """Two hosts: of each, the command that runs something on it and the name under which it is known. `cut` cuts the
    second one off; on how many somebody speaks then."""

    commands: list[list[str]]
    names: list[str]
    endpoint: str
    cut: Callable[[list[subprocess.Popen[str]]], None]
    speaking: int = 2


@pytest.fixture(params=["namespaces", "loopback"])
def hosts(request) -> Iterator[Hosts]:
    """With a name, an address and a network device each, joined by a cable: network namespaces. And where a machine
    does not allow them: two launchers on this one, of which one is stopped with all that it has started."""

    def stop(agents: list[subprocess.Popen[str]]) -> None:
        for process in [*ranks_of(agents[1]), agents[1].pid]:
            os.kill(process, signal.SIGSTOP)

    if request.param == "loopback":
        yield Hosts([[], []], [os.uname().nodename] * 2, "127.0.0.1", stop, speaking=1)
    else:
        yield from namespaces()


def namespaces() -> Iterator[Hosts]:
    names = {"eqp-a": "10.77.31.1", "eqp-b": "10.77.31.2"}

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    folders = [Path("/etc/netns") / name for name in names]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eqp-va", "netns", "eqp-a", "type", "veth", "peer", "name", "eqp-vb", "netns", "eqp-b")
        for (name, address), device in zip(names.items(), ("eqp-va", "eqp-vb"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for interface in ("lo", device):
                ip("-n", name, "link", "set", interface, "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items())
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(table)
        run = 'hostname $0 && exec "$@"'
        commands = [["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", run, name] for name in names]
        yield Hosts(commands, list(names), "eqp-a", lambda _: ip("-n", "eqp-b", "link", "set", "eqp-vb", "down"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not allow network namespaces ({error})")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_two_hosts_train_together_until_one_is_cut_off(hosts, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
             f"--rdzv-endpoint={hosts.endpoint}:29471", "--rdzv-id=job"]  # fmt: skip
    run = tmp_path / "run"
    outputs = [(tmp_path / name).open("w") for name in "ab"]
    agents = [
        subprocess.Popen(
            [*command, *words, *train_words(run, "--epochs", "2000", "--log-every", "1")], start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for command, output in zip(hosts.commands, outputs, strict=True)
    ]  # fmt: skip
    try:
        wait_for(lambda: len(steps_of(run)) > 20, agents[0])
        assert json.loads((run / "run.json").read_text())["processes"] == 2
        begun = time.monotonic()
        hosts.cut(agents)
        said: dict[str, list[str]] = {}
        while len(said) < hosts.speaking and time.monotonic() - begun < 30:
            for name in "ab":
                lines = (tmp_path / name).read_text().splitlines()
                if spoken := [line for line in lines if line.startswith("equipoise: ")]:
                    said[name] = spoken
            time.sleep(0.1)
        assert len(said) == hosts.speaking
        lost = f"equipoise: rank 1 (on {hosts.names[1]}) is lost: no sign of life for 12 s; all ranks stop"
        alone = r"equipoise: rank \d has lost the others: \S+:\d+ does not answer; all ranks stop"
        # On one host either launcher may keep the store that all look into.
        assert said["a"] == [lost] or (hosts.speaking == 1 and re.fullmatch(alone, said["a"][0]))
        assert "b" not in said or re.fullmatch(alone, said["b"][0])
        steps = len(steps_of(run))
        time.sleep(1)
        assert len(steps_of(run)) == steps, "nothing trains any more"
        assert load_checkpoint(run / "last.pt").step > 0
    finally:
        for process in [*(rank for agent in agents for rank in ranks_of(agent)), *(agent.pid for agent in agents)]:
            os.kill(process, signal.SIGKILL)
        for agent in agents:
            agent.wait()
        for output in outputs:
            output.close()
