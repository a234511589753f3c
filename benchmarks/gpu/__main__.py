"""Does training work on this machine's GPU, and how fast: one command, for a machine that is new, or lent for minutes.

    python -m benchmarks.gpu --data CIFAR [--photos FOLDER] [--minutes 9] [--out FOLDER]

CIFAR: a folder with CIFAR-10 in any form that `cifar10-lt` takes. FOLDER: JPEG photographs. Without either, pictures
are made up. The stages run in order, each in a process of its own with a time limit of its own. Every figure is a line
of OUT/figures.jsonl the moment it is known; a stage that fails has a line that says why, and the next one runs. At the
end stands a table of them all. Nothing needs a network. `--rehearse` does all of it in miniature, on a CPU too.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu import pictures, speed, stages
from benchmarks.gpu.figures import Figures, Task, table

CIFAR_RUNS = "cifar"  # the stage that gets what time the others leave
# Each stage, the seconds after which it is ended, and those that it is expected to take on an H100.
STAGES = {
    "facts": (stages.facts, 40, 12),
    "tests": (stages.tests, 60, 40),
    CIFAR_RUNS: (stages.cifar, 0, 0),
    "step": (speed.step, 110, 75),
    "loss": (speed.loss, 40, 16),
    "input": (speed.input_speed, 70, 45),
    "resume": (stages.resume, 90, 55),
    "ranks": (stages.ranks, 75, 40),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10: Parquet or the archive")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together (default: 9)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu"), help="where figures and logs go (default: build/gpu)"
    )
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature; needs no GPU")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=[*STAGES], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        task = Task(
            options.stage, options.data, options.photos, options.out, options.work, options.rehearse, options.seconds
        )
        STAGES[options.stage][0](task)
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here; --rehearse shows in miniature, on a CPU, what would be done")
    options.only = [name for name in STAGES if name in options.only]
    for folder in filter(None, (options.data, options.photos)):
        if not folder.is_dir():
            parser.error(f"there is no folder at {folder}")
    return run(options)


def run(options: argparse.Namespace) -> int:
    """All stages in turn; 1 if one has failed."""
    end = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, _leave)  # the stage that runs is ended with this process
    options.out.mkdir(parents=True, exist_ok=True)
    figures = Figures(options.out / "figures.jsonl")
    figures.begin()
    with tempfile.TemporaryDirectory(prefix="equipoise-gpu-") as work:
        data = options.data or pictures.write_small(Path(work) / "small", 40 if options.rehearse else 500)
        photos = options.photos or pictures.write_photos(Path(work) / "made up", 40)
        for name in options.only:
            later = options.only[options.only.index(name) + 1 :]
            left = end - time.monotonic()
            limit = STAGES[name][1] or left - sum(STAGES[other][2] for other in later)
            if options.rehearse:  # on a machine of any speed, with other work on it
                limit, left = 600.0, 600.0
            limit = min(limit, left)
            words = ["--stage", name, "--data", data, "--photos", photos, "--out", options.out, "--work", work]
            words += ["--seconds", limit, *(["--rehearse"] if options.rehearse else [])]
            print(f"{name} (at most {limit:.0f} s) ...", flush=True)
            started = time.monotonic()
            failure = (
                "no time was left for it"
                if limit < 5
                else run_stage([*map(str, words)], limit, options.out / "log.txt")
            )
            if failure:
                figures.add(name, "failed", failure)
            figures.add(name, "seconds of this stage", round(time.monotonic() - started, 1), "s")
    print(table(figures.read()))
    failed = [line["stage"] for line in figures.read() if line["figure"] == "failed"]
    print(f"failed: {', '.join(failed)}; see {options.out / 'log.txt'}" if failed else "every stage came to its end")
    return bool(failed)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def environment() -> dict[str, str]:
    """This process's, with PYTHONPATH as it is to be understood from any folder."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in paths if path)}


def end_with_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it has started, in groups of their own too: torchrun's ranks would keep the card."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(status.parent.name)] = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    family = [process.pid]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run_stage(words: list[str], limit: float, log: Path) -> str | None:
    """Run one stage in a process of its own and end it, with all that it has started, at its limit. Returns why it
    failed, or None."""
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    with log.open("ab") as output:
        output.write(f"\n==== {' '.join(words[:2])}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_with_all(process)
    if code is None:
        return f"it was not done after {limit:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").split("==== ")[-1].strip().splitlines()
    return f"exit code {code}: {lines[-1][:300]}" if code else None


if __name__ == "__main__":
    sys.exit(main())
