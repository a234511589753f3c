"""A training step that a GPU runs from a recording, so that it does not wait for its host."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from equipoise.base.errors import UserError, out_of_memory, reason
from equipoise.views.loader import Batch

Terms = dict[str, Tensor]

_STEPS_BEFORE_GRAPH = 3


class StepGraph:
    """The step of a full batch as two CUDA graphs, forward and backward pass.

    A step of a small network is hundreds of kernels that take less time than it takes to launch them; a graph is
    launched at once. Its kernels read and write the same memory every time, so the batch is copied there.
    """

    def __init__(self, losses: Callable[[Batch], Terms], network: nn.Module, batch_size: int) -> None:
        self._losses = losses
        self._parameters = [*network.parameters()]
        self._batch_size = batch_size
        self._before = 0
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def takes(self, batch: Batch) -> bool:
        """Whether the graphs are of such a batch. The first ones must do without: meanwhile libraries choose their
        algorithms."""
        if len(batch.labels_G) != self._batch_size:
            return False
        self._before += 1
        if self._before == _STEPS_BEFORE_GRAPH + 1:
            self._capture(batch)
        return self._before > _STEPS_BEFORE_GRAPH

    def _capture(self, batch: Batch) -> None:
        """Record the kernels of a step. None of them runs."""
        self._batch = replace(batch, images_VB3SS=batch.images_VB3SS.clone(), labels_G=batch.labels_G.clone())
        for parameter in self._parameters:
            parameter.grad = None
        try:
            # Other threads may go on meanwhile: one puts the next batches into pinned memory.
            with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
                terms = self._losses(self._batch)
            with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode="thread_local"):
                terms["loss"].backward()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            why = reason(error, library=True, otherwise="torch does not say why")
            raise UserError(
                f"a step of this network cannot be recorded as a CUDA graph ({why}); set --cuda-graph false"
            ) from None
        self._terms = {name: term.detach() for name, term in terms.items()}
        self._gradients = [parameter.grad for parameter in self._parameters]

    def forward(self, batch: Batch) -> Terms:
        self._batch.images_VB3SS.copy_(batch.images_VB3SS, non_blocking=True)
        self._batch.labels_G.copy_(batch.labels_G, non_blocking=True)
        self._forward.replay()
        return self._terms

    def backward(self) -> None:
        self._backward.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # `zero_grad` has taken it away
