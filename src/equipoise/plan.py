"""A recipe becomes a plan: its data read, everything refused that cannot be trained, nothing written yet."""

import itertools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from equipoise.checkpoint import Checkpoint, load_checkpoint
from equipoise.device import choose_device, choose_precision
from equipoise.errors import UserError
from equipoise.lists import DIGITS, ImageList, Parts, imbalance_factor
from equipoise.loader import steps_per_epoch
from equipoise.pixels import bad_images, no_image_left
from equipoise.recipe import Recipe, field_value, recipe_fields
from equipoise.run import BEST, LAST, RECORD, find_checkpoint, open_data

# Recipe fields that may differ where a run goes on: they change no number but the run's length.
_FREE_IN_RESUME = {
    "name",
    "summary",
    "epochs",
    "device",
    "precision",
    "workers",
    "log_every",
    "pretrained",
    "weights",
    "on_bad_image",
    "allow_outside",
}


@dataclass(frozen=True)
class Resumed:
    """The checkpoint from which a run goes on. `in_place`: in the run folder that it lies in."""

    path: Path
    checkpoint: Checkpoint
    in_place: bool


@dataclass(frozen=True)
class Plan:
    """What a training run is about to do. Nothing has been written yet."""

    recipe: Recipe
    parts: Parts
    device: torch.device
    precision: str
    steps_per_epoch: int
    folder: Path
    folder_named: bool  # by the user; else another name will do if it is taken meanwhile
    resumed: Resumed | None

    def describe(self) -> dict[str, str]:
        """The plan for people: what, and its value."""
        train = self.parts.train
        counts, names = train.class_counts, train.class_names
        largest, smallest = counts.index(max(counts)), counts.index(min(counts))
        held = {name: len(part) for name, part in self.parts.named().items() if name != "train"}
        return {
            "recipe": f"{self.recipe.name}, method {self.recipe.method}, seed {self.recipe.seed}",
            "data": f"{self.recipe.data.path} ({self.parts.kind})",
            "images": f"{len(train):,} to train on"
            + "".join(f", {count:,} for {name}" for name, count in held.items()),
            "classes": f"{len(counts):,}, from {counts[largest]:,} images ({names[largest]}) "
            f"to {counts[smallest]:,} ({names[smallest]}): imbalance factor {imbalance_factor(counts):.4g}",
            "network": f"{self.recipe.model.encoder} at {self.recipe.views.size} pixels, "
            f"{self.recipe.model.classifier} classifier",
            "device": f"{self.device}, {self.precision}",
            "steps": f"{self.recipe.epochs} epochs of {self.steps_per_epoch:,}: "
            f"{self.recipe.epochs * self.steps_per_epoch:,} steps of {self.recipe.batch_size} images",
            **({"goes on from": self._resumed_from()} if self.resumed else {}),
            "run folder": str(self.folder),
        }

    def _resumed_from(self) -> str:
        assert self.resumed is not None
        return f"{self.resumed.path}, after epoch {self.resumed.checkpoint.epoch}"


def prepare(recipe: Recipe, out: str | Path | None = None, resume: str | Path | None = None) -> Plan:
    """Read the data and check that `recipe` can be trained on it, into the folder `out`.

    `resume` is a checkpoint to go on from, after the epoch it was written at: one of a run, which goes on in its own
    folder unless `out` is another, or one of the BCL authors' code.

    Raises UserError for what the user must put right; writes nothing.
    """
    resumed = _open_resumed(Path(os.path.expanduser(resume)), out) if resume else None
    in_place = resumed is not None and resumed.in_place
    folder = Path(os.path.expanduser(out)) if out else default_folder(recipe)
    if resumed is not None and in_place:
        folder = resumed.path.parent
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not empty; go on with it by --resume {folder}, or name another folder with --out"
        )
    if recipe.data.path not in (DIGITS, "") and folder.resolve().is_relative_to(Path(recipe.data.path).resolve()):
        raise UserError(f"the run folder {folder} would lie inside the data; name one outside with --out")
    # Absolute, so that the recipe.toml of the run can be trained again from anywhere.
    files = {
        name: str(Path(os.path.expanduser(value)).resolve())
        for name in ("path", "train_list", "val_list", "test_list")
        if (value := getattr(recipe.data, name)) not in (DIGITS, "")
    }
    recipe = replace(recipe, data=replace(recipe.data, **files))
    parts = open_data(recipe)
    if recipe.batch_size > len(parts.train):
        raise UserError(
            f"batch_size ({recipe.batch_size}) is larger than the training part ({len(parts.train)} images); "
            f"set --batch-size {max(2, len(parts.train) // 4)} or so"
        )
    for part in parts.named().values():
        _refuse_bad_images(part, recipe.data.on_bad_image == "skip", of_training=part is parts.train)
    if resumed is not None:
        _refuse_unfitting(resumed, recipe, parts)
    device = choose_device(recipe.device)
    return Plan(
        recipe,
        parts,
        device,
        choose_precision(recipe.precision, device),
        steps_per_epoch(len(parts.train), recipe.batch_size),
        folder,
        bool(out),
        resumed,
    )


def _refuse_bad_images(images: ImageList, skip: bool, of_training: bool) -> None:
    """Raise UserError for the first image whose header is no image's. With `skip`, for a class that has no other."""
    bad: list[int] = []
    for index, error in enumerate(bad_images(images)):
        if error is not None and not skip:
            raise error
        bad += [index] if error else []
    left_C = np.array(images.class_counts) - np.bincount(images.labels_N[bad], minlength=len(images.class_names))
    if of_training and left_C.min() == 0:
        raise no_image_left(images, int(left_C.argmin()))
    if not left_C.any():
        raise UserError(f"{images.origin}: none of the {len(images):,} images can be read; repair them")


def _open_resumed(path: Path, out: str | Path | None) -> Resumed:
    path = find_checkpoint(path / LAST if path.is_dir() else path)
    in_run = (path.parent / RECORD).is_file() and path.name in (LAST, BEST)
    same = out is None or Path(os.path.expanduser(out)).resolve() == path.parent.resolve()
    return Resumed(path, load_checkpoint(path), in_run and same)


def _refuse_unfitting(resumed: Resumed, recipe: Recipe, parts: Parts) -> None:
    """Raise UserError where the recipe or the data cannot go on from the checkpoint."""
    path, checkpoint = resumed.path, resumed.checkpoint
    if checkpoint.epoch >= recipe.epochs:
        raise UserError(
            f"{path} has trained {checkpoint.epoch} epochs already, of {recipe.epochs}; set --epochs higher"
        )
    if len(checkpoint.class_names) != len(parts.train.class_names):
        raise UserError(
            f"{path} knows {len(checkpoint.class_names):,} classes, but {recipe.data.path} has "
            f"{len(parts.train.class_names):,}"
        )
    if checkpoint.class_counts and checkpoint.fingerprints.get("train") != parts.train.fingerprint():
        raise UserError(f"the training images are not those of {path}; name the data it was trained on")
    of_authors = not checkpoint.class_counts  # of whose recipe only the model is known
    for field in recipe_fields():
        before, now = field_value(checkpoint.recipe, field), field_value(recipe, field)
        in_model = field.path[0] == "model" and field.path[1] not in ("pretrained", "weights")
        free = bool(_FREE_IN_RESUME.intersection(field.path)) or of_authors or not resumed.in_place
        if before != now and (in_model or not free):
            raise UserError(
                f"{path} was trained with {field.key} = {before}, not {now}: a run goes on under its own recipe; "
                "change it back, or start a new run"
            )


def default_folder(recipe: Recipe) -> Path:
    method = recipe.method.replace("+", "-")
    stem = f"{recipe.name}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    # A sweep may start several runs in one second.
    return next(path for n in itertools.count(1) if not (path := Path("runs") / (stem + f"-{n}" * (n > 1))).exists())
