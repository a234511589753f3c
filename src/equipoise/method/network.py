"""The two-branch network: images become `logits_BC`, `features_BVD` and `prototypes_CD`.

Shapes: B images, V contrastive views, C classes, D width of the contrastive features, F width of the encoder,
N images that pass the encoder together.
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils.checkpoint import checkpoint

from equipoise.base.errors import UserError
from equipoise.config.recipe import Model, Views
from equipoise.method.encoders import create_encoder
from equipoise.method.losses import at_least_float32
from equipoise.method.tuning import restrict

COSINE_SCALE = 30.0


class Outputs(NamedTuple):
    """`features_BVD` is None without a contrastive branch, `prototypes_CD` where that has no prototypes. Where there is
    a momentum copy, the last view's features are the copy's. `projected`, where there are prototypes: view 0's features
    `[B, D]` and the prototypes before they are normalised, without gradient."""

    logits_BC: Tensor
    features_BVD: Tensor | None
    prototypes_CD: Tensor | None
    projected: tuple[Tensor, ...] = ()


class TwoBranchNetwork(nn.Module):
    """An encoder with a classifier and, beside it, the contrastive branch of BCL (Zhu et al., CVPR 2022, fig. 3).

    Call it with uint8 images `[N, 3, H, W]` for `logits_NC`: normalisation is inside. Training calls
    `training_outputs`.
    """

    shares_views = False  # of the method that trains it
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Model,
        views: Views,
        classes: int,
        contrastive: bool = True,
        prototypes: bool = True,
        start: bool = True,
    ) -> None:
        """`model` and `views` are sections of a recipe; of the views, their size, mean and std count here.
        `contrastive` adds the projection, `prototypes` the second one. `start`: with the pretrained weights that the
        model may name.

        Raises UserError for an encoder that is not known, or does not take that size, or whose weights cannot be had.
        """
        super().__init__()
        self.encoder, self.width = create_encoder(
            model.encoder, views.size, model.tune != "scratch" and start, model.weights if start else ""
        )
        restrict(self.encoder, model.tune)
        width = self.width
        linear = model.classifier == "linear"
        classifier = nn.Linear(width, classes) if linear else CosineClassifier(width, classes, model.anchor)
        self.classifier = ScaledClassifier(classifier) if model.classifier_start == "scaled" else classifier
        self.projection = _projection(width, model) if contrastive else None
        self.prototype_projection = _projection(width, model) if contrastive and prototypes else None
        self.register_buffer("mean", 255 * torch.tensor(views.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(views.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """`logits_NC` of uint8 images, with no prior added: their argmax is the prediction."""
        return self._classify(self.encode(images_N3HW))

    def synchronise_batch_norm(self, device: torch.device) -> None:
        """BatchNorm over the images of all ranks; not that of the prototypes, whose rows are the same on each."""
        self.encoder = synchronise(self.encoder, device)
        if self.projection is not None:
            self.projection = cast("nn.Sequential", synchronise(self.projection, device))

    def momentum_copy(self) -> nn.Sequential:
        """A copy of encoder and projection without gradients, for `training_outputs`."""
        return deepcopy(self._contrastive_branch()).requires_grad_(False)

    def training_outputs(
        self, images_VB3HW: Tensor, micro_batch: int = 0, copy: nn.Sequential | None = None, momentum: float = 0.0
    ) -> Outputs:
        """What the losses need of a training batch of uint8 images: view 0 is for the classifier, the others (V of the
        outputs) are for the contrastive branch. Or all are for both (`shares_views`).

        With a momentum `copy`, the last view passes that, and not this network. Beforehand the copy is moved towards
        the weights: momentum * copy + (1 - momentum) * weights (MoCo: He et al., CVPR 2020, eq. 2).

        All views pass the encoder and its BatchNorm together, as in the authors' code; with `micro_batch`, in parts of
        at most that many images. Then only the encoder's output is kept, and the backward pass computes each part anew,
        in the memory of one: the feature cache of GradCache (Gao et al., 2021, arXiv:2101.06983). Losses and gradients
        are still those of the whole batch; BatchNorm's statistics in the encoder are those of a part.
        """
        if copy is not None:
            outputs = self.training_outputs(images_VB3HW[:-1], micro_batch)
            assert outputs.features_BVD is not None
            keys_BD = self._keys(images_VB3HW[-1], micro_batch, copy, momentum)
            return outputs._replace(features_BVD=torch.cat([outputs.features_BVD, keys_BD[:, None]], dim=1))
        views, batch = images_VB3HW.shape[:2]
        if micro_batch and micro_batch < batch:
            parts = [self._encode_twice(part) for part in images_VB3HW.tensor_split(-(-batch // micro_batch), dim=1)]
            hidden_NF = torch.cat(parts, dim=1).flatten(0, 1)
        else:
            hidden_NF = self.encode(images_VB3HW.flatten(0, 1))
        if self.shares_views and self.projection is not None:
            logits_BVC, features_BVD = (
                of_ND.unflatten(0, (views, batch)).transpose(0, 1)
                for of_ND in (self._classify(hidden_NF), _direction(self.projection(hidden_NF)))
            )
            return Outputs(logits_BVC, features_BVD, None)
        logits_BC = self._classify(hidden_NF[:batch])
        if self.projection is None:
            return Outputs(logits_BC, None, None)
        # View 0 is projected too, and dropped: the authors' BatchNorm statistics are over all views.
        projected_ND: Tensor = self.projection(hidden_NF)
        features_ND = _direction(projected_ND)
        features_BVD = features_ND.unflatten(0, (views, batch))[1:].transpose(0, 1)
        if self.prototype_projection is None:
            return Outputs(logits_BC, features_BVD, None)
        centres_CD: Tensor = self.prototype_projection(self.classifier.weight)
        projected = projected_ND[:batch].detach(), centres_CD.detach()
        return Outputs(logits_BC, features_BVD, _direction(centres_CD), projected)

    def _encode_twice(self, images_VB3HW: Tensor) -> Tensor:
        """`[V, B, F]`. Nothing is kept for the backward pass, which encodes again: with the same random numbers, and
        without moving BatchNorm's averages a second time."""
        hidden: Tensor = checkpoint(  # pyright: ignore[reportAssignmentType]
            self.encode,
            images_VB3HW.flatten(0, 1),
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), resting_averages(self.encoder)),
        )
        return hidden.unflatten(0, images_VB3HW.shape[:2])

    def _contrastive_branch(self) -> nn.Sequential:
        assert self.projection is not None
        return nn.Sequential(self.encoder, self.projection)

    @torch.no_grad()
    def _keys(self, images_B3HW: Tensor, micro_batch: int, copy: nn.Sequential, momentum: float) -> Tensor:
        """`[B, D]`, by the copy, after it was moved. Its BatchNorm's averages are its own: they are used only where
        BatchNorm is frozen, and then do not move."""
        branch = self._contrastive_branch()
        pairs = [pair for pair in zip(copy.parameters(), branch.parameters(), strict=True) if pair[1].requires_grad]
        if pairs:
            torch._foreach_lerp_([follower for follower, _ in pairs], [weights for _, weights in pairs], 1 - momentum)  # pyright: ignore[reportPrivateUsage] one launch for all
        for follower, module in zip(copy.modules(), branch.modules(), strict=True):
            follower.training = module.training
        encoder, projection = copy
        parts = -(-len(images_B3HW) // micro_batch) if micro_batch else 1
        hidden_BF = torch.cat([self.encode(part, encoder) for part in images_B3HW.tensor_split(parts)])
        return _direction(projection(hidden_BF))

    def encode(self, images_N3HW: Tensor, encoder: nn.Module | None = None) -> Tensor:
        """The output `[N, F]` of the encoder, or of another one. Features, of that shape already, are passed on."""
        if images_N3HW.ndim == 2:
            return images_N3HW
        images_N3HW = images_N3HW.contiguous(memory_format=torch.channels_last)
        encoder = self.encoder if encoder is None else encoder
        hidden_NF: Tensor = encoder((images_N3HW - self.mean) / self.std)
        return at_least_float32(hidden_NF)

    def _classify(self, hidden_NF: Tensor) -> Tensor:
        # In float32 under autocast too: at scale 30, bfloat16 would round logits to steps of an eighth.
        with torch.autocast(hidden_NF.device.type, enabled=False):
            return self.classifier(hidden_NF)


class CosineClassifier(nn.Module):
    """`30 * cos(h, W)`: each class weight starts as a random direction of length 1, or where `start_at` says, and is
    held there by an `anchor` above 0."""

    start: Tensor

    def __init__(self, width: int, classes: int, anchor: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(classes, width).uniform_(-1, 1), dim=1))
        self.anchor = anchor
        if anchor:
            self.register_buffer("start", self.weight.detach().clone())

    def start_at(self, means_CF: Tensor) -> None:
        """Begin with these directions, of which a class may have none (0) and then keeps its own."""
        directions_CF = F.normalize(means_CF, dim=1).to(self.weight)
        there_C1 = directions_CF.any(dim=1, keepdim=True)
        self.weight.data.copy_(torch.where(there_C1, directions_CF, self.weight.data))
        if self.anchor:
            self.start.copy_(self.weight.data)

    def penalty(self, class_counts_C: Tensor) -> Tensor:
        """Half the squared distance of each class weight from its start (as L2-SP, Li et al., ICML 2018), times
        anchor / sqrt(N n_c) with n_c of N training images: what few images say moves a class less (docs/results.md).
        """
        strength_C = self.anchor * (class_counts_C.sum() * class_counts_C).rsqrt()
        return 0.5 * (strength_C * (self.weight - self.start).square().sum(1)).sum()

    def forward(self, hidden_NF: Tensor) -> Tensor:
        return COSINE_SCALE * F.linear(F.normalize(hidden_NF, dim=1), F.normalize(self.weight, dim=1))


class ScaledClassifier(nn.Module):
    """A factor for each class times the logits of another classifier, which rests: trained are the factors alone, from
    1 on (learnable weight scaling, LWS; Kang et al., ICLR 2020). A linear one has its biases scaled too."""

    def __init__(self, of: nn.Linear | CosineClassifier) -> None:
        super().__init__()
        self.of: nn.Linear | CosineClassifier = of.requires_grad_(False)
        self.scales_C = nn.Parameter(torch.ones(len(of.weight)))

    @property
    def weight(self) -> Tensor:
        """`[C, F]`, scaled."""
        return self.scales_C[:, None] * self.of.weight

    def normalise(self, tau: float) -> None:
        """Scale by `|w_y|^-tau` (tau-norm; Kang et al., eq. 5; the authors leave the biases out)."""
        self.scales_C.data = self.of.weight.norm(dim=1) ** -tau

    def forward(self, hidden_NF: Tensor) -> Tensor:
        return self.scales_C * self.of(hidden_NF)


def _projection(width: int, model: Model) -> nn.Sequential:
    hidden = model.hidden_dim or width
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, model.feature_dim)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last)


def _direction(projected_ND: Tensor) -> Tensor:
    """L2-normalised along D, in float32 at least, also under autocast."""
    return F.normalize(at_least_float32(projected_ND), dim=1)


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
    """The network with BatchNorm over the images of all ranks: torch's own on a GPU, plain operations on a CPU. Raises
    UserError for a kind of BatchNorm that has no such form on a CPU."""
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
