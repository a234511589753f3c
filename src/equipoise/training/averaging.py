"""The weights averaged over the steps: what is validated, scored and used, while training goes on with its own."""

import torch
from torch import nn


@torch.no_grad()
def average_in(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network as it is after so many steps, by 1 - `decay` of the way; BatchNorm's
    averages too. In the first steps by more, 1 - (1 + step) / (10 + step), as TensorFlow's
    `ExponentialMovingAverage` does with `num_updates`: the random start would stay in it for long."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    pairs = list(zip(averaged.state_dict().values(), network.state_dict().values(), strict=True))
    floats = [(own, value) for own, value in pairs if own.is_floating_point()]
    torch._foreach_lerp_([own for own, _ in floats], [value for _, value in floats], weight)  # pyright: ignore[reportPrivateUsage] one launch for all
    for own, value in pairs:
        if not own.is_floating_point():  # BatchNorm's count of batches
            own.copy_(value)
