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


def look_up(name: str) -> tuple[Any, str, str, dict[str, Any]]:
    """open_clip, the architecture, the tag of its weights, and what open_clip knows of these. Raises UserError for an
    architecture or weights that it does not know."""
    try:
        import open_clip
    except ImportError:
        raise UserError("encoders with a text tower need open_clip: pip install open_clip_torch") from None
    architecture, _, tag = name.removeprefix(PREFIX).partition("/")
    if architecture not in open_clip.list_models():
        raise UserError(f"open_clip knows no architecture {architecture}; name one of open_clip.list_models()")
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if tag and not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise UserError(f"open_clip has no weights {tag} of {architecture}; it has: {tags or 'none'}")
    return open_clip, architecture, tag, known


def towers(name: str, weights: str, start: bool) -> Any:
    """Both towers: with the weights of the file, of the hub, or with `start` false random ones. Raises UserError."""
    library, architecture, tag, _ = look_up(name)
    source = (weights or tag) if start else ""
    try:
        return library.create_model(architecture, pretrained=source or None, device=torch.get_default_device())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"open_clip cannot build {name} ({reason(error, library=True)})") from None


def text_directions(name: str, weights: str, class_names: Sequence[str]) -> Tensor:
    """`[C, D]` of length 1: what the text tower makes of each class's name."""
    prompts = [f"a photo of a {label.replace('_', ' ')}." for label in class_names]
    library, architecture, *_ = look_up(name)
    try:
        tokens = library.get_tokenizer(architecture)
    except (ImportError, OSError) as error:  # some are those of transformers, from the hub
        why = reason(error, library=True)
        raise UserError(f"the tokenizer of {name} cannot be had ({why}); set --classifier-start class-means") from None
    with torch.inference_mode():
        directions_CD = towers(name, weights, start=True).eval().encode_text(tokens(prompts))
    return F.normalize(directions_CD.float(), dim=1).clone()
