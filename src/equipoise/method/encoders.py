"""A name becomes an encoder `[N, 3, H, W] -> [N, F]` and its width F.

The CIFAR family of He et al. (CVPR 2016, section 4.2: 16/32/64 channels, parameter-free shortcuts) is built here
because no library keeps it; everything else is timm's.
"""

import itertools
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.base.errors import UserError, reason
from equipoise.base.files import load_tensors
from equipoise.config.recipe import nearest
from equipoise.method import clip
from equipoise.method.pretrained import find_pretrained, of_timm, timm_name

_BLOCKS_PER_STAGE = {"resnet8": 1, "resnet20": 3, "resnet32": 5}
_WIDTHS: dict[tuple[str, int], int] = {}  # of the encoders, by name and size, that were tried


def create_encoder(name: str, size: int, pretrained: bool = False, weights: str | Path = "") -> tuple[nn.Module, int]:
    """The encoder called `name` for images of `size` pixels, and its width F. It starts from random weights, from
    pretrained ones, wherever these are (`pretrained.py`), or from the file `weights`: in timm's or torchvision's names,
    or a checkpoint of a run or of the BCL authors' code. Raises UserError for an unknown name, weights that cannot be
    had or do not fit, or a size that it does not take."""
    found = find_pretrained(name) if pretrained and not weights else None  # a file that is named goes first
    file = weights or (found and found.file) or ""
    if name.startswith(clip.PREFIX):
        encoder, file = clip.towers(name, str(file), start=pretrained or bool(weights)).visual, ""
    elif name in _BLOCKS_PER_STAGE:
        encoder = SmallResNet(_BLOCKS_PER_STAGE[name])
    else:
        encoder = _timm_encoder(timm_name(name), size, fetch=found is not None and not file)
    if file:
        _load_weights(encoder, name, Path(file))
    return encoder, _width(encoder, name, size)


def _width(encoder: nn.Module, name: str, size: int) -> int:
    """By trying, once: timm's num_features is not always the width of the output."""
    if (name, size) not in _WIDTHS:
        try:
            with torch.inference_mode():
                features = encoder.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            why = reason(error, library=True, otherwise="its layers do not fit them")
            raise UserError(f"{name} does not take images of {size} pixels ({why}); change --size or --arch") from None
        if features.ndim != 2:
            raise UserError(f"{name} gives features of shape {list(features.shape)[1:]}, not one vector; change --arch")
        encoder.train()
        _WIDTHS[name, size] = features.shape[1]
    return _WIDTHS[name, size]


def timm_arguments(name: str, size: int) -> tuple[str, dict[str, Any]] | None:
    """timm's name of the encoder `name`, and the arguments that make it take `size` pixels; None for one of ours
    or of open_clip."""
    if name in _BLOCKS_PER_STAGE or name.startswith(clip.PREFIX):
        return None
    known = of_timm(name)
    return timm_name(name).split(".")[0], {"img_size": size} if known and known.fixed_input_size else {}


def _timm_encoder(name: str, size: int, fetch: bool) -> nn.Module:
    import timm  # two seconds, and the small networks need none of it

    if not timm.is_model(name):
        raise UserError(f"no encoder is called '{name}'{nearest(name, [*_BLOCKS_PER_STAGE, *timm.list_models()])}")
    try:
        _, options = timm_arguments(name, size) or ("", {})
        if not fetch and name in ("resnet50", "resnext50_32x4d"):
            options["zero_init_last"] = False  # as the authors' code starts them
        return timm.create_model(name, pretrained=fetch, num_classes=0, **options)
    except (OSError, RuntimeError, TypeError) as error:
        why = reason(error, library=True, otherwise="timm does not say why")
        advice = "connect to the network, or name a file with --weights" if fetch else "change --size or --arch"
        raise UserError(f"timm cannot build {name} at {size} pixels ({why}); {advice}") from None


def _load_weights(encoder: nn.Module, name: str, file: Path) -> None:
    """Put the weights of a file into the encoder, all of them. Raises UserError where any is missing or differs."""
    state, expected = _read_weights(file, encoder), encoder.state_dict()
    # Other keys, those of a classifier above the encoder, are ignored.
    found = [key for key in expected if key in state]
    faults = {
        "are not in it": [key for key in expected if key not in state and not key.endswith("num_batches_tracked")],
        "have another shape in it": [key for key in found if state[key].shape != expected[key].shape],
        "hold numbers that are not finite": [key for key in found if not bool(state[key].isfinite().all())],
    }
    for fault, keys in faults.items():
        if keys:
            how = f"{len(keys):,} of {len(expected):,} {fault} (first: {keys[0]})"
            raise UserError(f"{file} does not hold the weights of {name}: {how}; take another")
    encoder.load_state_dict({key: state.get(key, value) for key, value in expected.items()})


def _read_weights(file: Path, encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file by name, without the wrappings that training programs put around them. Through timm's own
    conversion, where there is one: other names, position embeddings of another size."""
    table: Any = load_tensors(file, "file of weights")
    for wrapping in ("state_dict_ema", "model_ema", "state_dict", "model", "weights"):
        if isinstance(table, dict) and isinstance(table.get(wrapping), dict):
            table = table[wrapping]
    if not isinstance(table, dict) or not all(isinstance(value, Tensor) for value in table.values()):
        raise UserError(f"{file} does not hold tensors by name, as a file of weights does")
    state = {str(key).removeprefix("module."): value for key, value in table.items()}
    if not any(key.startswith("encoder.") for key in encoder.state_dict()):
        state = {key.removeprefix("encoder."): value for key, value in state.items()}  # of a two-branch network
    if "_conv_stem.weight" in state:  # EfficientNet-PyTorch's names, in the order of timm's
        return dict(zip(encoder.state_dict(), state.values(), strict=False))
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    with suppress(Exception):  # it expects weights of its own architecture
        return convert(state, encoder) if convert else state
    return state  # the missing names say so


class SmallResNet(nn.Module):
    """ResNet for small images: a 3x3 stem and three stages of 16, 32 and 64 channels; 6 n + 2 layers."""

    def __init__(self, blocks_per_stage: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [width for width in (16, 32, 64) for _ in range(blocks_per_stage)]
        self.blocks = nn.Sequential(*itertools.starmap(_Block, itertools.pairwise([16, *widths])))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Which names belong to which layer."""
        return {"stem": r"^stem|^norm", "blocks": r"^blocks\.(\d+)"}

    def forward(self, images_N3HW: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images_N3HW)), inplace=True)
        return self.blocks(x).mean((2, 3))


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=1 if width == width_in else 2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        new = y.shape[1] - x.shape[1]
        if new:  # option A of the paper: every second pixel, new channels zero. It adds no parameters
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new // 2))
        return F.relu(torch.add(x, y), inplace=True)
