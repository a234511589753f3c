"""A checkpoint of the BCL authors' code becomes weights and momentum under our names and in our layout.

Their file is a dict of `epoch`, `arch`, `best_acc1`, `optimizer` and the `state_dict` of a DataParallel model:
`module.encoder.*` in torchvision's ResNet naming (timm's is the same), `module.head.*` (the projection),
`module.fc.*` (the classifier; cosine: weight `[F, C]`, no bias) and `module.head_fc.*` (the projection of the
prototypes). Read in github.com/FlamieZhu/Balanced-Contrastive-Learning, `models/resnext.py` and `main.py`.

Shapes: C classes, F width of the encoder.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import Tensor

from equipoise.base.errors import UserError, shown
from equipoise.config.recipe import Recipe

AUTHORS = "authors"  # the name of a recipe of which only the model is known
# Their parts, in the order of `TwoBranchNetwork`, by which its optimizer numbers the parameters; and our names.
_PARTS = {"encoder": "encoder", "fc": "classifier", "head": "projection", "head_fc": "prototype_projection"}
_ENCODERS = {(64, 64, 3, 3): "resnet50", (128, 4, 3, 3): "resnext50"}  # by the shape of a weight
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class AuthorsModel:
    """A checkpoint of the authors in our names and layout. Of the `recipe` only the model is known; `optimizer` is the
    state of our SGD with their momentum, where the file has it. Their best accuracy is not read: it belongs to the best
    checkpoint of a run, which may be another file."""

    recipe: Recipe
    epoch: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def is_authors_table(table: object) -> TypeGuard[dict[str, Any]]:
    """Whether the table of a file is one of the authors' checkpoints."""
    return isinstance(table, dict) and isinstance(table.get("state_dict"), Mapping)


def from_authors(table: Mapping[str, Any], where: str) -> AuthorsModel:
    """Their table in our names and layout. Raises UserError, beginning with `where`, for a table that is not theirs.
    Whether all shapes fit the network is checked where it is built."""
    state = {str(key).removeprefix("module."): value for key, value in table["state_dict"].items()}
    for name, value in state.items():
        if name.partition(".")[0] not in _PARTS or not isinstance(value, Tensor):
            raise UserError(f"{where}: '{name}' is no part of the BCL authors' model; is it another method's?")
    for name in ("fc.weight", "head.0.weight", "head.3.weight"):
        if name not in state or state[name].ndim != 2:
            raise UserError(f"{where}: it has no matrix '{name}'; is it a checkpoint of the BCL authors' code?")
    conv2 = state.get("encoder.layer1.0.conv2.weight")
    encoder = _ENCODERS.get(tuple(conv2.shape) if conv2 is not None else (), table.get("arch"))
    epoch = table.get("epoch", 0)
    if not isinstance(encoder, str) or not isinstance(epoch, int):
        raise UserError(f"{where}: arch is {shown(encoder)} and epoch {shown(epoch)}; take another checkpoint")
    cosine = "fc.bias" not in state
    momentum = _momentum(table.get("optimizer"), state, where)
    ordered = [name for part in _PARTS for name in state if name.partition(".")[0] == part]
    weights = {name: _our_layout(name, state[name], cosine) for name in ordered}
    buffers = {
        number: {"momentum_buffer": _our_layout(name, momentum[name], cosine)}
        for number, name in enumerate(_parameters(ordered))
        if name in momentum
    }
    width, hidden = weights["fc.weight"].shape[1], state["head.0.weight"].shape[0]
    model = replace(
        Recipe().model,
        encoder=encoder,
        classifier="cosine" if cosine else "linear",
        hidden_dim=0 if hidden == width else hidden,  # in a recipe, 0 is the encoder's width
        feature_dim=state["head.3.weight"].shape[0],
    )
    return AuthorsModel(
        recipe=Recipe(name=AUTHORS, model=model),
        epoch=epoch,
        weights={_our_name(name): value for name, value in weights.items()},
        optimizer={"state": buffers, "param_groups": []},
    )


def _our_name(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{_PARTS[part]}.{rest}"


def _our_layout(name: str, value: Tensor, cosine: bool) -> Tensor:
    """Their cosine classifier has a column for each class, ours a row."""
    if not value.is_floating_point():  # BatchNorm's counters
        return value
    return value.float().T.contiguous() if cosine and name == "fc.weight" else value.float()


def _parameters(names: Iterable[str]) -> list[str]:
    """What an optimizer numbers of a state: all but BatchNorm's counters and averages."""
    return [name for name in names if name.rpartition(".")[2] not in _BUFFERS]


def _momentum(optimizer: Any, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """SGD's momentum by their parameter names. Their optimizer numbers parameters in the order of the state."""
    names = _parameters(state)
    try:
        entries = optimizer["state"].items() if optimizer else ()
        momentum = {names[index]: entry["momentum_buffer"] for index, entry in entries}
        if all(value.shape == state[name].shape for name, value in momentum.items()):
            return {name: value.float() for name, value in momentum.items()}
    except (LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"{where}: the optimizer's state does not fit the model; take another checkpoint")
