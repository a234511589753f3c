"""A checkpoint becomes a hub-style folder of safetensors, and back: nothing in it is executed.

`config.json` is timm's (architecture, arguments, preprocessing) with what else a checkpoint says under 'equipoise';
`model.safetensors` holds the encoder under timm's own names, so that timm loads it strictly; `head.safetensors` the
classifier and the projections; `README.md` is the model card.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from equipoise.base.errors import UserError, in_words, reason, several
from equipoise.base.files import is_count, is_filled, is_positive, is_text, new_file_mode, read_json, regular_file
from equipoise.config.recipe import Data, Recipe, recipe_from_table, recipe_table
from equipoise.data.images import imbalance_factor
from equipoise.evaluation.metrics import shot_group
from equipoise.method.encoders import timm_arguments
from equipoise.runs.checkpoint import Checkpoint
from equipoise.views.views import short_side

CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"
_ENCODER = "encoder."
_LARGEST_CONFIG = 2**22  # bytes; that of 8,142 classes has 300,000
_CONFIG = {
    "equipoise": {
        "recipe": dict,
        "class_names": [is_text],
        "class_counts": [is_filled],
        "epoch": is_count,
        "step": is_count,
        "temperature": (None, is_positive),
    }
}
_SHOWN = 10  # classes of the model card
_FIGURES = {
    "top-1": "top1",
    "top-5": "top5",
    "mean over classes": "mean_per_class",
    "many (more than 100 training images)": "many",
    "medium (20 to 100)": "medium",
    "few (fewer than 20)": "few",
    "worst tenth of classes": "worst_tenth",
    "worst class": "worst_class",
    "macro F1": "macro_f1",
    "calibration error (before temperature scaling)": "ece",
}


def is_hub_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def write_hub_folder(
    folder: Path, checkpoint: Checkpoint, temperature: float | None, figures: Mapping[str, Any] | None
) -> None:
    """Write `checkpoint` to `folder`, which appears complete or not at all. `figures`: what `metrics.json` says of it,
    for the model card.

    Raises UserError where something is there already.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name another folder with --out")
    config = _config(checkpoint, temperature)
    weights = {name: value.clone() for name, value in checkpoint.weights.items()}  # no two may share memory
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        encoder = {name.removeprefix(_ENCODER): value for name, value in weights.items() if name.startswith(_ENCODER)}
        head = {name: value for name, value in weights.items() if not name.startswith(_ENCODER)}
        for file, tensors in ((WEIGHTS, encoder), (HEAD, head)):
            try:
                save_file(tensors, made / file, {"format": "pt"})
            except SafetensorError as error:
                raise UserError(f"{folder} could not be written ({error}); make room there, or name another") from None
            (made / file).chmod(new_file_mode())
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (made / CONFIG).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        (made / CARD).write_text(_card(checkpoint, temperature, figures), encoding="utf-8", errors="backslashreplace")
        read, _ = read_hub_folder(made)
        same = read.weights.keys() == weights.keys() and all(
            torch.equal(read.weights[name], weights[name]) for name in weights
        )
        if not same:
            raise RuntimeError(f"what was written to {folder} does not read back the same; it was removed")
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)


def read_hub_folder(folder: Path) -> tuple[Checkpoint, float | None]:
    """The checkpoint of a folder that `write_hub_folder` wrote, and its temperature. Raises UserError for another."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        table = read_json(folder / CONFIG, _LARGEST_CONFIG, _CONFIG, "export the model anew")["equipoise"]
        weights = {_ENCODER + name: value for name, value in load_file(regular_file(folder / WEIGHTS)).items()}
        weights |= load_file(regular_file(folder / HEAD))
        if table["class_counts"] and len(table["class_counts"]) != len(table["class_names"]):
            raise ValueError("class counts must be one a class")
        checkpoint = Checkpoint(
            recipe=recipe_from_table(table["recipe"], str(folder / CONFIG)),
            class_names=tuple(table["class_names"]),
            class_counts=tuple(table["class_counts"]),
            epoch=table["epoch"],
            step=table["step"],
            best=None,
            weights=weights,
            optimizer={},
            fingerprints={},
        )
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        why = in_words(error) if isinstance(error, OSError) and error.strerror else reason(error, library=True)
        raise UserError(
            f"{folder} is not a folder that equipoise export --to safetensors wrote, or is incomplete ({why}); export "
            "the model anew"
        ) from None
    return checkpoint, table["temperature"]


def _config(checkpoint: Checkpoint, temperature: float | None) -> dict[str, Any]:
    recipe = checkpoint.recipe
    size, photos = recipe.views.size, recipe.views.policy == "photos"
    name, arguments = timm_arguments(recipe.model.encoder, size) or (recipe.model.encoder, {})
    # Where the data and the starting weights lay is nobody's business, and of no use elsewhere.
    published = replace(recipe, data=Data(path=""), model=replace(recipe.model, weights=""))
    return {
        "architecture": name,
        "num_classes": 0,  # the classifier is not one of timm's: the encoder alone is
        "num_features": checkpoint.weights["classifier.weight"].shape[1],
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
            "num_classes": 0,
            "classifier": None,
        },
        "equipoise": {
            "recipe": recipe_table(published),
            "class_names": list(checkpoint.class_names),
            "class_counts": list(checkpoint.class_counts),
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "temperature": temperature,
        },
    }


# ---------------------------------------------------------------------------------------------- model card


def _card(checkpoint: Checkpoint, temperature: float | None, figures: Mapping[str, Any] | None) -> str:
    recipe, counts = checkpoint.recipe, checkpoint.class_counts
    trained = f" on {sum(counts):,} images" if counts else ""
    lines = [
        "---",
        "library_name: equipoise",
        "pipeline_tag: image-classification",
        "tags: [image-classification, long-tailed-recognition, equipoise]",
        "---",
        "",
        f"# {_plain(recipe.model.encoder)} for {len(checkpoint.class_names):,} classes with a long tail",
        "",
        f"Trained by Equipoise{trained} with the method `{recipe.method}` (recipe {_plain(recipe.name)}), "
        f"{several(checkpoint.epoch, 'epoch')}, at {recipe.views.size} pixels.",
        "",
        "## Accuracy",
        "",
        *_accuracy(figures),
        "",
        "## The tail",
        "",
        *_tail(checkpoint, figures),
        "",
        "## Use",
        "",
        "```python",
        "import equipoise",
        "",
        'classifier = equipoise.load("FOLDER")',
        'for file, classes in classifier.predict(["picture.jpg"]):',
        "    print(file, classes[0])  # (class name, probability)",
        "```",
        "",
        _meaning(temperature),
        *_timm_use(recipe),
    ]
    return "\n".join(lines) + "\n"


def _accuracy(figures: Mapping[str, Any] | None) -> list[str]:
    parts = [part for part in ("validation", "test") if figures and figures[part]]
    if not figures or not parts:
        return ["This checkpoint was exported without figures."]
    rows = [
        (label, [_percent(figures[part][key]) for part in parts])
        for label, key in _FIGURES.items()
        if any(figures[part][key] is not None for part in parts)
    ]
    images = (f"{part} ({figures[part]['images']:,} images)" for part in parts)
    return [
        _row(["percent", *images]),
        _row(["---", *["---:"] * len(parts)]),
        *(_row([label, *values]) for label, values in rows),
    ]


def _tail(checkpoint: Checkpoint, figures: Mapping[str, Any] | None) -> list[str]:
    names, counts = checkpoint.class_names, checkpoint.class_counts
    if not counts:
        return ["The training images of each class are not known."]
    in_group = {group: [count for count in counts if shot_group(count) == group] for group in ("many", "medium", "few")}
    lines = [
        f"The largest class has {max(counts):,} training images, the smallest {min(counts):,}: imbalance factor "
        f"{imbalance_factor(counts):.4g}. Each class with its count is in `{CONFIG}`.",
        "",
        _row(["", "classes", "training images"]),
        _row(["---", "---:", "---:"]),
        *(_row([group, f"{len(members):,}", f"{sum(members):,}"]) for group, members in in_group.items()),
        _row(["all", f"{len(counts):,}", f"{sum(counts):,}"]),
    ]
    part = next((part for part in ("test", "validation") if figures and figures[part]), None)
    if figures and part:
        scored = figures[part]["per_class"]
        worst = sorted((index for index in range(len(names)) if scored[index] is not None), key=lambda i: scored[i])
        lines += [
            "",
            f"Lowest accuracy on {part}, at most {_SHOWN} classes:",
            "",
            _row(["class", "training images", "accuracy, percent"]),
            _row(["---", "---:", "---:"]),
            *(_row([_plain(names[i]), f"{counts[i]:,}", _percent(scored[i])]) for i in worst[:_SHOWN]),
        ]
    return lines


def _meaning(temperature: float | None) -> str:
    calibrated = (
        f"calibrated with the temperature {temperature:.3g}, fitted on the validation part"
        if temperature
        else "not calibrated, since no validation part could fit a temperature"
    )
    return (
        "The probabilities are those for classes that are equally frequent where the model is used "
        f"(`prior=` changes that); they are {calibrated}."
    )


def _timm_use(recipe: Recipe) -> list[str]:
    if timm_arguments(recipe.model.encoder, recipe.views.size) is None:
        return []
    return [
        "",
        "The encoder alone, with a timm that knows `local-dir:` (tested with 1.0.31):",
        "",
        "```python",
        'encoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=encoder))",
        "```",
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


_MARKED = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "\\`*_[]|~#!$"}})


def _plain(name: str) -> str:
    """A name as text of a Markdown table: no mark-up, one line."""
    return " ".join(name.split()).translate(_MARKED)
