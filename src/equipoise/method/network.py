"""The two-branch network: images become `logits_BC`, `features_BVD` and `prototypes_CD`.

Shapes: B images, V contrastive views, C classes, D width of the contrastive features, F width of the encoder,
N images that pass the encoder together.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils.checkpoint import checkpoint

from equipoise.base.errors import UserError
from equipoise.base.world import sum_over_ranks
from equipoise.config.recipe import Model, Recipe
from equipoise.method.encoders import create_encoder
from equipoise.method.losses import at_least_float32
from equipoise.method.methods import METHODS
from equipoise.method.objective import COSINE_SCALE, Outputs
from equipoise.method.tuning import restrict


class TwoBranchNetwork(nn.Module):
    """An encoder with a classifier and, beside it, the contrastive branch of BCL (Zhu et al., CVPR 2022, fig. 3).
    Normalisation of images is inside. Training calls `training_outputs`."""

    def __init__(self, recipe: Recipe, classes: int, start: bool = True) -> None:
        """With the projections that the recipe's method needs; with `start`, with the pretrained weights that it names.
        Raises UserError for an encoder that is not known, or does not take that size, or whose weights cannot be had.
        """
        super().__init__()
        model, views, method = recipe.model, recipe.views, METHODS[recipe.method]
        pretrained, weights = model.tune != "scratch" and start, model.weights if start else ""
        self.encoder, self.width = create_encoder(model.encoder, views.size, pretrained, weights)
        restrict(self.encoder, model.tune)
        width, linear = self.width, model.classifier == "linear"
        classifier = nn.Linear(width, classes) if linear else CosineClassifier(width, classes, model.anchor)
        self.classifier = ScaledClassifier(classifier) if model.classifier_start == "scaled" else classifier
        self.projection = _projection(width, model) if method.contrastive else None
        self.prototype_projection = _projection(width, model) if method.prototypes else None
        self.shares_views = method.shares_views
        self.mean, self.std = (
            nn.Buffer(255 * torch.tensor(of).view(1, 3, 1, 1), persistent=False) for of in (views.mean, views.std)
        )

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """`logits_NC` of uint8 images `[N, 3, H, W]`, with no prior added: their argmax is the prediction."""
        return self._classify(self.encode(images_N3HW))

    def synchronise_batch_norm(self, device: torch.device) -> None:
        """BatchNorm over the images of all ranks, but for that of the prototypes, whose rows are the same on each:
        torch's own on a GPU, plain operations on a CPU. Raises UserError for a kind that has no such form on a CPU."""
        if device.type == "cuda":
            from timm.layers.norm_act import convert_sync_batchnorm  # converts torch's kinds and timm's own

            convert_sync_batchnorm(self.contrastive_branch())
            return
        for module in batch_norms(self.contrastive_branch()):
            if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
                fault = f"on a CPU, {type(module).__name__} cannot be synchronised"
                raise UserError(f"{fault}; set model.batch_norm to per-rank, or change --arch")
            module.__class__ = _OverRanks  # the same state, another forward pass

    def contrastive_branch(self) -> nn.Sequential:
        """The encoder and, where there is one, the projection."""
        return nn.Sequential(*filter(None, (self.encoder, self.projection)))

    def training_outputs(
        self, images_VB3HW: Tensor, micro_batch: int = 0, copy: nn.Sequential | None = None, momentum: float = 0.0
    ) -> Outputs:
        """What the losses need of a training batch of uint8 images: view 0 is for the classifier, the others (V of the
        outputs) are for the contrastive branch. Or all are for both (`shares_views`). With a `copy` of the contrastive
        branch, the last view passes that. Beforehand it is moved towards the weights: momentum * copy + (1 - momentum)
        * weights (MoCo: He et al., CVPR 2020, eq. 2).

        All views pass the encoder and its BatchNorm together, as in the authors' code; with `micro_batch`, in parts of
        at most that many images. Then only the encoder's output is kept, and the backward pass computes each part anew,
        in the memory of one: the feature cache of GradCache (Gao et al., 2021, arXiv:2101.06983). Losses and gradients
        are still those of the whole batch; BatchNorm's statistics in the encoder are those of a part.
        """
        if copy is not None:
            outputs = self.training_outputs(images_VB3HW[:-1], micro_batch)
            keys_BD = self._keys(images_VB3HW[-1], micro_batch, copy, momentum)
            return outputs._replace(features_BVD=torch.cat([outputs.features_BVD, keys_BD[:, None]], dim=1))
        views, batch = images_VB3HW.shape[:2]

        def by_image(of_ND: Tensor) -> Tensor:
            return of_ND.unflatten(0, (views, batch)).transpose(0, 1)

        if micro_batch and micro_batch < batch:
            parts = [self._encode_twice(part) for part in images_VB3HW.tensor_split(-(-batch // micro_batch), dim=1)]
            hidden_NF = torch.cat(parts, dim=1).flatten(0, 1)
        else:
            hidden_NF = self.encode(images_VB3HW.flatten(0, 1))
        logits_BC = by_image(self._classify(hidden_NF)) if self.shares_views else self._classify(hidden_NF[:batch])
        if self.projection is None:
            return Outputs(logits_BC)
        # View 0 is projected too, and dropped: the authors' BatchNorm statistics are over all views.
        projected_ND: Tensor = self.projection(hidden_NF)
        features_BVD = by_image(_direction(projected_ND))[:, 0 if self.shares_views else 1 :]
        if self.prototype_projection is None:
            return Outputs(logits_BC, features_BVD)
        centres_CD: Tensor = self.prototype_projection(self.classifier.weight)
        projected = projected_ND[:batch].detach(), centres_CD.detach()
        return Outputs(logits_BC, features_BVD, _direction(centres_CD), projected)

    def _encode_twice(self, images_VB3HW: Tensor) -> Tensor:
        """`[V, B, F]`. Nothing is kept for the backward pass, which encodes again: with the same random numbers, and
        without moving BatchNorm's averages a second time."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), resting_averages(self.encoder)

        hidden: Tensor = checkpoint(self.encode, images_VB3HW.flatten(0, 1), use_reentrant=False, context_fn=contexts)  # pyright: ignore[reportAssignmentType]
        return hidden.unflatten(0, images_VB3HW.shape[:2])

    @torch.no_grad()
    def _keys(self, images_B3HW: Tensor, micro_batch: int, copy: nn.Sequential, momentum: float) -> Tensor:
        """`[B, D]`, by the copy, after it was moved. Its BatchNorm's averages are its own: they are used only where
        BatchNorm is frozen, and then do not move."""
        branch = self.contrastive_branch()
        pairs = zip(copy.parameters(), branch.parameters(), strict=True)
        followers, weights = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(followers, weights, 1 - momentum)  # pyright: ignore[reportPrivateUsage] one launch for all
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
        return at_least_float32((encoder or self.encoder)((images_N3HW - self.mean) / self.std))

    def _classify(self, hidden_NF: Tensor) -> Tensor:
        # In float32 under autocast too: at scale 30, bfloat16 would round logits to steps of an eighth.
        with torch.autocast(hidden_NF.device.type, enabled=False):
            return self.classifier(hidden_NF)


class CosineClassifier(nn.Module):
    """`30 * cos(h, W)`: each class weight starts as a random direction of length 1, or where `start_at` says, and is
    held there by an `anchor` above 0."""

    def __init__(self, width: int, classes: int, anchor: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(classes, width).uniform_(-1, 1), dim=1))
        self.anchor = anchor
        if anchor:
            self.start = nn.Buffer(self.weight.detach().clone())

    def start_at(self, means_CF: Tensor) -> None:
        """Begin with these directions, of which a class may have none (0) and then keeps its own."""
        directions_CF = F.normalize(means_CF, dim=1).to(self.weight)
        there_C1 = directions_CF.any(dim=1, keepdim=True)
        self.weight.data.copy_(torch.where(there_C1, directions_CF, self.weight.data))
        if self.anchor:
            self.start.copy_(self.weight.data)

    def penalty(self, class_counts_C: Tensor) -> Tensor:
        """Half the squared distance of each class weight from its start (as L2-SP, Li et al., ICML 2018), times
        anchor / sqrt(N n_c) with n_c of N training images: what few images say moves a class less."""
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


class _OverRanks(_BatchNorm):
    """BatchNorm with the mean and variance of the rows of all ranks. Each rank may have another number of rows."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        axes, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        x = at_least_float32(input)  # under autocast, sums in bfloat16 would be wrong
        total = sum_over_ranks(torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype))
        mean = sum_over_ranks(x.sum(axes)) / total
        centred = x - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(axes)) / total
        momentum = self.momentum or 0.0  # it is None, for the mean over all batches, in no encoder
        with torch.no_grad():
            self.get_buffer("num_batches_tracked").add_(1)
            self.get_buffer("running_mean").lerp_(mean, momentum)
            self.get_buffer("running_var").lerp_(variance * (total / (total - 1)), momentum)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        return (normalised * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)
