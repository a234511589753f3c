"""The checkpoints of the BCL authors' code, both ways: their table and our weights, as pure functions.

Their file is a dict of `epoch`, `arch`, `best_acc1`, `optimizer` and the `state_dict` of a DataParallel model:
`module.encoder.*` in torchvision's ResNet naming (timm's is the same), `module.head.*` (the projection),
`module.fc.*` (the classifier; cosine: weight `[F, C]`, no bias) and `module.head_fc.*` (the projection of the
prototypes). Read in github.com/FlamieZhu/Balanced-Contrastive-Learning, `models/resnext.py` and `main.py`.

Shapes: C classes, F width of the encoder, D width of the contrastive features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from equipoise.base.errors import UserError, shown

# Their parts in the order of their model's definition, by which its optimizer numbers the parameters; and ours.
_PARTS = {"encoder": "encoder", "head": "projection", "fc": "classifier", "head_fc": "prototype_projection"}
_ARCHS = {"resnet50": "resnet50", "resnext50": "resnext50", "resnext50_32x4d": "resnext50"}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class AuthorsModel:
    """A checkpoint of the authors in our names and layout. `momentum`: SGD's buffers by parameter, if the file has
    them. Its best accuracy is not read: it belongs to the best checkpoint of a run, which may be another file."""

    arch: str
    classifier: str
    classes: int
    hidden_dim: int
    feature_dim: int
    epoch: int
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]


def is_authors_table(table: object) -> TypeGuard[dict[str, Any]]:
    """Whether the table of a file is one of the authors' checkpoints."""
    return isinstance(table, dict) and isinstance(table.get("state_dict"), Mapping)


def parameter_names(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of a network's parameters in the order in which an optimizer numbers them: a state without
    BatchNorm's counters and averages."""
    return [name for name in weights if name.rpartition(".")[2] not in _BUFFERS]


def _transposed(name: str, value: Tensor, classifier: str) -> Tensor:
    """A tensor under the authors' name `name`, from their layout to ours or back: their cosine classifier has a column
    for each class, ours a row."""
    return value.T.contiguous() if name == "fc.weight" and classifier == "cosine" else value


# ---------------------------------------------------------------------------------------------- theirs to ours


def from_authors(table: Mapping[str, Any], where: str) -> AuthorsModel:
    """Their table in our names and layout. Raises UserError, beginning with `where`, for a table that is not theirs.
    Whether all shapes fit the network is checked where it is built."""
    state = _state(table["state_dict"], where)
    for name in ("fc.weight", "head.0.weight", "head.3.weight"):
        if name not in state or state[name].ndim != 2:
            raise UserError(f"{where}: it has no matrix '{name}'; is it a checkpoint of the BCL authors' code?")
    classifier = "linear" if "fc.bias" in state else "cosine"
    epoch = table.get("epoch", 0)
    if type(epoch) is not int or epoch < 0:
        raise UserError(f"{where}: epoch is {shown(epoch)}, not a number of epochs")
    arch = _arch(table.get("arch"), state, where)
    ours = {
        f"{_PARTS[name.partition('.')[0]]}.{name.partition('.')[2]}": name
        for theirs in ("encoder", "fc", "head", "head_fc")  # the order of `TwoBranchNetwork`
        for name in state
        if name.partition(".")[0] == theirs
    }
    momentum = _momentum(table.get("optimizer"), state, where)
    return AuthorsModel(
        arch=arch,
        classifier=classifier,
        classes=_transposed("fc.weight", state["fc.weight"], classifier).shape[0],
        hidden_dim=state["head.0.weight"].shape[0],
        feature_dim=state["head.3.weight"].shape[0],
        epoch=epoch,
        weights={name: _transposed(key, state[key], classifier) for name, key in ours.items()},
        momentum={name: _transposed(key, momentum[key], classifier) for name, key in ours.items() if key in momentum},
    )


def _state(state_dict: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Their state without DataParallel's prefix, in its order. Raises UserError for another model's."""
    state: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = str(key).removeprefix("module.")
        if name.startswith("encoder.fc.") or name.partition(".")[0] not in _PARTS:
            raise UserError(f"{where}: '{key}' is no part of the BCL authors' model; is it another method's?")
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: '{key}' holds {shown(value)}, not a tensor")
        counts = name.endswith("num_batches_tracked")
        if not counts and not bool(value.isfinite().all()):
            raise UserError(f"{where}: '{key}' has values that are not finite")
        state[name] = value if counts else value.float()
    return state


def _arch(arch: object, state: Mapping[str, Tensor], where: str) -> str:
    """The encoder: by the weights where they tell, else by its name."""
    conv2 = state.get("encoder.layer1.0.conv2.weight", torch.empty(0))
    for name, shape in (("resnet50", (64, 64, 3, 3)), ("resnext50", (128, 4, 3, 3))):
        if conv2.shape == shape:
            return name
    if isinstance(arch, str) and arch not in _ARCHS:
        return arch
    raise UserError(f"{where}: its encoder is neither a ResNet-50 nor a ResNeXt-50 by its weights")


def _momentum(optimizer: object, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """SGD's momentum by their parameter names. Their optimizer numbers parameters in the order of the state."""
    entries = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    names = dict(enumerate(parameter_names(state)))
    momentum: dict[str, Tensor] = {}
    for index, entry in entries.items() if isinstance(entries, Mapping) else ():
        buffer = entry.get("momentum_buffer")
        if buffer is None:
            continue
        if index not in names or buffer.shape != state[names[index]].shape:
            raise UserError(f"{where}: the optimizer's state does not fit the model (parameter {index})")
        momentum[names[index]] = buffer.float()
    return momentum


# ---------------------------------------------------------------------------------------------- ours to theirs


def to_authors(
    weights: Mapping[str, Tensor],
    momentum: Mapping[str, Tensor],
    *,
    arch: str,
    classifier: str,
    epoch: int,
    best_per_class: float | None,
    param_group: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The table that their code would have saved. `best_per_class`: the best mean per-class accuracy on the
    validation part, a fraction. ImageNet-LT's is balanced, so that it is the top-1 accuracy that their file has there.
    `param_group`: the one of our SGD; `extra` is kept under the key 'equipoise', which their code does not look at.

    Raises UserError for a model that theirs cannot be: another encoder, or no contrastive branch with prototypes.
    """
    if arch not in _ARCHS:
        raise UserError(f"the BCL authors' code knows resnet50 and resnext50, not {arch}; nothing was written")
    state: dict[str, Tensor] = {}
    buffers: dict[int, dict[str, Tensor]] = {}
    for theirs, ours in _PARTS.items():
        names = [name for name in weights if name.startswith(f"{ours}.")]
        if not names:
            part = ours.replace("_", " ")
            raise UserError(f"the BCL authors' model has a {part}, which only --method bcl trains; nothing was written")
        for name in names:
            key = theirs + name.removeprefix(ours)
            state[f"module.{key}"] = _transposed(key, weights[name], classifier)
            if name in momentum:
                number = len(parameter_names(state)) - 1
                buffers[number] = {"momentum_buffer": _transposed(key, momentum[name], classifier)}
    return {
        "epoch": epoch,
        "arch": _ARCHS[arch],
        "state_dict": state,
        "best_acc1": 100 * best_per_class if best_per_class is not None else 0.0,
        "optimizer": {
            "state": buffers,
            "param_groups": [{**param_group, "params": list(range(len(parameter_names(state))))}],
        },
        "equipoise": dict(extra),
    }
