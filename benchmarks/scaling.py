"""What several processes exchange in a step, calculated, and what the loss takes of it, measured.

python -m benchmarks.scaling                                     the table of docs/scaling.md
OMP_NUM_THREADS=1 torchrun --nproc-per-node N -m benchmarks.scaling    measure a step on N processes
"""

import json
import os
import statistics
import time

import torch

from equipoise.base.world import join
from equipoise.config.reading import load_recipe
from equipoise.method.losses import balanced_contrastive_loss
from equipoise.runs.checkpoint import create_network
from equipoise.training.step import Step
from equipoise.views.loader import Batch

STEPS = 7
FORWARD_FLOP = 2 * 4.089e9  # of a ResNet-50 on one image of 224 pixels (4.089 billion multiply-adds, torchvision)


IMAGES = 32  # a GPU


def table() -> None:
    print("| | GPUs | batch | gradients, MB | features, MB | their gradients, MB | loss | prototypes |")
    print("|---|---|---|---|---|---|---|---|")
    for name, classes in (("imagenet-lt", 1000), ("inat2018", 8142)):
        recipe = load_recipe(name)
        network, width = create_network(recipe, classes, start=False), recipe.model.feature_dim
        assert network.prototype_projection is not None
        parameters = sum(p.numel() for p in network.parameters())
        projected = sum(p.numel() for p in network.prototype_projection.parameters() if p.ndim == 2)
        for ranks, batch in ((8, 256), (64, 2048), (512, 16_384)):
            ring, features = (ranks - 1) / ranks, 4 * 2 * batch * width
            sent = [2 * ring * 4 * parameters, 2 * ring * features, 2 * ring * features]
            # Of each image: two anchors against 2 * batch + classes columns; forward once, backward twice that. Of
            # each class, on every rank: one row through the projection.
            loss = 3 * 2 * IMAGES * 2 * (2 * batch + classes) * width
            prototypes = 3 * 2 * classes * projected
            together = loss + prototypes + 3 * IMAGES * 3 * FORWARD_FLOP
            cells = " | ".join(f"{bytes_ / 1e6:,.0f}" for bytes_ in sent)
            shares = f"{loss / together:.1%} | {prototypes / together:.1%}"
            print(f"| {name} ({parameters / 1e6:.1f} M parameters) | {ranks} | {batch:,} | {cells} | {shares} |")


def measure() -> None:
    """A step of 64 images, three views of 64 pixels, ResNet-18, 8,142 classes, D 1024; one thread a process."""
    torch.set_num_threads(1)
    with join() as world:
        classes, batch_size = 8142, 64
        recipe = load_recipe("inat2018", encoder="resnet18", size=64, batch_size=batch_size, precision="fp32")
        torch.manual_seed(0)
        network = create_network(recipe, classes, start=False).train().to(memory_format=torch.channels_last)
        take_step = Step(recipe, network, [10] * classes, torch.device("cpu"), "fp32", world)
        rows = world.share(batch_size)
        images = torch.randint(0, 256, (3, rows.stop - rows.start, 3, 64, 64), dtype=torch.uint8)
        labels = torch.randint(0, classes, (batch_size,), generator=torch.Generator().manual_seed(0))
        features = torch.nn.functional.normalize(torch.randn(batch_size, 2, 1024), dim=-1).requires_grad_()
        prototypes = torch.nn.functional.normalize(torch.randn(classes, 1024), dim=-1).requires_grad_()
        steps, losses = [], []
        for _ in range(STEPS + 2):
            world.sum(torch.zeros(1))  # begin together
            start = time.perf_counter()
            network.zero_grad()
            take_step(Batch(images, labels, rows))
            steps.append(time.perf_counter() - start)
            start = time.perf_counter()
            balanced_contrastive_loss(features, labels, prototypes, 0.07, rows).backward()
            losses.append(time.perf_counter() - start)
        if world.is_first:
            step, loss = statistics.median(steps[2:]), statistics.median(losses[2:])
            print(f"{world.size} processes: step {step:.3f} s, of it the loss {loss:.3f} s (medians of {STEPS})")
            print(
                json.dumps({"processes": world.size, "images_per_second": batch_size / step, "loss_share": loss / step})
            )


if __name__ == "__main__":
    measure() if "RANK" in os.environ else table()
