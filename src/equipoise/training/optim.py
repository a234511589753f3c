"""Parameters become an optimizer, an epoch a learning rate."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn


def create_sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD as the authors run it: weight decay on every parameter, biases and BatchNorm too."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def learning_rate(
    epoch: int,
    *,
    lr: float,
    epochs: int,
    warmup_epochs: int,
    schedule: str,
    milestones: Sequence[float] = (),
) -> float:
    """The learning rate of `epoch` (from 0), constant within it, as in the authors' code.

    Linear warm-up reaches `lr` in epoch `warmup_epochs - 1`. Then 'cosine' ends one step above 0, and 'step'
    multiplies by 0.1 at each milestone passed; a milestone below 1 is a share of `epochs`. A run shorter than its
    warm-up ends within it.
    """
    if epoch < warmup_epochs:
        return lr * (epoch + 1) / warmup_epochs
    if schedule == "cosine":
        # The denominator is of the epochs that follow the warm-up, plus one, so that no epoch trains at 0.
        progress = (epoch - warmup_epochs + 1) / (epochs - warmup_epochs + 1)
        return lr * 0.5 * (1 + math.cos(math.pi * progress))
    passed = sum(epoch >= milestone_epoch(milestone, epochs) for milestone in milestones)
    return lr * 0.1**passed


def milestone_epoch(milestone: float, epochs: int) -> int:
    """The epoch that `milestone` names: itself, or a share of all epochs where it is below 1."""
    return round(milestone * epochs) if milestone < 1 else int(milestone)
