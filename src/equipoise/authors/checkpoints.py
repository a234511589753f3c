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

from torch import Tensor

from equipoise.base.errors import UserError, shown

# Their parts in the order of their model's definition, by which its optimizer numbers the parameters; and ours.
_PARTS = {"encoder": "encoder", "head": "projection", "fc": "classifier", "head_fc": "prototype_projection"}
_ARCHS = {"resnet50": "resnet50", "resnext50": "resnext50", "resnext50_32x4d": "resnext50"}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class AuthorsModel:
    """What one of their checkpoints holds, in our names and layout. `momentum`: SGD's buffers by parameter, where the
    file has them. Its best accuracy is not read: it is of another run's best checkpoint, which need not be at hand."""

    arch: str
    classifier: str
    classes: int
    hidden_dim: int
    feature_dim: int
    epoch: int
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]


def is_authors_table(table: object) -> TypeGuard[dict[str, Any]]:
    """Whether what a file held is a checkpoint of theirs."""
    return isinstance(table, dict) and isinstance(table.get("state_dict"), Mapping)


def parameter_names(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of a network's parameters in the order in which an optimizer numbers them: a state without
    BatchNorm's counters and averages."""
    return [name for name in weights if name.rpartition(".")[2] not in _BUFFERS]


# ---------------------------------------------------------------------------------------------- theirs to ours


def from_authors(table: Mapping[str, Any], where: str) -> AuthorsModel:
    """Their table in our names and layout. Raises UserError, beginning with `where`, for what is no such table."""
    state = _state(table["state_dict"], where)
    fc = _needed(state, "fc.weight", where)
    classifier = "linear" if "fc.bias" in state else "cosine"
    _shape(fc, 2, "fc.weight", where)
    width, classes = fc.shape if classifier == "cosine" else (fc.shape[1], fc.shape[0])
    hidden, feature_dim = 0, 0
    for part in ("head", "head_fc"):
        first, last = (_needed(state, f"{part}.{layer}.weight", where) for layer in (0, 3))
        _shape(first, 2, f"{part}.0.weight", where)
        _shape(last, 2, f"{part}.3.weight", where)
        for name, found, expected in (("0", first.shape[1], width), ("3", last.shape[1], first.shape[0])):
            if found != expected:
                raise UserError(f"{where}: {part}.{name}.weight takes {found} features where {expected} come in")
        if hidden and (first.shape[0], last.shape[0]) != (hidden, feature_dim):
            raise UserError(f"{where}: head and head_fc differ in their widths")
        hidden, feature_dim = first.shape[0], last.shape[0]
    epoch = table.get("epoch", 0)
    if type(epoch) is not int or not 0 <= epoch < 2**63:
        raise UserError(f"{where}: epoch is {shown(epoch)}, not a number of epochs")
    transposed = classifier == "cosine"
    weights = {_our_name(name): _ours(name, value, transposed) for name, value in state.items()}
    arch = _arch(table.get("arch"), state, where)
    momentum = _momentum(table.get("optimizer"), state, where)
    return AuthorsModel(
        arch=arch,
        classifier=classifier,
        classes=classes,
        hidden_dim=hidden,
        feature_dim=feature_dim,
        epoch=epoch,
        weights={name: weights[name] for name in _in_our_order(weights)},
        momentum={_our_name(name): _ours(name, value, transposed) for name, value in momentum.items()},
    )


def _state(state_dict: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """Their state without DataParallel's prefix, in its order. Raises UserError for what cannot be one."""
    state: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise UserError(f"{where}: {shown(key)} is no name of a tensor")
        name = key.removeprefix("module.")
        part = name.partition(".")[0]
        known = part in ("encoder", "head", "head_fc", "fc") and not name.startswith("encoder.fc.")
        if part == "fc":
            known = name in ("fc.weight", "fc.bias")
        if not known:
            raise UserError(f"{where}: '{key[:80]}' is no part of the BCL authors' model; is it another method's?")
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: '{key[:80]}' holds a {type(value).__name__}, not a tensor")
        counts = name.endswith("num_batches_tracked")
        if not counts and not value.is_floating_point():
            raise UserError(f"{where}: '{key}' holds {value.dtype}, not floating-point numbers")
        if not counts and not bool(value.isfinite().all()):
            raise UserError(f"{where}: '{key}' has values that are not finite")
        state[name] = value if counts else value.float()
    if not any(name.startswith("encoder.") for name in state):
        raise UserError(f"{where}: it has no encoder")
    return state


def _needed(state: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name not in state:
        raise UserError(f"{where}: '{name}' is missing; is it a checkpoint of the BCL authors' code?")
    return state[name]


def _shape(value: Tensor, dimensions: int, name: str, where: str) -> None:
    if value.ndim != dimensions:
        raise UserError(f"{where}: '{name}' has shape {list(value.shape)}, where {dimensions} dimensions are needed")


def _arch(arch: object, state: Mapping[str, Tensor], where: str) -> str:
    """The encoder: by the weights where they tell, else by its name."""
    grouped = state.get("encoder.layer1.0.conv2.weight")
    if grouped is not None:
        for name, shape in (("resnet50", [64, 64, 3, 3]), ("resnext50", [128, 4, 3, 3])):
            if list(grouped.shape) == shape:
                return name
    if isinstance(arch, str) and arch not in _ARCHS:
        return arch
    raise UserError(f"{where}: its encoder is neither a ResNet-50 nor a ResNeXt-50 by its weights")


def _our_name(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{_PARTS[part]}.{rest}"


def _ours(name: str, value: Tensor, transposed: bool) -> Tensor:
    """Their cosine classifier keeps a column a class, ours a row."""
    return value.T.contiguous() if name == "fc.weight" and transposed else value


def _in_our_order(weights: Mapping[str, Tensor]) -> list[str]:
    """As `TwoBranchNetwork` has them: the optimizer numbers its parameters by it."""
    parts = ("encoder", "classifier", "projection", "prototype_projection")
    return sorted(
        weights, key=lambda name: parts.index(name.partition(".")[0])
    )  # stable: the order within a part stays


def _momentum(optimizer: object, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """SGD's momentum by their parameter names. It is numbered in the order of the state, buffers left out."""
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("state"), Mapping):
        return {}
    names = parameter_names(state)
    momentum: dict[str, Tensor] = {}
    for index, entry in optimizer["state"].items():
        buffer = entry.get("momentum_buffer") if isinstance(entry, Mapping) else None
        if buffer is None:
            continue
        fits = isinstance(index, int) and 0 <= index < len(names) and isinstance(buffer, Tensor)
        if not fits or buffer.shape != state[names[index]].shape:
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
    validation part, a fraction: on ImageNet-LT's, which is balanced, it is the top-1 accuracy that theirs has there.
    `param_group`: the one of our SGD; `extra` is kept under the key 'equipoise', which their code does not look at.

    Raises UserError for a model that theirs cannot be: another encoder, or no contrastive branch with prototypes.
    """
    if arch not in _ARCHS:
        raise UserError(f"the BCL authors' code knows resnet50 and resnext50, not {arch}; nothing was written")
    ours_to_theirs = {ours: theirs for theirs, ours in _PARTS.items()}
    for part in ours_to_theirs:
        if not any(name.startswith(f"{part}.") for name in weights):
            raise UserError(
                f"the BCL authors' model has a {part.replace('_', ' ')}, which only --method bcl trains; nothing was "
                "written"
            )
    transposed = classifier == "cosine"
    state: dict[str, Tensor] = {}
    buffers: dict[int, dict[str, Tensor]] = {}
    parameters = 0
    for theirs, ours in _PARTS.items():
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            if part != ours:
                continue
            key = f"{theirs}.{rest}"
            state[f"module.{key}"] = _ours(key, value, transposed)
            if rest.rpartition(".")[2] not in _BUFFERS:
                if name in momentum:
                    buffers[parameters] = {"momentum_buffer": _ours(key, momentum[name], transposed)}
                parameters += 1
    return {
        "epoch": epoch,
        "arch": _ARCHS[arch],
        "state_dict": state,
        "best_acc1": 100 * best_per_class if best_per_class is not None else 0.0,
        "optimizer": {"state": buffers, "param_groups": [{**param_group, "params": list(range(parameters))}]},
        "equipoise": dict(extra),
    }
