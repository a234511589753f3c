"""A checkpoint of the BCL authors' code becomes weights and momentum under our names and in our layout.

Their file is a dict of `epoch`, `arch`, `best_acc1`, `optimizer` and the `state_dict` of a DataParallel model:
`module.encoder.*` in torchvision's ResNet naming (timm's is the same), `module.head.*` (the projection),
`module.fc.*` (the classifier; cosine: weight `[F, C]`, no bias) and `module.head_fc.*` (the projection of the
prototypes). Read in github.com/FlamieZhu/Balanced-Contrastive-Learning, `models/resnext.py` and `main.py`.

Shapes: C classes, F width of the encoder.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor

from equipoise.base.errors import UserError, shown
from equipoise.config.recipe import Model, Recipe

# Their parts and ours, in the order of `TwoBranchNetwork`, by which its optimizer numbers the parameters.
_PARTS = {"encoder": "encoder", "fc": "classifier", "head": "projection", "head_fc": "prototype_projection"}
_ENCODERS: dict[tuple[int, ...], str] = {(64, 64, 3, 3): "resnet50", (128, 4, 3, 3): "resnext50"}  # by a weight
_MATRICES = ("classifier.weight", "projection.0.weight", "projection.3.weight")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class AuthorsModel:
    """A checkpoint of the authors in our names and layout. Of the recipe only the model is known."""

    recipe: Recipe
    epoch: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]  # the state of our SGD with their momentum, where the file has it


def is_authors_table(table: object) -> TypeGuard[dict[str, Any]]:
    """Whether the table of a file is one of the authors' checkpoints."""
    return isinstance(table, dict) and isinstance(table.get("state_dict"), Mapping)


def from_authors(table: Mapping[str, Any], where: str) -> AuthorsModel:
    """Their table in our names and layout. Raises UserError, beginning with `where`, for a table that is not theirs.
    Whether all shapes fit the network is checked where it is built."""
    state: dict[str, Tensor] = {}
    for key, value in table["state_dict"].items():
        part, _, rest = str(key).removeprefix("module.").partition(".")
        if part not in _PARTS or not isinstance(value, Tensor):
            raise UserError(f"{where}: '{key}' is no part of the BCL authors' model; is it another method's?")
        state[f"{_PARTS[part]}.{rest}"] = value.float() if value.is_floating_point() else value
    if not all(name in state and state[name].ndim == 2 for name in _MATRICES):
        raise UserError(f"{where}: it lacks the matrix of a layer; is it a checkpoint of the BCL authors' code?")
    conv2 = state.get("encoder.layer1.0.conv2.weight")
    encoder = _ENCODERS.get(tuple(conv2.shape) if conv2 is not None else (), table.get("arch"))
    epoch = table.get("epoch", 0)
    if not isinstance(encoder, str) or not isinstance(epoch, int):
        raise UserError(f"{where}: arch is {shown(encoder)} and epoch {shown(epoch)}; take another checkpoint")
    momentum = _momentum(table.get("optimizer"), state, where)
    cosine = "classifier.bias" not in state
    for tensors in (state, momentum) if cosine else ():  # theirs has a column for each class, ours a row
        if "classifier.weight" in tensors:
            tensors["classifier.weight"] = tensors["classifier.weight"].T.contiguous()
    weights = {name: state[name] for part in _PARTS.values() for name in state if name.partition(".")[0] == part}
    numbered = enumerate(_parameters(weights))
    buffers = {number: {"momentum_buffer": momentum[name]} for number, name in numbered if name in momentum}
    hidden, width = state["projection.0.weight"].shape
    model = Model(
        encoder=encoder,
        classifier="cosine" if cosine else "linear",
        hidden_dim=0 if hidden == width else hidden,  # in a recipe, 0 is the encoder's width
        feature_dim=len(state["projection.3.weight"]),
    )
    return AuthorsModel(Recipe(name="authors", model=model), epoch, weights, {"state": buffers, "param_groups": []})


def _parameters(names: Iterable[str]) -> list[str]:
    """What an optimizer numbers of a state: all but BatchNorm's counters and averages."""
    return [name for name in names if name.rpartition(".")[2] not in _BUFFERS]


def _momentum(optimizer: Any, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """SGD's momentum by parameter. Their optimizer numbers parameters in the order of the state."""
    names = _parameters(state)
    try:
        entries = optimizer["state"].items() if optimizer else ()
        buffers = [(names[index], entry["momentum_buffer"]) for index, entry in entries]
        momentum = {name: value for name, value in buffers if value is not None}  # None: momentum was 0
        if all(value.shape == state[name].shape for name, value in momentum.items()):
            return {name: value.float() for name, value in momentum.items()}
    except (LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"{where}: the optimizer's state does not fit the model; take another checkpoint")
