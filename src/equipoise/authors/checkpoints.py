"""A checkpoint of the BCL authors' code becomes weights under our names and in our layout.

Their file is a dict of `epoch`, `arch`, `best_acc1`, `optimizer` and the `state_dict` of a DataParallel model:
`module.encoder.*` in torchvision's ResNet naming (timm's is the same), `module.head.*` (the projection),
`module.fc.*` (the classifier; cosine: weight `[F, C]`, no bias) and `module.head_fc.*` (the projection of the
prototypes). Read in github.com/FlamieZhu/Balanced-Contrastive-Learning, `models/resnext.py` and `main.py`.

Shapes: C classes, F width of the encoder.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from equipoise.base.errors import UserError, shown
from equipoise.config.recipe import Model, Recipe

# Their parts and ours.
_PARTS = {"encoder": "encoder", "fc": "classifier", "head": "projection", "head_fc": "prototype_projection"}
_ENCODERS: dict[tuple[int, ...], str] = {(64, 64, 3, 3): "resnet50", (128, 4, 3, 3): "resnext50"}  # by a weight
_MATRICES = ("classifier.weight", "projection.0.weight", "projection.3.weight")


def from_authors(table: Mapping[str, Any], where: str) -> tuple[Recipe, int, dict[str, Tensor]]:
    """The recipe, of which only the model is known, the epoch, and the weights in our names and layout. Raises
    UserError, beginning with `where`, for a table that is not theirs. Whether all shapes fit the network is checked
    where it is built."""
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
    cosine = "classifier.bias" not in state
    if cosine:  # theirs has a column for each class, ours a row
        state["classifier.weight"] = state["classifier.weight"].T.contiguous()
    hidden, width = state["projection.0.weight"].shape
    model = Model(
        encoder=encoder,
        classifier="cosine" if cosine else "linear",
        hidden_dim=0 if hidden == width else hidden,  # in a recipe, 0 is the encoder's width
        feature_dim=len(state["projection.3.weight"]),
    )
    return Recipe(name="authors", model=model), epoch, state
