"""A checkpoint becomes a hub-style folder of safetensors, and back. Nothing in the folder is executed.

`config.json` is timm's (architecture, arguments, preprocessing), with the rest of the checkpoint under 'equipoise'.
`model.safetensors` holds the encoder under timm's own names, so that timm loads it strictly; `head.safetensors` holds
the classifier, the projections, and what tells images of no class; `README.md` is the model card.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import torch

from equipoise.base.errors import UserError, in_words, reason
from equipoise.config.reading import recipe_from_table
from equipoise.config.recipe import Data
from equipoise.data.decode import DECODING
from equipoise.data.images import imbalance_factor
from equipoise.evaluation.metrics import ALL_FIGURES, GROUP_LIMITS, GROUPS, percent, shot_group
from equipoise.evaluation.none_of_these import KnownClasses
from equipoise.method.encoders import timm_arguments
from equipoise.runs.checkpoint import Checkpoint
from equipoise.views.views import short_side

CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"
_ENCODER = "encoder."
_MEANS, _THRESHOLD = "known.means", "known.threshold"  # of the classes' features (`KnownClasses`), beside the head


def write_hub_folder(
    folder: Path,
    checkpoint: Checkpoint,
    temperature: float | None,
    metrics: Mapping[str, Any] | None,
    known: KnownClasses | None = None,
) -> None:
    """Write `checkpoint` to `folder`, which appears complete or not at all. `metrics`: those of the checkpoint in
    `metrics.json`, for the model card. Raises UserError where the folder is not empty, or cannot be written."""
    from safetensors.torch import save

    checkpoint = checkpoint.merged()
    weights = {name: value.clone() for name, value in checkpoint.weights.items()}  # no two may share memory
    encoder = {name.removeprefix(_ENCODER): value for name, value in weights.items() if name.startswith(_ENCODER)}
    head = {name: value for name, value in weights.items() if not name.startswith(_ENCODER)}
    if known:
        head |= {_MEANS: known.means_CF.cpu(), _THRESHOLD: torch.tensor(known.threshold)}
    files = {
        WEIGHTS: save(encoder, {"format": "pt"}),
        HEAD: save(head, {"format": "pt"}),
        CONFIG: json.dumps(_config(checkpoint, temperature), indent=1).encode(),
        CARD: model_card(checkpoint, temperature, metrics).encode("utf-8", "backslashreplace"),
    }
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as temporary:
            written = Path(temporary) / folder.name
            written.mkdir()
            for name, content in files.items():
                (written / name).write_bytes(content)
            os.replace(written, folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({reason(error)}); name another folder with --out") from None


def read_hub_folder(folder: Path) -> tuple[Checkpoint, float | None, KnownClasses | None]:
    """The checkpoint of a folder that `write_hub_folder` wrote, its temperature, and what tells images of no class.
    Raises UserError for others."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Not msgspec's own JSON reader: it refuses the escapes of class names that are no UTF-8.
        about = json.loads((folder / CONFIG).read_bytes())["equipoise"]
        recipe = recipe_from_table(about["recipe"], str(folder / CONFIG))
        weights = {_ENCODER + name: value for name, value in load_file(folder / WEIGHTS).items()}
        head = load_file(folder / HEAD)
        means_CF, threshold = head.pop(_MEANS, None), head.pop(_THRESHOLD, None)
        known = None if means_CF is None or threshold is None else KnownClasses(means_CF, float(threshold))
        weights |= head
        absent = {"step": 0, "best": None, "optimizer": {}, "fingerprints": {}}
        checkpoint = msgspec.convert({**about, **absent, "recipe": recipe, "weights": weights}, Checkpoint)
        return checkpoint, msgspec.convert(about["temperature"], float | None), known
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        fault = f"is not a folder that equipoise export --to safetensors wrote, or damaged ({in_words(error)})"
        raise UserError(f"{folder} {fault}; export the model anew") from None


def _config(checkpoint: Checkpoint, temperature: float | None) -> dict[str, Any]:
    """`config.json`, in timm's format."""
    recipe = checkpoint.recipe
    size, photos = recipe.views.size, recipe.views.policy == "photos"
    name, arguments = timm_arguments(recipe.model.encoder, size) or (recipe.model.encoder, {})
    # The paths of the data and of the starting weights are private, and of no use elsewhere.
    data = Data(path="", sampler=recipe.data.sampler)  # on which the prior of the logits depends
    published = replace(recipe, data=data, model=replace(recipe.model, weights=""))
    return {
        "architecture": name,
        "num_classes": 0,  # the classifier is not one of timm's: the encoder alone is
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": "img_size" in arguments,
            "interpolation": "bilinear",
            # timm resizes the short side to size / crop_pct, rounded down.
            "crop_pct": round(size / (short_side(size) + 0.1), 6) if photos else 1.0,
            "crop_mode": "center" if photos else "squash",
            "mean": list(recipe.views.mean),
            "std": list(recipe.views.std),
            "classifier": None,
        },
        "equipoise": {
            "decoding": DECODING,
            "recipe": asdict(published),
            "class_names": checkpoint.class_names,
            "class_counts": checkpoint.class_counts,
            "epoch": checkpoint.epoch,
            "temperature": temperature,
        },
    }


def model_card(checkpoint: Checkpoint, temperature: float | None, metrics: Mapping[str, Any] | None) -> str:
    """The Markdown of the model card. `metrics`: see `write_hub_folder`."""
    loader = jinja2.PackageLoader("equipoise.deploy", ".")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"thousands": "{:,}".format, "percent": percent}
    counts, encoder = checkpoint.class_counts, checkpoint.recipe.model.encoder
    return environment.get_template("card.md.jinja").render(
        checkpoint=checkpoint,
        parts={part: metrics[part] for part in ("validation", "test") if metrics and metrics[part]},
        figures=ALL_FIGURES,
        limits=GROUP_LIMITS,
        groups={group: [count for count in counts if shot_group(count) == group] for group in GROUPS},
        imbalance_factor=imbalance_factor(counts),
        temperature=temperature,
        decoding=DECODING,
        in_timm=timm_arguments(encoder, checkpoint.recipe.views.size) is not None,
    )
