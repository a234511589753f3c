"""Memory and time of a large batch in small parts: `python -m benchmarks.micro_batch [--encoder resnet18 --size 64]`.

One step of 256 images, three views each, whole and as 8 micro-batches of 32 images (`--micro-batch 32`), each in a
process of its own, whose peak resident memory is read from the system, less that before the step. Gradients are
compared with BatchNorm frozen.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

IMAGES, MICRO, STEPS = 256, 32, 3


def step(encoder: str, size: int, micro_batch: int, file: str) -> None:
    """In the child: seconds of each step, memory in MB; the gradient goes into the file."""
    import resource

    from equipoise.base.world import ALONE
    from equipoise.config.reading import load_recipe
    from equipoise.method.network import batch_norms
    from equipoise.runs.checkpoint import create_network
    from equipoise.training.step import Step
    from equipoise.views.loader import Batch

    def memory() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    recipe = load_recipe("imagenet-lt", encoder=encoder, size=size, micro_batch=micro_batch)
    torch.manual_seed(0)
    network = create_network(recipe, 100, start=False).train().to(memory_format=torch.channels_last)
    for module in batch_norms(network):
        module.eval()
    take_step = Step(recipe, network, [10] * 100, torch.device("cpu"), "fp32", ALONE)
    images = torch.randint(0, 256, (3, IMAGES, 3, size, size), dtype=torch.uint8)
    batch = Batch(images, torch.arange(IMAGES) % 100, slice(0, IMAGES))
    take_step(Batch(images[:, :4], batch.labels_G[:4], slice(0, 4)))  # what is there once: kernels, gradients
    before, seconds = memory(), []
    for _ in range(STEPS):
        network.zero_grad()
        start = time.perf_counter()
        take_step(batch)
        seconds.append(time.perf_counter() - start)
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    torch.save(gradient, file)
    print(json.dumps({"seconds": seconds, "memory": memory() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of 256 images, whole and in micro-batches of 32.")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step(options.encoder, options.size, int(options.child[0]), options.child[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options.encoder, options.size, Path(folder))


def compare(encoder: str, size: int, folder: Path) -> None:
    found = {}
    for micro_batch in (0, MICRO):
        words = ["--encoder", encoder, "--size", str(size), "--child", str(micro_batch), str(folder / str(micro_batch))]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.micro_batch", *words], check=True, capture_output=True, text=True
        )
        found[micro_batch] = json.loads(done.stdout.splitlines()[-1])
        said = found[micro_batch]
        name = f"{IMAGES // MICRO} x {MICRO}" if micro_batch else f"{IMAGES} at once"
        median = statistics.median(said["seconds"])
        print(f"{name:<12} {median:6.2f} s a step (median of {STEPS})  {said['memory']:6,.0f} MB")
    whole, parts = found[0], found[MICRO]
    one, other = (torch.load(folder / str(micro_batch), weights_only=True) for micro_batch in (0, MICRO))
    error = float((one - other).abs().max() / one.abs().max())
    ratios = {
        "memory": parts["memory"] / whole["memory"],
        "time": statistics.median(parts["seconds"]) / statistics.median(whole["seconds"]),
        "gradient_error": error,
    }
    print(json.dumps({name: float(f"{value:.3g}") for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
