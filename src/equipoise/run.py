"""A run folder: the names of its files, and what can be asked of it once it is there."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from equipoise.checkpoint import Checkpoint, atomic_file, load_checkpoint
from equipoise.device import choose_device
from equipoise.errors import UserError
from equipoise.evaluate import predict
from equipoise.lists import ImageList, Parts, open_part, open_parts
from equipoise.loader import open_batches, worker_count
from equipoise.metrics import accuracy
from equipoise.model import TwoBranchNetwork
from equipoise.recipe import Recipe, load_recipe
from equipoise.views import ViewSettings, view_kinds

RECIPE, RECORD, METRICS = "recipe.toml", "run.json", "metrics.json"
LAST, BEST = "last.pt", "best.pt"


@dataclass(frozen=True)
class Run:
    """A finished training run, in the folder `path`."""

    path: Path

    @cached_property
    def recipe(self) -> Recipe:
        """The complete recipe, as it was run."""
        return load_recipe(self.path / RECIPE)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        file = self.path / METRICS
        if not file.is_file():
            raise UserError(f"{self.path} has no {METRICS}: the run did not finish")
        return json.loads(file.read_text(encoding="utf-8"))

    @cached_property
    def model(self) -> TwoBranchNetwork:
        """The network of the last checkpoint, on the CPU: uint8 images `[N, 3, S, S]` to logits `[N, C]`."""
        return load_checkpoint(self.path / LAST).build()

    def evaluate(self, data: str | None = None, split: str = "test") -> dict[str, Any]:
        """The figures of the run's checkpoints, computed anew. See `evaluate_run` and `evaluate_checkpoint`."""
        if data is None and split == "test":
            return evaluate_run(self.path)
        return evaluate_checkpoint(self.path / LAST, data, split)


def view_settings(recipe: Recipe) -> ViewSettings:
    """The views that `recipe` trains and evaluates with."""
    return ViewSettings(
        policy=recipe.views.policy,
        kinds=view_kinds(recipe.views.cl_views, contrastive=recipe.method in ("bcl", "supcon+la")),
        size=recipe.views.size,
        blur=recipe.views.blur,
        mean=recipe.views.mean,
    )


def open_data(recipe: Recipe) -> Parts:
    """The data that `recipe` trains on. Raises UserError, see `lists.open_parts`."""
    data = recipe.data
    return open_parts(
        data.path,
        image_column=data.image_column,
        label_column=data.label_column,
        imbalance=data.imbalance,
        imbalance_factor=data.imbalance_factor,
        holdout=data.holdout,
    )


def evaluate_run(path: Path, parts: Parts | None = None, device: str = "auto") -> dict[str, Any]:
    """Score the last checkpoint, and the best one where one was chosen, on the run's own validation and test parts.

    Returns and writes the run's `metrics.json`. Raises UserError if the run has no checkpoint or its data is gone.
    """
    last = load_checkpoint(path / LAST)
    best = load_checkpoint(path / BEST) if (path / BEST).is_file() else None
    parts = parts or _unchanged_data(last, path)
    scored = {"validation": parts.validation, "test": parts.test}

    def block(checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "epoch": checkpoint.epoch,
            **{part: _score(checkpoint, images, device) if images else None for part, images in scored.items()},
        }

    of_last = block(last)
    result = {
        "method": last.recipe.method,
        "test": of_last["test"],
        "validation": of_last["validation"],
        "last": of_last,
        "best": block(best) if best else None,
        **_classes(last),
    }
    write_json(path / METRICS, result)
    return result


def evaluate_checkpoint(
    path: Path, data: str | None = None, split: str | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Score one checkpoint on the part `split` of `data` (None: what it was trained on). Without a `split` it is the
    test part, or the validation part where the data trained on has no test part.

    Returns a table like `metrics.json`, with that part alone. Raises UserError where there is no such part or its
    classes are not the checkpoint's.
    """
    checkpoint = load_checkpoint(path)
    if data is None:
        parts = _unchanged_data(checkpoint, path).named()
        split = split or ("test" if "test" in parts else "validation")
        if split not in parts:
            raise UserError(f"the data of {path} has no {split} part; it has {', '.join(parts)}")
        images = parts[split]
    else:
        split = split or "test"
        columns = checkpoint.recipe.data
        images = open_part(data, split, checkpoint.class_names, columns.image_column, columns.label_column)
    return {
        "method": checkpoint.recipe.method,
        "epoch": checkpoint.epoch,
        "split": split,
        split: _score(checkpoint, images, device),
        **_classes(checkpoint),
    }


def _unchanged_data(checkpoint: Checkpoint, path: Path) -> Parts:
    """What the checkpoint was trained and scored on. Raises UserError if it has changed since: labels would shift, and
    images trained on would be held out."""
    parts = open_data(checkpoint.recipe)
    for name, images in parts.named().items():
        if images.fingerprint() != checkpoint.fingerprints.get(name):
            raise UserError(
                f"the {name} part of {checkpoint.recipe.data.path} is not what {path} was trained with (images were "
                "added, removed or renamed); restore it, or score other data with --data"
            )
    return parts


def _classes(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"class_names": list(checkpoint.class_names), "train_counts": list(checkpoint.class_counts)}


def _score(checkpoint: Checkpoint, images: ImageList, device_name: str) -> dict[str, Any]:
    device = choose_device(device_name)
    recipe = checkpoint.recipe
    batches = open_batches(images, view_settings(recipe), device, worker_count(recipe.workers))
    predictions, labels = predict(checkpoint.build().to(device), batches)
    return accuracy(predictions, labels, checkpoint.class_counts).as_dict()


def write_json(path: Path, value: Any) -> None:
    """JSON, indented, complete or not there at all."""
    with atomic_file(path) as file:
        # A file name that is no UTF-8 is kept readable rather than refused.
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
