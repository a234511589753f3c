"""A checkpoint, and perhaps other data, become what is to be scored: the part of the data, under the recipe's views."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.base.errors import UserError
from equipoise.config.recipe import Data, Field, field_value, find_field, load_recipe, override
from equipoise.data.images import ImageList, Parts
from equipoise.data.lists import BENCHMARKS
from equipoise.data.sources import LISTS, find_parts, named_lists, open_data, open_part, part_of, recognise
from equipoise.runs.checkpoint import Checkpoint, changed_part, load_checkpoint

Overrides = Sequence[tuple[Field, Any]]  # fields of a recipe, as text or values


class Target(NamedTuple):
    """The checkpoint and the images of the part that it is to be scored on. `note`: what is odd about them, if
    anything is."""

    checkpoint: Checkpoint
    part: str
    images: ImageList
    note: str = ""


def find_target(path: Path, data: str | None, part: str | None, overrides: Overrides) -> Target:
    """What `evaluate_checkpoint` scores; its arguments are explained there."""
    checkpoint = load_checkpoint(path)
    if data is None and not checkpoint.class_counts:
        raise UserError(f"{path} does not say what it was trained on; name the data with --data FOLDER")
    if data is None and any(field.key in LISTS.values() for field, _ in overrides):
        data = checkpoint.recipe.data.path  # the images are where they were, the list is another
    if data is not None:
        return _on_other_data(checkpoint, data, part, overrides, path)
    checkpoint = with_overrides(checkpoint, overrides, path)
    parts = unchanged_data(checkpoint, path).named()
    part = part or ("test" if "test" in parts else "validation")
    if part not in parts:
        raise UserError(f"the data of {path} has no {part} part; it has {', '.join(parts)}")
    return Target(checkpoint, part, parts[part])


def with_overrides(checkpoint: Checkpoint, overrides: Overrides, path: Path) -> Checkpoint:
    """The checkpoint with fields of its recipe changed. Raises UserError for one that decides the model."""
    recipe = checkpoint.recipe
    for field, value in overrides:
        changed = override(recipe, field, value)
        if changed != recipe and (field.path[0] == "model" or field.key == "method"):
            before, after = field_value(recipe, field), field_value(changed, field)
            raise UserError(
                f"{path} has {field.key} = {before}, not {after}; change it back or name another checkpoint"
            )
        recipe = changed
    return replace(checkpoint, recipe=recipe)


def unchanged_data(checkpoint: Checkpoint, path: Path) -> Parts:
    """The data that the checkpoint was trained and scored on. Raises UserError if it has changed since: labels would
    shift, and images trained on would be held out."""
    parts = open_data(checkpoint.recipe.data)
    changed = changed_part(parts, checkpoint)
    if changed:
        raise UserError(
            f"the {changed} part of {checkpoint.recipe.data.path} is not what {path} was trained with (images were "
            "added, removed or renamed); restore it, or score other data with --data"
        )
    return parts


def _on_other_data(checkpoint: Checkpoint, data: str, part: str | None, overrides: Overrides, path: Path) -> Target:
    benchmark = known if (known := recognise(data)) in BENCHMARKS else ""
    of_authors = not checkpoint.class_counts
    if of_authors and benchmark:  # its file has no mean and std: they are those of the data set
        checkpoint = replace(checkpoint, recipe=replace(checkpoint.recipe, views=load_recipe(benchmark).views))
    no_lists = [(find_field(key), "") for key in LISTS.values()]  # its own are of its data
    checkpoint = with_overrides(checkpoint, [*no_lists, *overrides, (find_field("data"), data)], path)
    source = checkpoint.recipe.data
    if not named_lists(source):
        source = replace(source, benchmark=benchmark)
    if of_authors:
        return _with_classes_of(checkpoint, source, part, path)
    part = part or "test"
    images = open_part(source, part, checkpoint.class_names)
    if part == "train" or named_lists(source) or source.benchmark or not _were_trained_on(images, checkpoint):
        return Target(checkpoint, part, images)
    note = f"{data} holds the images that {path} was trained on: these figures are too good"
    return Target(checkpoint, part, images, note)


def _were_trained_on(images: ImageList, checkpoint: Checkpoint) -> bool:
    """Whether the images are the training part of the checkpoint, or all of its data, moved and not divided into
    parts."""
    if len(images) < sum(checkpoint.class_counts):
        return False
    if images.fingerprint() == checkpoint.fingerprints.get("train"):
        return True
    try:
        parts = open_data(checkpoint.recipe.data)
    except UserError:  # it can be scored on, but not be trained on
        return False
    return len(images) == sum(map(len, parts.named().values())) and changed_part(parts, checkpoint) is None


def _with_classes_of(checkpoint: Checkpoint, source: Data, part: str | None, path: Path) -> Target:
    """A checkpoint of the authors' with the class names of the data, and its training counts where it has a training
    part. Raises UserError where the number of classes differs."""
    found = find_parts(source)
    part = part or ("test" if "test" in {**found.parts, **found.faults} or not found.divided else "validation")
    images = part_of(found, part, source.path)
    classes, known = len(checkpoint.class_names), len(images.class_names)
    if known > classes or (known < classes and found.named):
        raise UserError(f"{path} knows {classes:,} classes, but {source.path} has {known:,}: it is of other data")
    names = (*images.class_names, *checkpoint.class_names[known:])
    train = found.parts.get("train") if found.divided else None
    # Lists may name the first classes only: the others have no images here, and no shot group.
    counts = (*train.class_counts, *[0] * (classes - known)) if train is not None else ()
    return Target(replace(checkpoint, class_names=names, class_counts=counts), part, replace(images, class_names=names))
