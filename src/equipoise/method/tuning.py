"""How much of an encoder is trained, and how fast each of its layers.

timm knows the layers of its networks in order, by fine and by coarse groups; the coarse ones are stages.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.base.errors import UserError

RANK = 8  # of LoRA's matrices
_LAST_STAGE = 0.25  # its least share of the encoder's parameters: timm has groups of a norm alone


def restrict(encoder: nn.Module, tune: str) -> None:
    """Let that part of the encoder be trained that `tune` names (`Model.tune`), and nothing else. 'lora': low-rank
    additions to the weights of its linear layers (Hu et al., ICLR 2022). Raises UserError where it has no such part."""
    if tune in ("scratch", "full"):
        return
    encoder.requires_grad_(False)
    trained = list[nn.Parameter]()
    if tune == "head+norm":
        norms = [module for module in encoder.modules() if "Norm" in type(module).__name__]
        # timm has blocks of that name, whose convolutions are not meant.
        trained = [parameter for module in norms for parameter in module.parameters(recurse=False)]
    elif tune == "last-stage":
        trained = _last_stage(encoder)
    elif tune == "lora":
        linear = [module for module in encoder.modules() if type(module) is nn.Linear]
        if not linear or not hasattr(encoder, "group_matcher"):  # open_clip's attention has bare weights
            raise UserError("LoRA adds to linear layers of timm's vision transformers: set --tune last-stage or frozen")
        for module in linear:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    for parameter in trained:
        parameter.requires_grad_(True)


def _last_stage(encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters of the last groups, as few as hold a quarter of all."""
    from timm.models import group_parameters  # two seconds: see encoders.py

    if not hasattr(encoder, "group_matcher"):
        raise UserError("timm does not know the stages of this encoder: set --tune full or frozen")
    matcher = encoder.group_matcher(coarse=True)  # pyright: ignore[reportCallIssue] torch does not know timm's methods
    parameters = dict(encoder.named_parameters())
    stage_of: dict[str, int] = group_parameters(encoder, matcher, reverse=True)
    needed, chosen = _LAST_STAGE * sum(map(Tensor.numel, parameters.values())), list[nn.Parameter]()
    for stage in sorted(set(stage_of.values()), reverse=True):
        chosen += [parameter for name, parameter in parameters.items() if stage_of[name] == stage]
        if sum(map(Tensor.numel, chosen)) >= needed:
            break
    return chosen


class LowRank(nn.Module):
    """`W + B A`: A `[RANK, in]` random, B `[out, RANK]` zero at the start, so that the start is W."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(weight.new_empty(RANK, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(len(weight), RANK))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as peft starts it

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def merge_low_rank(network: nn.Module) -> None:
    """Write the sums `W + B A` in the place of their parts: the names are then those of the encoder again."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def parameter_groups(network: nn.Module, encoder: nn.Module, layer_decay: float) -> Sequence[dict[str, Any]]:
    """All parameters that are trained, as an optimizer takes them. `lr_scale`, of each group: what its learning rate is
    multiplied by, 1 above the encoder and `layer_decay` once more with each layer below (BEiT, Bao et al., ICLR 2022).
    Raises UserError where the layers are not known."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if layer_decay == 1:
        return [{"params": trained, "lr_scale": 1.0}]
    if not hasattr(encoder, "group_matcher"):
        raise UserError("timm does not know the layers of this encoder: set --layer-decay 1")
    from timm.optim import param_groups_layer_decay

    groups: list[dict[str, Any]] = param_groups_layer_decay(
        encoder, layer_decay=layer_decay, weight_decay_exclude_1d=False
    )
    below = {id(parameter) for group in groups for parameter in group["params"]}
    of_encoder = [{"params": group["params"], "lr_scale": layer_decay * group["lr_scale"]} for group in groups]
    return [{"params": [one for one in trained if id(one) not in below], "lr_scale": 1.0}, *of_encoder]
