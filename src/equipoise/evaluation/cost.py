"""What the training of a run cost, from its log and its last checkpoint."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from equipoise.config.recipe import Recipe
from equipoise.method.tuning import merge_low_rank
from equipoise.runs.checkpoint import Checkpoint, create_network
from equipoise.runs.folder import LOG
from equipoise.runs.records import read_log
from equipoise.views.loader import steps_per_epoch


def training_cost(folder: Path, last: Checkpoint) -> dict[str, float | int | None]:
    """`seconds`: of the steps that led to the weights (those without a line, as before a run was interrupted, at the
    speed of the next line), without validation; None without a log. `images_seen`: as often as drawn, not as views.
    `multiply_adds`: of one image through encoder and classifier; a multiplication and its addition are one.
    `parameters`, `trained_parameters`: of the contrastive branch too. Raises UserError where the log is damaged."""
    batch, images = last.recipe.batch_size, sum(last.class_counts)

    def seen(step: int) -> int:
        epochs, steps = divmod(step, steps_per_epoch(images, batch))
        return epochs * (images - (images % batch == 1)) + steps * batch

    speeds = [(line.step, line.images_per_second) for line in read_log(folder / LOG) if line.images_per_second]
    seconds = sum((seen(step) - seen(done)) / speed for (done, _), (step, speed) in pairwise([(0, 0.0), *speeds]))
    return {
        "seconds": round(seconds, 3) if speeds else None,
        "images_seen": seen(last.step),
        **_of_network(replace(last.recipe, seed=0), len(last.class_names)),
    }


@cache  # of many seeds it is the same
def _of_network(recipe: Recipe, classes: int) -> dict[str, int]:
    with torch.device("meta"):  # shapes alone: no memory
        network = create_network(recipe, classes, start=False).eval()
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
        merge_low_rank(network)  # as where it is used
        size = recipe.views.size
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.classifier(network.encode(torch.empty(1, 3, size, size, dtype=torch.uint8)))
    return {
        "multiply_adds": counter.get_total_flops() // 2,  # torch counts the addition as another
        "parameters": sum(number for number, _ in sizes),
        "trained_parameters": sum(number for number, trained in sizes if trained),
    }
