"""How much of a CIFAR training step is spent on views and loading: `python -m benchmarks.waiting [FOLDER]`.

The loop of `training.py` (ResNet-32, all cores) on the data in FOLDER (default: ../shared/data/cifar10), with the time
until the next batch is there taken apart. Takes 40 s on two cores.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import equipoise
from benchmarks.timing import say_where
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import create_network
from equipoise.training.plan import Plan, prepare
from equipoise.training.step import Step
from equipoise.views.loader import open_batches
from equipoise.views.views import view_settings

CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"


def training(plan: Plan) -> tuple[TwoBranchNetwork, Step, torch.optim.Optimizer]:
    """What a run of `plan` trains, and what it trains it with."""
    network = create_network(plan.recipe, len(plan.parts.train.class_names), start=True)
    network = network.to(plan.device, memory_format=torch.channels_last).train()
    step = Step(plan.recipe, network, plan.parts.train.class_counts, plan.device, plan.precision, plan.world)
    return network, step, torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=str(CIFAR))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1, help="loader threads; 0 makes the views between two steps")
    options = parser.parse_args()
    steps: int = options.steps
    say_where()
    plan = prepare(equipoise.load_recipe("cifar10-lt", data=options.folder), "runs/not-written")
    recipe = plan.recipe
    _, take_step, optimizer = training(plan)
    opened = open_batches(plan.parts.train, view_settings(recipe), plan.device, options.workers)
    batches = opened.training(0, recipe.batch_size, range(steps))
    waiting, whole = [], []
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        optimizer.zero_grad()
        take_step(batch)
        optimizer.step()
        waiting.append(arrived - start)
        whole.append(time.perf_counter() - start)
    opened.close()
    share = statistics.median(waiting[2:]) / statistics.median(whole[2:])
    print(f"median of {steps - 2} steps of {recipe.batch_size} images, {torch.get_num_threads()} threads:", end=" ")
    print(f"views and loading {1000 * statistics.median(waiting[2:]):.0f} ms of {statistics.median(whole[2:]):.2f} s")
    print(json.dumps({"benchmark": "waiting", "share": round(share, 4)}))


if __name__ == "__main__":
    main()
