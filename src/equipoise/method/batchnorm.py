"""BatchNorm where a batch is spread over ranks, or computed in parts."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from equipoise.base.errors import UserError
from equipoise.method.losses import at_least_float32


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """All modules of the network that normalise over the batch, timm's too."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def resting_averages(network: nn.Module) -> Generator[None]:
    """In this context a forward pass uses the batch's statistics and leaves the running averages as they are."""
    before = [(module, module.momentum, module.num_batches_tracked) for module in batch_norms(network)]
    for module, _, batches in before:  # not by track_running_stats: the pass would save other tensors for the gradient
        module.momentum = 0.0  # the weight of the batch in the averages
        module.num_batches_tracked = None if batches is None else batches.clone()
    try:
        yield
    finally:
        for module, momentum, batches in before:
            module.momentum, module.num_batches_tracked = momentum, batches


def synchronise(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm over the images of all ranks: torch's own on a GPU, the only device it supports, and
    the same in plain operations on a CPU. Raises UserError for a kind of BatchNorm that has no such form on a CPU."""
    if device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm  # converts torch's kinds and timm's own

        return convert_sync_batchnorm(network)
    for module in batch_norms(network):
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            fault = f"on a CPU, {type(module).__name__} cannot be synchronised"
            raise UserError(f"{fault}; set model.batch_norm to per-rank, or change --arch")
        module.__class__ = _OverRanks  # the same state, another forward pass
    return network


class _OverRanks(_BatchNorm):
    """BatchNorm with the mean and variance of the rows of all ranks. Each rank may have another number of rows."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        x = at_least_float32(input)  # under autocast, sums in bfloat16 would be wrong
        total = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype)
        dist.all_reduce(total)
        mean: Tensor = _Sum.apply(x.sum(axes)) / total  # pyright: ignore[reportOptionalOperand, reportAssignmentType]
        centred = x - mean.view(shape)
        variance: Tensor = _Sum.apply(centred.square().sum(axes)) / total  # pyright: ignore[reportOptionalOperand, reportAssignmentType]
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (total / (total - 1)), self.momentum)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        return (normalised * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over ranks. Its gradient is the sum of the gradients on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(gradient)  # pyright: ignore[reportReturnType]
