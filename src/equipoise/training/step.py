"""A batch becomes gradients: the forward pass, the gather over ranks, the losses, the backward pass.

Shapes: B images of this rank, G images of the whole batch, V contrastive views, C classes, D width of the features.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn

from equipoise.base.device import start_reading
from equipoise.base.errors import UserError, out_of_memory, reason
from equipoise.base.world import World
from equipoise.config.recipe import Recipe
from equipoise.method.methods import objective_of
from equipoise.method.network import CosineClassifier, TwoBranchNetwork, resting_averages
from equipoise.method.objective import Objective, Outputs, Terms
from equipoise.views.draws import sampled_counts
from equipoise.views.loader import Batch

_STEPS_BEFORE_GRAPH = 3


class Step:
    """Computes the gradients of one batch, which the ranks may hold together, into the network's parameters."""

    def __init__(
        self,
        recipe: Recipe,
        network: TwoBranchNetwork,
        class_counts: Sequence[int],
        device: torch.device,
        precision: str,
        world: World,
    ) -> None:
        self._device, self._precision, self._world = device, precision, world
        self._recipe, self._class_counts = recipe, class_counts
        self.objective = objective_of(recipe, sampled_counts(class_counts, recipe.data.sampler).tolist())
        self.objective.to(device, torch.float32)
        self._counts_C = torch.tensor(class_counts, device=device, dtype=torch.float32)
        self._network = network
        if self.objective.momentum:
            self.objective.momentum_copy = deepcopy(network.contrastive_branch()).requires_grad_(False)
        if recipe.compile:
            network.encoder.compile()  # in its place: the names of its weights stay
        self._forward: nn.Module = _Forward(network, self.objective, recipe.micro_batch)
        # Recorded steps were not tried together with these.
        untried = recipe.deterministic or recipe.micro_batch or recipe.compile or recipe.optim.sam or world.size > 1
        untried = untried or recipe.views.mix != "none" or not all(one.requires_grad for one in network.parameters())
        recorded = recipe.cuda_graph and device.type == "cuda" and self.objective.records and not untried
        self._graph = StepGraph(self._losses, network, recipe.batch_size) if recorded else None
        if world.size > 1:
            parallel = nn.parallel.DistributedDataParallel(self._forward, gradient_as_bucket_view=True)
            parallel.broadcast_buffers = False  # each rank's are its own while training: see World.first_buffers
            self._forward = parallel

    def expect_draws(self, progress: float) -> None:
        """From now on, the losses are for what the sampler draws after this share of the epochs: what they hold of the
        class counts, which is in buffers that are not saved, is computed anew."""
        if self._recipe.data.sampler != "progressive":
            return
        drawn = sampled_counts(self._class_counts, "progressive", progress).tolist()
        kept = self.objective.state_dict()
        for name, buffer in objective_of(self._recipe, drawn).named_buffers():
            if name not in kept:
                self.objective.get_buffer(name).copy_(buffer)

    def __call__(self, batch: Batch, votes: Sequence[int] = ()) -> tuple[dict[str, float], list[float]]:
        """The loss terms of the whole batch, and the sum over ranks of the votes. The weights have not moved."""
        with self._uphill(batch) if self._recipe.optim.sam else nullcontext():
            if self._graph is not None and self._graph.takes(batch):
                terms, backward = self._graph.forward(batch), self._graph.backward
            else:
                terms = self._losses(batch)
                # The losses of all ranks add up to the batch's, but DistributedDataParallel takes the mean of their
                # gradients.
                backward = (terms["loss"] * self._world.size).backward
            # Sent to the host before the backward pass is queued: a GPU goes on with that while they are looked at.
            own = torch.stack([*terms.values()]).detach()
            asked = torch.tensor(votes, dtype=own.dtype, pin_memory=own.device.type == "cuda")
            read = start_reading(self._world.sum(torch.cat([own, asked.to(own.device, non_blocking=True)])))
            backward()
        numbers: list[float] = read()[0].tolist()
        return dict(zip(terms, numbers, strict=False)), numbers[len(terms) :]

    @contextmanager
    def _uphill(self, batch: Batch) -> Generator[None]:
        """In this context the weights are the distance rho away, where the gradient leads up: what is computed there is
        what sharpness-aware minimisation descends (Foret et al., ICLR 2021, eqs. 2 and 3). BatchNorm's averages and
        the method's state take the batch in as it is at the weights themselves, once."""
        state = [*self.objective.state_dict().values()]
        state_before = [value.clone() for value in state]
        (self._losses(batch)["loss"] * self._world.size).backward()
        state_after = [value.clone() for value in state]
        uphill = {one: one.grad for one in self._forward.parameters() if one.grad is not None}
        start = [parameter.detach().clone() for parameter in uphill]
        length = torch.stack([gradient.norm() for gradient in uphill.values()]).norm()
        with torch.no_grad():
            for value, before in zip(state, state_before, strict=True):
                value.copy_(before)
            for parameter, gradient in uphill.items():
                parameter.add_(gradient * (self._recipe.optim.sam / (length + 1e-12)))
                parameter.grad = None
        with resting_averages(self._network):
            yield
        with torch.no_grad():
            for value, before in zip([*uphill, *state], [*start, *state_after], strict=True):
                value.copy_(before)

    def _losses(self, batch: Batch) -> Terms:
        images, own = len(batch.labels_G), batch.rows
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            outputs: Outputs = self._forward(batch.images_VB3SS)
        # A rank without images of its own has computed others, so that every rank does the same: they do not count.
        count = own.stop - own.start
        outputs = outputs._replace(logits_BC=outputs.logits_BC[:count])
        if self.objective.contrastive:
            outputs = outputs._replace(features_BVD=self._world.gather_rows(outputs.features_BVD[:count], images))
        self.objective.mixed = batch.mixed
        terms = self.objective(outputs, batch.labels_G, own)
        classifier = self._network.classifier
        if isinstance(classifier, CosineClassifier) and classifier.anchor:
            # Each rank has its share of it.
            terms["loss"] = terms["loss"] + count / images * classifier.penalty(self._counts_C)
        return terms


class _Forward(nn.Module):
    """What DistributedDataParallel wraps. The objective is in it for its parameters."""

    def __init__(self, network: TwoBranchNetwork, objective: Objective, micro_batch: int) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        self.micro_batch = micro_batch

    def forward(self, images_VB3SS: Tensor) -> Outputs:
        copy, momentum = self.objective.momentum_copy, self.objective.momentum
        return self.network.training_outputs(images_VB3SS, self.micro_batch, copy, momentum)


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
        """Whether the graphs are of such a batch. In the first ones, libraries choose their algorithms."""
        if len(batch.labels_G) != self._batch_size:
            return False
        self._before += 1
        if self._before == _STEPS_BEFORE_GRAPH + 1:
            self._capture(batch)
        return self._before > _STEPS_BEFORE_GRAPH

    def _capture(self, batch: Batch) -> None:
        """Record the kernels of a step. None of them runs."""
        self._batch = batch.each(Tensor.clone)
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
            raise UserError(f"this step cannot be recorded as a CUDA graph ({why}); set --cuda-graph false") from None
        self._terms = {name: term.detach() for name, term in terms.items()}
        self._gradients = [parameter.grad for parameter in self._parameters]

    def forward(self, batch: Batch) -> Terms:
        for own, given in zip(self._batch.tensors, batch.tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self._forward.replay()
        return self._terms

    def backward(self) -> None:
        self._backward.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # `zero_grad` has taken it away
