"""How the weights move: by SGD, at a rate that follows the epochs; and their average, which moves along behind."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from equipoise.config.recipe import Optim


def create_sgd(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD as the authors run it: weight decay on every parameter, biases and BatchNorm too."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def learning_rate(epoch: int, epochs: int, optim: Optim) -> float:
    """The learning rate of `epoch` (from 0) of `epochs`, constant within it, as in the authors' code.

    Linear warm-up reaches `optim.lr` in epoch `warmup_epochs - 1`. Then 'cosine' ends one step above 0, and 'step'
    multiplies by 0.1 at each milestone passed; a milestone below 1 is a share of `epochs`.
    """
    warmup = optim.warmup_epochs
    if epoch < warmup:
        return optim.lr * (epoch + 1) / warmup
    if optim.schedule == "cosine":
        # The denominator is of the epochs that follow the warm-up, plus one, so that no epoch trains at 0.
        progress = (epoch - warmup + 1) / (epochs - warmup + 1)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    starts = [round(milestone * epochs) if milestone < 1 else int(milestone) for milestone in optim.milestones]
    return optim.lr * 0.1 ** sum(epoch >= start for start in starts)


@torch.no_grad()
def average_in(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network as it is after so many steps, by 1 - `decay` of the way; BatchNorm's
    averages too. In the first steps by more, 1 - (1 + step) / (10 + step), as TensorFlow's
    `ExponentialMovingAverage` does with `num_updates`: the random start would stay in it for long."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    pairs = [pair for pair in zip(averaged.parameters(), network.parameters(), strict=True) if pair[1].requires_grad]
    buffers = zip(averaged.buffers(), network.buffers(), strict=True)
    pairs += [pair for pair in buffers if pair[0].is_floating_point()]  # no counters, which nothing reads
    torch._foreach_lerp_([own for own, _ in pairs], [value for _, value in pairs], weight)  # pyright: ignore[reportPrivateUsage] one launch for all
