"""Encoders that have a text tower beside them, by open_clip: the image tower is the encoder, and what the text tower
makes of the class names is where a classifier can start (Radford et al., ICML 2021, section 3.1.4).

Their names: `open_clip:ARCHITECTURE/TAG`, as open_clip lists them. Shapes: C classes, D width of the common space.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.base.errors import UserError, reason

PREFIX = "open_clip:"
_PROMPT = "a photo of a {}."


def _library() -> Any:
    try:
        import open_clip
    except ImportError:
        raise UserError("encoders with a text tower need open_clip: pip install open_clip_torch") from None
    return open_clip


def repository(name: str) -> str:
    """The repository of the hub with the weights of `name`; '' where open_clip knows none. Raises UserError for an
    architecture or weights that it does not know."""
    library = _library()
    architecture, _, tag = name.removeprefix(PREFIX).partition("/")
    if architecture not in library.list_models():
        raise UserError(f"open_clip knows no architecture {architecture}; name one of open_clip.list_models()")
    known = library.get_pretrained_cfg(architecture, tag)
    if tag and not known:
        tags = ", ".join(library.list_pretrained_tags_by_model(architecture))
        raise UserError(f"open_clip has no weights {tag} of {architecture}; it has: {tags or 'none'}")
    return str(known.get("hf_hub", "")).rstrip("/")


def towers(name: str, weights: str, start: bool) -> Any:
    """Both towers: with the weights of the file, of the hub, or with `start` false random ones. Raises UserError."""
    architecture, _, tag = name.removeprefix(PREFIX).partition("/")
    try:
        source = (weights or tag) if start else ""
        return _library().create_model(architecture, pretrained=source or None, device=torch.get_default_device())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"open_clip cannot build {name} ({reason(error, library=True)})") from None


def input_of(name: str) -> dict[str, Any]:
    """See `pretrained.input_of`."""
    repository(name)  # refuses what is not known
    architecture, _, tag = name.removeprefix(PREFIX).partition("/")
    library = _library()
    known = library.get_pretrained_cfg(architecture, tag)
    size = library.get_model_config(architecture)["vision_cfg"]["image_size"]
    return {
        "mean": tuple(known.get("mean") or library.OPENAI_DATASET_MEAN),
        "std": tuple(known.get("std") or library.OPENAI_DATASET_STD),
        "size": size,
    }


def text_directions(name: str, weights: str, class_names: Sequence[str]) -> Tensor:
    """`[C, D]` of length 1: what the text tower makes of each class's name."""
    prompts = [_PROMPT.format(label.replace("_", " ")) for label in class_names]
    try:
        tokens = _library().get_tokenizer(name.removeprefix(PREFIX).partition("/")[0])
    except (ImportError, OSError) as error:  # some are those of transformers, from the hub
        why = reason(error, library=True)
        raise UserError(f"the tokenizer of {name} cannot be had ({why}); set --classifier-start class-means") from None
    with torch.inference_mode():
        directions_CD = towers(name, weights, start=True).eval().encode_text(tokens(prompts))
    return F.normalize(directions_CD.float(), dim=1).clone()
