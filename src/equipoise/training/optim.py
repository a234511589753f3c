"""Parameters become an optimizer, an epoch a learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from equipoise.config.recipe import Optim


def create_sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD as the authors run it: weight decay on every parameter, biases and BatchNorm too."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def learning_rate(epoch: int, epochs: int, optim: Optim) -> float:
    """The learning rate of `epoch` (from 0) of `epochs`, constant within it, as in the authors' code.

    Linear warm-up reaches `optim.lr` in epoch `warmup_epochs - 1`. Then 'cosine' ends one step above 0, and 'step'
    multiplies by 0.1 at each milestone passed; a milestone below 1 is a share of `epochs`. A run shorter than its
    warm-up ends within it.
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
