"""Run by torchrun in tests/base/test_world.py: `ranks.py FOLDER CASES`. Trains in float64 on noise with labels,
and rank 0 saves what came of it: gradients of the first and of a short batch, weights after 20 steps, loss terms."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.base.world import World, join
from equipoise.config.reading import load_recipe
from equipoise.data.images import ImageList, PixelArrays
from equipoise.method.network import batch_norms
from equipoise.runs.checkpoint import create_network
from equipoise.training.loop import set_training
from equipoise.training.step import Step
from equipoise.views.loader import open_batches, steps_per_epoch
from equipoise.views.views import view_settings

CLASSES, STEPS = 5, 20
CPU = torch.device("cpu")


def pictures(count: int) -> ImageList:
    generator = np.random.default_rng(0)
    labels_N = np.sort((CLASSES * generator.random(count) ** 3).astype(np.int64))  # a long tail
    labels_N[:CLASSES] = np.arange(CLASSES)
    pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return ImageList("noise", PixelArrays("noise", pixels), labels_N, tuple("abcde"))


def train(world: World, case: dict[str, Any]) -> dict[str, Any]:
    fields = {name: case[name] for name in ("method", "micro_batch", "anchor", "sampler", "mix", "sam") if name in case}
    recipe = load_recipe("digits-lt", batch_size=32, **fields)
    torch.manual_seed(0)
    network = create_network(recipe, CLASSES, start=True).double().train()
    for module in batch_norms(network):
        # What a frozen BatchNorm does depends on its averages: let it be no identity.
        module.running_mean.normal_(0, 0.1)
        module.running_var.uniform_(0.5, 1.5)
    recipe = replace(recipe, model=replace(recipe.model, batch_norm=case["batch_norm"]))
    if case["batch_norm"] == "synchronised" and world.size > 1:
        network.synchronise_batch_norm(CPU)
    set_training(network, recipe)
    images = pictures(case["images"])
    batches = open_batches(images, view_settings(recipe), CPU, 0, world)
    take_step = Step(recipe, network, images.class_counts, CPU, "fp32", world)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9, weight_decay=5e-4)
    saved: dict[str, Any] = {"terms": [], "rows": [], "classes": [], "gradients": {}, "own": {}}
    epochs = math.ceil(STEPS / steps_per_epoch(len(images), recipe.batch_size))
    steps = range(epochs * steps_per_epoch(len(images), recipe.batch_size))
    made = batches.training(0, recipe.batch_size, steps, recipe.data.sampler, epochs)
    for number, batch in zip(steps, made, strict=True):
        if number % (len(steps) // epochs) == 0:
            epoch = number * epochs // len(steps)
            take_step.expect_draws(epoch / epochs)
            take_step.objective.begin_epoch(epoch, epochs)
        take_step.objective.seed = number
        optimizer.zero_grad()
        values, votes = take_step(batch, (1, 2))
        assert votes == [world.size, 2 * world.size]
        saved["terms"].append(values)
        saved["rows"].append(world.gather_objects((batch.rows.start, batch.rows.stop)))
        saved["classes"].append(world.gather_objects(batch.labels_G[batch.rows].unique().tolist()))
        # After the first step, and after the first short batch.
        if not saved["gradients"] or len(batch.labels_G) < recipe.batch_size:
            key = len(batch.labels_G)
            saved["gradients"].setdefault(key, {n: p.grad.clone() for n, p in network.named_parameters()})
            of_objective = {f"{n} {key}": p for n, p in take_step.objective.named_parameters() if p.requires_grad}
            saved["own"] |= {n: float(p.grad) for n, p in of_objective.items()}
        optimizer.step()
    world.first_buffers(network)
    state = {name: value.clone() for name, value in take_step.objective.state_dict().items()}
    world.first_buffers(take_step.objective)
    for name, value in take_step.objective.state_dict().items():
        assert torch.allclose(value, state[name], atol=1e-6), "each rank has the same"
    return {**saved, "state": {**network.state_dict(), **{f"objective.{name}": of for name, of in state.items()}}}


def check_that_gradients_stay_apart(world: World) -> None:
    """Of two tensors that are added, autograd may hand both the same gradient; the gather sums its own alone."""
    rows, other = torch.ones(2, 3, requires_grad=True), torch.ones(2 * world.size, 3, requires_grad=True)
    (world.gather_rows(rows, 2 * world.size) + other).backward(torch.ones(2 * world.size, 3))
    assert rows.grad is not None and bool((rows.grad == world.size).all())  # noqa: PT018
    assert other.grad is not None and bool((other.grad == 1).all())  # noqa: PT018


def main(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    with join() as world:
        assert world.gather_in_turn(range(world.rank, 7, world.size)) == list(range(7))
        check_that_gradients_stay_apart(world)
        for name, case in cases.items():
            saved = train(world, case)
            if world.is_first:
                torch.save(saved, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
