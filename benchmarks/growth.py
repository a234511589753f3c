"""Cost as work grows, with a plot: `python -m benchmarks.growth [PLOT.svg]`.

Four curves, each with one number changed and all else as it is: the loss over classes and over the batch, opening a
list over its lines, three views of photographs over loader threads. Medians; one thread but for those. Takes
2 minutes; prints the tables of docs/performance.md.
"""

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.input import PHOTOS, read_photos, write_folder
from benchmarks.loss import inputs, ours, step
from benchmarks.timing import say_where
from equipoise.base.device import keep_freed_memory
from equipoise.report.svg import linear_axis, log_axis

OPEN = """
import sys, time
start = time.perf_counter()
from equipoise.config.recipe import Data
from equipoise.data.sources import find_parts
images = find_parts(Data(sys.argv[1], train_list=sys.argv[1] + "/list.txt")).parts["train"]
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.perf_counter() - start, peak)
"""


def median_seconds(work: Callable[[], object]) -> float:
    """Of three rounds, or of as many as fit into four seconds."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 4:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def loss_seconds(batch: int, classes: int) -> float:
    of_batch = inputs(batch, 128, classes)
    return median_seconds(lambda: step(ours, *of_batch))


def list_seconds(lines: int, folder: Path) -> tuple[float, float]:
    """Seconds and megabytes to open a list of so many lines, 123 images a class."""
    with (folder / "list.txt").open("w", encoding="ascii") as file:
        for number in range(lines):
            file.write(f"train_val2018/Plantae/{number // 123}/{number:032x}.jpg {number // 123}\n")
    words = [sys.executable, "-c", OPEN, str(folder)]
    found = [subprocess.run(words, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
    seconds, megabytes = zip(*(map(float, words) for words in found), strict=True)
    return statistics.median(seconds), statistics.median(megabytes)


def images_a_second(workers: int, data: Path) -> float:
    """Photographs a second, three views of 224 pixels each, as they reach the training loop."""
    from equipoise.data.sources import find_parts
    from equipoise.views.loader import open_batches, steps_per_epoch
    from equipoise.views.views import ViewSettings

    images = find_parts(str(data)).parts["train"]
    settings = ViewSettings("photos", size=224, kinds=("cls", "sim", "sim"))
    batches = open_batches(images, settings, torch.device("cpu"), workers)
    per_epoch = steps_per_epoch(len(images), 32)
    epochs = (range(first, first + per_epoch) for first in itertools.count(0, per_epoch))
    seconds = median_seconds(lambda: [None for _ in batches.training(0, 32, next(epochs))])
    batches.close()
    return len(images) // 32 * 32 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", nargs="?", type=Path)
    plot: Path | None = parser.parse_args().plot
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    say_where()
    curves: dict[str, list[tuple[float, float]]] = {}
    print("| classes (B 256, D 128) | loss, ms |\n|---|---|")
    curves["classes"] = []
    for classes in (10, 100, 1000, 10_000, 100_000):
        curves["classes"].append((classes, 1000 * loss_seconds(256, classes)))
        print("| {:,} | {:.1f} |".format(*curves["classes"][-1]), flush=True)
    print("| batch (C 1,000, D 128) | loss, ms |\n|---|---|")
    curves["batch"] = []
    for batch in (64, 256, 1024, 4096, 8192):
        curves["batch"].append((batch, 1000 * loss_seconds(batch, 1000)))
        print("| {:,} | {:.1f} |".format(*curves["batch"][-1]), flush=True)
    print("| lines of the list | opened in, s | peak memory, MB |\n|---|---|---|")
    curves["images"] = []
    with tempfile.TemporaryDirectory() as folder:
        for lines in (1000, 10_000, 100_000, 1_000_000):
            seconds, megabytes = list_seconds(lines, Path(folder))
            curves["images"].append((lines, seconds))
            print(f"| {lines:,} | {seconds:.2f} | {megabytes:.0f} |", flush=True)
    print("| loader threads | photographs a second |\n|---|---|")
    curves["loader threads"] = []
    with tempfile.TemporaryDirectory() as folder:
        write_folder(read_photos(PHOTOS, most=160) * 2, Path(folder))
        for workers in (1, 2, 3, 4, 8)[: max(3, (os.cpu_count() or 1) + 1)]:
            curves["loader threads"].append((workers, images_a_second(workers, Path(folder))))
            print("| {} | {:.0f} |".format(*curves["loader threads"][-1]), flush=True)
    if plot is not None:
        draw(curves, plot)


def draw(curves: dict[str, list[tuple[float, float]]], plot: Path) -> None:
    """Four small figures beside each other."""
    units = {
        "classes": "loss, ms",
        "batch": "loss, ms",
        "images": "open a list, s",
        "loader threads": "photographs/s",
    }
    width, height, parts = 180, 130, list[str]()
    for number, (name, points) in enumerate(curves.items()):
        xs, ys = zip(*points, strict=True)
        linear = name == "loader threads"
        across = linear_axis(name, xs, 0) if linear else log_axis(name, xs)
        up = linear_axis(units[name], ys, 0) if linear else log_axis(units[name], ys)
        left = 60 + 245 * number
        places = [(left + width * across.share(x), 30 + height * (1 - up.share(y))) for x, y in points]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        written = -math.inf
        for value in xs:  # the points are the ticks, where there is room
            x = left + width * across.share(value)
            if x - written > 45:
                parts.append(f'<text x="{x:.1f}" y="{height + 46}" text-anchor="middle">{value:,}</text>')
                written = x
        for value, text in up.ticks:
            y = 30 + height * (1 - up.share(value))
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<text x="{left}" y="{height + 66}">{name}</text><text x="{left - 40}" y="14">{up.label}</text>')
    style = (
        "text{font:11px sans-serif;fill:#555}line{stroke:#ddd}"
        "polyline{fill:none;stroke:#1f6f8b;stroke-width:2}circle{fill:#1f6f8b}"
    )
    drawn = "\n".join(parts)
    plot.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 205"><style>{style}</style>'
        f'<rect width="1000" height="205" fill="white"/>\n{drawn}\n</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
