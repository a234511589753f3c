"""The stages of `benchmarks.gpu` that run the product itself: what is there, its tests, its runs."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import crash
from benchmarks.gpu.figures import Task
from benchmarks.gpu.speed import seconds_of
from equipoise.base.device import describe_machine
from equipoise.config.reading import load_recipe
from equipoise.data.decode import usable_cores
from equipoise.runs.checkpoint import load_checkpoint

# The most wanted first: where time is short, the last ones are left out.
CIFAR_RUNS = (("bcl", 0), ("ce", 0), ("logit-adjusted", 0), ("supcon+la", 0), ("bcl", 1), ("bcl", 2))
TESTS = ("tests/test_gpu.py",)
_MINIATURE = "--arch resnet8 --batch-size 32 --imbalance-factor 10"  # of made-up pictures


def facts(task: Task) -> None:
    """Card, driver, versions, cores, memory, and the two rates that bound everything: products and copies."""
    machine = describe_machine(task.device)
    task.say("device", machine["device"])
    if task.device.type == "cuda":
        properties = torch.cuda.get_device_properties(task.device)
        task.say("its memory", round(properties.total_memory / 2**30, 1), "GiB")
        task.say("driver", _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
        task.say("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    task.say("python, torch", f"{sys.version.split()[0]}, {torch.__version__}")
    task.say("processor", machine["processor"])
    task.say("cores", usable_cores())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    task.say("memory", round(memory / 2**30, 1), "GiB")
    size = 512 if task.rehearse else 8192
    one, two = (torch.randn(size, size, device=task.device).bfloat16() for _ in range(2))
    task.say(f"bf16 product, {size}", 2 * size**3 / seconds_of(lambda: one @ two, task.device) / 1e12, "TFLOP/s")
    # Read once and written once.
    source = torch.empty(2**22 if task.rehearse else 2**28, dtype=torch.float32, device=task.device)
    copy = torch.empty_like(source)
    task.say("copy", 8 * len(source) / seconds_of(lambda: copy.copy_(source), task.device) / 1e12, "TB/s")


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def tests(task: Task) -> None:
    """The tests that need a GPU, but for that of compiling, which the stage `step` does."""
    found = task.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "not compiled", "-v", "--durations=8"]
    command += [f"--junit-xml={found}", *TESTS]
    code = subprocess.run(command, check=False).returncode
    cases = [*ElementTree.parse(found).getroot().iter("testcase")] if found.exists() else []
    wrong = [
        str(case.get("name")) for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    task.say("passed", len(cases) - len(wrong) - skipped, "tests")
    task.say("skipped", skipped, "tests")
    if code or (skipped == len(cases) and not task.rehearse):
        raise SystemExit(f"pytest ended with {code}; failed: {', '.join(wrong) or 'none, but none has passed either'}")


# ---------------------------------------------------------------------------------------------- CIFAR-10-LT


@dataclass
class _Running:
    method: str
    seed: int
    folder: Path
    process: "subprocess.Popen[bytes]"
    started: float
    first: tuple[float, int] | None = None  # when its first line of log was seen, and of which epoch that was

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    def finishes(self, now: float) -> float:
        """When it will be finished, at the speed that it had so far."""
        lines = _lines(self.folder)
        if not lines:
            return now
        epoch = lines[-1]["epoch"]
        self.first = self.first or (now, epoch)
        if epoch < self.first[1] + 2:
            return now
        epochs = load_recipe(str(self.folder / "recipe.toml")).epochs
        return now + (epochs - epoch - 1) * (now - self.first[0]) / (epoch - self.first[1])


def cifar(task: Task) -> None:
    """CIFAR-10-LT at its full length: four methods, three seeds of BCL. Runs share the card two at a time: one computes
    while the other one's host is busy. What would not be finished in time is left out, the least wanted first."""
    cores = usable_cores()
    at_once = min(len(CIFAR_RUNS), max(1, cores // 8))
    task.say("runs at once", at_once)
    now = changed = time.monotonic()
    waiting, running = [*(CIFAR_RUNS[:2] if task.rehearse else CIFAR_RUNS)], list[_Running]()
    end, finished, longest = now + task.seconds - 8, 0, 0.0
    while now < end:
        for run in [run for run in running if run.process.poll() is not None]:
            running.remove(run)
            finished += _report(task, run)
            longest = max(longest, now - run.started)
        while waiting and len(running) < at_once and now + longest < end:
            running.append(_start(task, *waiting.pop(0), workers=max(1, cores // at_once - 2)))
        if not running:
            break
        if now - changed > 40 and _late(running, now, end):
            _leave_out(task, running.pop())
            waiting.clear()
            changed = now
        time.sleep(0.2)
        now = time.monotonic()
    for run in running:
        _leave_out(task, run)
    wanted = 2
    task.say("finished", finished, f"runs of {len(CIFAR_RUNS)}")
    if finished < wanted:
        raise SystemExit(f"{finished} runs came to their end, and {wanted} are the least")


def _late(running: list[_Running], now: float, end: float) -> bool:
    finishes = [run.finishes(now) for run in running]
    return max(finishes, default=now) > end


def _start(task: Task, method: str, seed: int, workers: int) -> _Running:
    folder = task.work / "runs" / f"{method}-{seed}"
    words = ["cifar10-lt", "--data", str(task.data), "--method", method, "--seed", str(seed), "--out", str(folder)]
    words += ["--workers", str(workers), *(f"{_MINIATURE} --epochs 1".split() if task.rehearse else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "equipoise", "train", *words], env=environment)
    return _Running(method, seed, folder, process, time.monotonic())


def _report(task: Task, run: _Running) -> bool:
    """The figures of a finished run, and its `metrics.json` beside them. Returns whether it has come to its end."""
    if run.process.returncode:
        task.say(f"{run.name}, exit code", run.process.returncode)
        return False
    shutil.copyfile(
        run.folder / "metrics.json", task.out / f"cifar10-lt-{run.method.replace('+', '-')}-{run.seed}.json"
    )
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    scored = metrics["last"]["test"]
    more = {group: scored[group] for group in ("top1", "many", "medium", "few", "calibration_error") if group in scored}
    figures = {**more, "epochs": metrics["last"]["epoch"], "images_per_second": _speed(run.folder)}
    task.say(f"{run.name}, top-1", 100 * scored["top1"], "%", **figures)
    task.say(f"{run.name}, whole run", round(time.monotonic() - run.started, 1), "s")
    return True


def _leave_out(task: Task, run: _Running) -> None:
    run.process.kill()
    run.process.wait()
    epochs = len({line["epoch"] for line in _lines(run.folder)})
    task.say(f"{run.name}, left out after", epochs, "epochs", images_per_second=_speed(run.folder))


def _speed(run: Path) -> float:
    """Images a second, the median of what the run has logged."""
    speeds = [line["images_per_second"] for line in _lines(run)]
    return statistics.median(speeds) if speeds else 0.0


def _lines(run: Path) -> list[dict[str, Any]]:
    """What a run has logged of its training."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return [line for line in lines if line["kind"] == "train"]


# ---------------------------------------------------------------------------------------------- resume, ranks


def resume(task: Task) -> None:
    """A run that is killed (kill -9) within its second epoch and goes on ends as one that is left alone, to the last
    bit: weights, momentum, best checkpoint, figures, logged steps."""
    place = task.work / "resume"
    place.mkdir()
    words = [
        "cifar10-lt",
        "--data",
        str(task.data.resolve()),
        "--deterministic",
        "true",
        "--seed",
        "1",
        "--epochs",
        "2",
    ]
    words += _MINIATURE.split() if task.rehearse else []
    crash.finish(crash.start(place, "whole", *words), place, "whole")
    half = crash.lines_of(place / "whole") // 2
    process = crash.start(place, "killed", *words)
    while process.poll() is None and crash.lines_of(place / "killed") <= half + 1:
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = load_checkpoint(place / "killed" / "last.pt").step
    crash.finish(crash.start(place, "killed", *words, "--resume", "auto"), place, "killed")
    whole, killed = crash.state_of(place / "whole"), crash.state_of(place / "killed")
    if different := [name for name, value in whole.items() if value != killed[name]]:
        raise SystemExit(f"{', '.join(different)} of the killed run differ from those of the undisturbed one")
    task.say(f"killed, resumed from step {done}: the same to the last bit in", len(whole), "files")


def ranks(task: Task) -> None:
    """Two processes train what one trains, on two cards (nccl) or sharing one (gloo): the loss of the first step, and
    that of the second, which has the first one's gradients in it. Rounding then grows sixfold a step."""
    cards = torch.cuda.device_count()
    device = "cpu" if task.device.type == "cpu" else "cuda" if cards > 1 else "cuda:0"
    words = f"digits-lt --epochs 2 --log-every 1 --precision fp32 --device {device} --set model.batch_norm=synchronised"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}  # in TF32 they would differ by its rounding
    losses: list[list[float]] = []
    for name, launcher in (("one", []), ("two", torchrun)):
        folder = task.work / name
        command = [sys.executable, *launcher, "-m", "equipoise", "train", *words.split(), "--out", str(folder)]
        with (task.work / f"{name}.log").open("wb") as log:
            code = subprocess.run(command, check=False, env=environment, stdout=log, stderr=log).returncode
        if code:
            said = (task.work / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"{said[-3000:]}\n{name}: exit code {code}")
        losses.append([line["loss"] for line in _lines(folder)])
    apart = max(abs(one - two) / one for one, two in zip(losses[0][:2], losses[1][:2], strict=True))
    exchange = "nccl" if cards > 1 else "gloo"
    task.say(f"two ranks ({exchange}): largest relative difference of two losses", apart, "", losses=losses)
    if apart > 1e-3:
        raise SystemExit(f"two ranks train something else than one: their losses differ by {apart:.1e}")
