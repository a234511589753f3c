"""Where the time of training goes: `python -m benchmarks.profile [--steps 12]`.

Two runs, as `equipoise train` does them: CIFAR-10-LT with its ResNet-32, and photographs at 224 pixels with a ResNet-18
(../shared/data). Of each step: waiting for the batch, forward pass with the loss, backward pass, optimizer; and the ten
operations in which the processor spends most of its time (torch.profiler, two further steps). Takes 2 minutes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import equipoise
from benchmarks.input import PHOTOS, read_photos, write_folder
from benchmarks.timing import say_where
from benchmarks.waiting import CIFAR, training
from equipoise.config.recipe import Recipe
from equipoise.training.plan import prepare
from equipoise.views.loader import Batch, open_batches, worker_count
from equipoise.views.views import view_settings

PARTS = ("waiting for the batch", "forward pass and loss", "backward pass", "optimizer")


def measure(recipe: Recipe, steps: int) -> None:
    plan = prepare(recipe, "runs/not-written")
    network, take_step, optimizer = training(plan)
    workers = worker_count(recipe.workers)
    batches = open_batches(plan.parts.train, view_settings(recipe), plan.device, workers)
    print(f"\n{recipe.model.encoder}, {recipe.views.size} pixels, batches of {recipe.batch_size}, {plan.precision}")
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    marks: list[float] = []
    # The first of the backward pass that is seen: the prototypes' projection is through by then, and counted before it.
    network.classifier.weight.register_hook(lambda _: marks.append(time.perf_counter()))

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        take_step(batch)

    source = batches.training(0, recipe.batch_size, range(steps + 2))
    for _ in range(steps):
        marks[:] = [time.perf_counter()]
        batch = next(source)
        arrived = time.perf_counter()
        step(batch)
        done = time.perf_counter()
        optimizer.step()
        times = marks[0], arrived, marks[-1], done, time.perf_counter()
        for part, start, end in zip(PARTS, times, times[1:], strict=False):
            seconds[part].append(end - start)
    medians = {part: statistics.median(values[2:]) for part, values in seconds.items()}
    for part, median in medians.items():
        print(f"  {part:<24} {1000 * median:8.1f} ms  {100 * median / sum(medians.values()):5.1f} %")
    ready = [next(source) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for batch in ready:
            step(batch)
            optimizer.step()
    batches.close()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:10]:
        print(f"  {row.key[:44]:<44} {100 * row.self_cpu_time_total / total:5.1f} %  {row.count // 2} calls a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps: int = parser.parse_args().steps
    say_where()
    measure(equipoise.load_recipe("cifar10-lt", data=str(CIFAR)), steps)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(read_photos(PHOTOS, most=160), Path(folder))
        words = {"arch": "resnet18", "size": 224, "batch_size": 32, "holdout": 0}
        measure(equipoise.load_recipe("pictures", data=folder, **words), steps)


if __name__ == "__main__":
    main()
