"""A run that is killed again and again ends where one that is left alone ends, to the last bit.

    make crash-test            # = python -m benchmarks.crash [--kills 60] [--seed 0]

kill -9 at random moments: while a process starts, in steps, and while it writes a checkpoint. After each,
`--resume auto` goes on. At the end weights, momentum, best checkpoint, figures and logged steps are compared with those
of a run that nothing has disturbed.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORDS = "--checkpoint-minutes 0.005 --set data.holdout=0.2 --log-every 1 --set optim.lr=0.02"


def start(place: Path, out: str, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "equipoise", "train", *words, *WORDS.split(), "--out", out]
    with (place / f"{out}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=place, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], place: Path, out: str) -> None:
    if process.wait():
        raise SystemExit((place / f"{out}.log").read_text(encoding="utf-8")[-3000:])


def lines_of(run: Path) -> int:
    """Steps that the run has logged so far."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_to_kill(process: subprocess.Popen[bytes], run: Path, seconds: float, lines: int, writing: bool) -> str | None:
    """Wait for the moment, so long or until so much is logged; what it was, or None if the process has ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and lines_of(run) < lines:
        if process.poll() is not None:
            return None
        if writing and time.monotonic() > end - seconds / 2 and any(run.glob(".*.pt.*")):
            return "in a write"
        time.sleep(0.0005 if writing else 0.005)
    return "while it started" if not (run / "metrics.jsonl").exists() else "at a random moment"


def state_of(run: Path) -> dict[str, Any]:
    """All that a run has come to, without what time tells."""
    from equipoise.runs.checkpoint import load_checkpoint

    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in logged:
        line.pop("images_per_second", None)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["cost"].pop("seconds")
    state: dict[str, Any] = {"metrics.jsonl": logged, "metrics.json": metrics}
    for name in ("last.pt", "best.pt"):
        checkpoint = load_checkpoint(run / name)
        tensors = {
            **checkpoint.weights,
            **{str(k): v["momentum_buffer"] for k, v in checkpoint.optimizer["state"].items()},
        }
        state[name] = {key: value.numpy().tobytes() for key, value in tensors.items()}
        state[name]["position"] = (checkpoint.epoch, checkpoint.step, checkpoint.best)
    return state


def crash(place: Path, kills: int, seed: int, *words: str) -> dict[str, int]:
    """Run `equipoise train WORDS` once undisturbed and once killed `kills` times; how often it was killed when. Ends
    the test where the two differ."""
    moments = random.Random(seed)
    begun = time.monotonic()
    finish(start(place, "whole", *words), place, "whole")
    whole_takes, lines = time.monotonic() - begun, lines_of(place / "whole")
    count: dict[str, int] = {}
    run = place / "killed"
    while sum(count.values()) < kills:
        process = start(place, "killed", *words, "--resume", "auto")
        # Most of the time goes into starting; a kill there is as good a test as any, but should not be all.
        wanted = moments.uniform(0.3, 1.0) * min(whole_takes, 12)
        # What is left is shared by the kills that are left: the run must not end before.
        done, left = lines_of(run), kills - sum(count.values())
        most = done + max(1, int((lines - done) * moments.uniform(0.3, 1.5) / (left + 1)))
        when = wait_to_kill(process, run, wanted, most, writing=moments.random() < 0.5)
        if when is None:
            break
        process.kill()
        process.wait()
        count[when] = count.get(when, 0) + 1
    if process.returncode != 0:
        process = start(place, "killed", *words, "--resume", "auto")
    finish(process, place, "killed")
    whole, killed = state_of(place / "whole"), state_of(run)
    for name, value in whole.items():
        if value != killed[name]:
            raise SystemExit(f"{name} of the killed run is not that of the undisturbed one; both are in {place}")
    steps = [line["step"] for line in killed["metrics.jsonl"] if line["kind"] == "train"]
    if steps != list(range(1, len(steps) + 1)):
        raise SystemExit("a step is missing, or logged twice")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a run again and again; compare it with one left alone.")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place = Path("runs") / "crash-test"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    begun = time.monotonic()
    words = f"digits-lt --precision fp32 --epochs {options.epochs}".split()
    count = crash(place, options.kills, options.seed, *words)
    minutes = (time.monotonic() - begun) / 60
    print(
        f"the crash test passed: {sum(count.values())} kills in {minutes:.0f} minutes, the end the same to the last bit"
    )
    print(json.dumps(count))


if __name__ == "__main__":
    main()
