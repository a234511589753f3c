"""Two hundred epochs of the demo and of pictures from files: memory, open files, processes, logs.

`make long-run`, or `python -m benchmarks.long_run [--epochs 200]`, on Linux. `equipoise train` runs in a process of its
own, which is looked at once an epoch: memory of it and its children, open file descriptors, processes. The last
line has, for each run, memory in the last tenth of the epochs over that in the second tenth (1: flat), and how many
files and processes there were more; the exit code is 1 where that is a leak. Takes 5 minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

MEMORY, FILES = 0.05, 20  # allowed: a share; files, of which an epoch that leaks one makes 160
RUNS = {
    "digits": ["digits-lt"],
    "photographs": ["pictures", "--arch=resnet8", "--size=16", "--workers=2", "-b", "16"],
}


def look(process: int) -> tuple[float, int, int]:
    """Megabytes, file descriptors and processes of a process and its children."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    memory = files = 0
    for member in [str(process), *children]:
        lines = Path(f"/proc/{member}/smaps_rollup").read_text(encoding="ascii").splitlines()
        # Of what the processes share, each its part; without libraries, whose pages others on the machine share too.
        memory += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        files += len(os.listdir(f"/proc/{member}/fd"))
    return memory / 1024, files, 1 + len(children)


def follow(words: list[str], epochs: int, folder: Path) -> list[tuple[float, int, int]]:
    """What was seen, once an epoch."""
    log = folder / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "equipoise", "train", *words, "--epochs", str(epochs), "--out", str(log.parent)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen, done = list[tuple[float, int, int]](), 0
    while running.poll() is None and done < epochs - 1:
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        now = json.loads(lines[-1])["epoch"] if lines else 0
        if now > done:
            done = now
            with suppress(FileNotFoundError, ProcessLookupError):  # a process that ends just now
                seen.append(look(running.pid))
        time.sleep(0.02)
    if running.wait():
        raise SystemExit(f"equipoise has ended with exit code {running.returncode}")
    size = sum(file.stat().st_size for file in log.parent.rglob("*") if file.is_file() and file.suffix != ".pt")
    print(f"  {len(seen)} times looked at; logs and figures {size / 1e6:.2f} MB")
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    epochs: int = parser.parse_args().epochs
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        draw(data)
        for run, words in RUNS.items():
            print(run, flush=True)
            folder = Path(name) / run
            further = ["--data", str(data)] if run == "photographs" else []
            seen = follow([*words, *further], epochs, folder)
            tenth = max(1, len(seen) // 10)
            early, late = seen[tenth : 2 * tenth], seen[-tenth:]
            memory = [statistics.median(look[0] for look in looks) for looks in (early, late)]
            print(
                f"  {memory[0]:.1f} MB, then {memory[1]:.1f} MB; files, processes: {early[0][1:]}, then {late[-1][1:]}"
            )
            found[run] = {
                "memory": round(memory[1] / memory[0], 4),
                "more_files": max(look[1] for look in late) - max(look[1] for look in early),
                "more_processes": max(look[2] for look in late) - max(look[2] for look in early),
            }
    print(json.dumps(found))
    leaks = [
        run
        for run, figures in found.items()
        if figures["memory"] - 1 > MEMORY or figures["more_files"] > FILES or figures["more_processes"] > 0
    ]
    for run in leaks:
        print(f"{run}: memory, files or processes grow", file=sys.stderr)
    return bool(leaks)


def draw(data: Path) -> None:
    """A hundred small pictures of two classes."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(100):
        file = data / "ab"[number % 5 == 0] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file)


if __name__ == "__main__":
    sys.exit(main())
