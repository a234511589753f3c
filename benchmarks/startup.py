"""How long one waits: `equipoise --help`, and from the command to the first training step of the demo.

`python -m benchmarks.startup`. Each is a process of its own, started anew; the step has been taken when its line is in
`metrics.jsonl`. Medians; files are in the system's cache after the first time. Takes 40 s.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.timing import say_where, spread

ROUNDS = 5


def seconds_of_help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "equipoise", "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        start = time.perf_counter()
        words = ["train", "--out", str(log.parent), "--log-every", "1"]
        demo = subprocess.Popen([sys.executable, "-m", "equipoise", *words], stdout=subprocess.DEVNULL, cwd=folder)
        while not (log.exists() and log.read_bytes()):
            if demo.poll() is not None:
                raise SystemExit("the demo has ended without a step")
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        demo.kill()
        demo.wait()
    return seconds


def main() -> None:
    say_where()
    found: dict[str, float] = {}
    for name, measure in {"help": seconds_of_help, "first_step": seconds_to_first_step}.items():
        measure()  # files into the cache
        seconds = [measure() for _ in range(ROUNDS)]
        print(f"  {name:<12} {spread(seconds)} s")
        found[name] = round(float(torch.tensor(seconds).median()), 3)
    print(json.dumps({"benchmark": "startup", **found}))


if __name__ == "__main__":
    main()
