"""How the benchmarks measure: subjects in turn, round after round, on two clocks; medians and quartiles.

Rounds (A B A B ...) rather than blocks, so that what else happens on the machine falls on all of them; ratios are taken
within a round (`apart`: of processes that run in turn). CPU time, of this process and all its threads, says the same
where the machine is shared with others.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from equipoise.base.device import describe_machine


@dataclass(frozen=True)
class Times:
    """Seconds of each round, by the clock on the wall and by the processor's."""

    wall: list[float] = field(default_factory=list[float])
    cpu: list[float] = field(default_factory=list[float])


def say_where() -> None:
    """One line: the machine and the threads that figures hold for."""
    machine = describe_machine(torch.device("cpu"))
    print(f"{machine['processor']}, {machine['threads']} thread(s), {machine['system']}, torch {torch.__version__}")


def in_turn(subjects: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Times]:
    """Run all subjects `rounds` times in turn, after `warmup` turns that do not count."""
    times = {name: Times() for name in subjects}
    for turn in range(-warmup, rounds):
        for name, subject in subjects.items():
            wall, cpu = time.perf_counter(), time.process_time()
            subject()
            if turn >= 0:
                times[name].cpu.append(time.process_time() - cpu)
                times[name].wall.append(time.perf_counter() - wall)
    return times


def apart(module: str, words: Sequence[str], names: Sequence[str], turns: int = 2) -> dict[str, Times]:
    """Each subject in processes of its own, in turn, since a run also changes how its process keeps memory.

    `python -m MODULE *WORDS --child NAME` ends with what `answer` prints.
    """
    times = {name: Times() for name in names}
    for name in [*names] * turns:
        command = [sys.executable, "-m", module, *words, "--child", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        wall, cpu = json.loads(done.stdout.splitlines()[-1])
        times[name].wall.extend(wall)
        times[name].cpu.extend(cpu)
    return times


def answer(subject: Callable[[], object], rounds: int, warmup: int = 1) -> None:
    """The times of a subject, as `apart` reads them."""
    times = in_turn({"": subject}, rounds, warmup)[""]
    print(json.dumps([times.wall, times.cpu]))


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def spread(values: Sequence[float]) -> str:
    """'1.23 (1.20 to 1.31)': median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def say_times(times: Mapping[str, Times], images: int = 0) -> None:
    """A line for each subject: milliseconds, and images a second where a round is so many images."""
    for name, of_subject in times.items():
        speed = f", {images / statistics.median(of_subject.wall):,.0f} images/s" if images else ""
        wall, cpu = ([1000 * value for value in clock] for clock in (of_subject.wall, of_subject.cpu))
        print(f"  {name:<44} {spread(wall)} ms, of the processor's {spread(cpu)} ms{speed}")


def finish(name: str, above: Times, below: Times, **more: float | str) -> None:
    """The last line: JSON with the ratio of two subjects, on both clocks."""
    wall, cpu = ratio(above.wall, below.wall), ratio(above.cpu, below.cpu)
    print(json.dumps({"benchmark": name, "ratio": round(wall, 3), "cpu_ratio": round(cpu, 3), **more}))
