"""A checkpoint and data become figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.base.device import choose_device
from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.base.world import ALONE, World
from equipoise.config.recipe import Field, Recipe, field_value, find_field, load_recipe, override
from equipoise.data.images import ImageList, Parts
from equipoise.data.lists import BENCHMARKS
from equipoise.data.sources import LISTS, PARTS, Source, find_parts, open_data, open_part, part_of, recognise, source_of
from equipoise.evaluation.metrics import choose_tau, fit_temperature, score, sweep
from equipoise.evaluation.observe import Observation, Table, confidence_at
from equipoise.evaluation.predictions import Predictions, predict
from equipoise.evaluation.records import read_bad_images
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, changed_part, load_checkpoint
from equipoise.runs.folder import BAD_IMAGES, BEST, LAST, METRICS, OBSERVED, write_json
from equipoise.views.loader import Batches, open_batches, worker_count
from equipoise.views.views import view_settings


def evaluate_run(
    path: Path,
    parts: Parts | None = None,
    device: str = "auto",
    world: World = ALONE,
    overrides: Sequence[tuple[Field, Any]] = (),
) -> dict[str, Any]:
    """Score the last checkpoint, and the best one where one was chosen, on the run's own validation and test parts.
    `overrides`: fields of the recipe, see `evaluate_checkpoint`.

    Returns and writes the run's `metrics.json`, and beside it what the report draws of the `chosen` checkpoint. A best
    checkpoint that cannot be read is left out, and `best_lost` says why. Raises UserError if the run has no checkpoint
    or its data is gone.
    """

    # Files are rank 0's: another host may not see them.
    def load(name: str) -> Checkpoint:
        return _overridden(load_checkpoint(path / name), overrides, path)

    def load_both() -> tuple[Checkpoint, Checkpoint | None, str | None]:
        last = load(LAST)
        if last.best is None and not (path / BEST).is_file():
            return last, None, None
        try:
            return last, load(BEST), None
        except UserError as error:
            return last, None, str(error)

    last, best, lost = world.first_makes(load_both)
    parts = parts or world.each_makes(lambda: _unchanged_data(last, path))
    scored = {"validation": parts.validation, "test": parts.test}
    observed: Table = {}
    read = world.each_makes(
        lambda: {part: _open(last.recipe, images, device, world) if images else None for part, images in scored.items()}
    )

    def block(checkpoint: Checkpoint) -> dict[str, Any]:
        network = checkpoint.build()
        figures: dict[str, dict[str, Any] | None] = dict.fromkeys(scored)
        temperature: float | None = None
        for part, batches in read.items():
            if not batches:
                continue
            chooses = part == "validation"
            observation = Observation(len(checkpoint.class_names), temperature)
            with observation.watch(network) as observe:
                figures[part], predictions = _score(checkpoint, network, batches, device, chooses, world, observe)
            observation.gather(world)
            calibrated = observation.calibrated()
            if chooses:
                temperature = _temperature(checkpoint, predictions)
                calibrated = _calibrated(predictions, temperature)
            if world.is_first:
                of_part = {
                    "labels_N": predictions.labels_N.astype(np.int32),
                    "predicted_N": predictions.ranked_NK[:, 0].astype(np.int32),
                    "confidence_N": predictions.confidence_N.astype(np.float32),
                    **calibrated,
                    **observation.geometry(network, checkpoint.class_counts),
                }
                observed.update({f"{part}/{name}": values for name, values in of_part.items()})
        return {
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            **figures,
            "post_hoc": _post_hoc(figures),
            "temperature": temperature,
        }

    # The best, where there is one, comes last and is what is drawn.
    of_last = block(last)
    of_best = block(best) if best else None
    bad = record_bad_images(path, world, **read)
    for batches in read.values():
        if batches:
            batches.close()
    result = {
        "method": last.recipe.method,
        "test": of_last["test"],
        "validation": of_last["validation"],
        "last": of_last,
        "best": of_best,
        "best_lost": lost,
        "bad_images": bad,
        **_classes(last),
    }
    if world.is_first:
        with atomic_file(path / OBSERVED) as file:
            np.savez_compressed(file, **observed)  # pyright: ignore[reportArgumentType] no key is its own argument
        write_json(path / METRICS, result)
    return result


def record_bad_images(path: Path, world: World, **parts: Batches | None) -> dict[str, dict[str, str]]:
    """Add the images of each part that a rank could not read so far to the run's list of them, and return that: by part
    and name, the reason. It is kept in a file, so that a run that is interrupted and goes on knows them all."""
    new = {part: _bad_images(batches, world) for part, batches in parts.items() if batches}

    def write() -> dict[str, dict[str, str]]:
        file = path / BAD_IMAGES
        known = read_bad_images(file) if file.is_file() else {}
        together = {part: {**known.get(part, {}), **new.get(part, {})} for part in PARTS}
        found = {part: dict(sorted(names.items())) for part, names in together.items() if names}
        if found != known:
            write_json(file, found)
        return found

    return world.first_makes(write)


def _bad_images(batches: Batches, world: World) -> dict[str, str]:
    """The images that any rank could not read so far, and why, in the order of the list."""
    together = dict(found for of_rank in world.gather_objects(batches.bad) for found in of_rank.items())
    return {error.name: error.reason for _, error in sorted(together.items())}


def evaluate_checkpoint(
    path: Path,
    data: str | None = None,
    split: str | None = None,
    overrides: Sequence[tuple[Field, Any]] = (),
    keep_logits: bool = False,
    world: World = ALONE,
) -> tuple[dict[str, Any], Predictions]:
    """Score one checkpoint on the part `split` of `data` (None: what it was trained on). Without a `split` it is the
    test part, or the validation part where there is no test part.

    Returns a table like `metrics.json`, with that part alone, and the predictions it is made of. `overrides` are
    fields of the recipe, as text or values: those that decide the model must be the checkpoint's; a list file among
    them stands for the data's own lists. Raises UserError
    where there is no such part or its classes are not the checkpoint's.
    """
    checkpoint, split, images = world.each_makes(lambda: _to_score(path, data, split, overrides))
    device = checkpoint.recipe.device
    batches = world.each_makes(lambda: _open(checkpoint.recipe, images, device, world))
    figures, predictions = _score(checkpoint, checkpoint.build(), batches, device, keep_logits, world)
    bad = _bad_images(batches, world)
    batches.close()
    scored = {
        "method": checkpoint.recipe.method,
        "epoch": checkpoint.epoch,
        "split": split,
        split: figures,
        "bad_images": {split: bad} if bad else {},
        **_classes(checkpoint),
    }
    return scored, predictions


def _to_score(
    path: Path, data: str | None, split: str | None, overrides: Sequence[tuple[Field, Any]]
) -> tuple[Checkpoint, str, ImageList]:
    """The checkpoint, the part of the data it is to be scored on, and its images: see `evaluate_checkpoint`."""
    checkpoint = load_checkpoint(path)
    if data is None and not checkpoint.class_counts:
        raise UserError(f"{path} does not say what it was trained on; name the data with --data FOLDER")
    if data is None and any(field.key in LISTS.values() for field, _ in overrides):
        data = checkpoint.recipe.data.path  # the images are where they were, the list is another
    if data is None:
        checkpoint = _overridden(checkpoint, overrides, path)
        parts = _unchanged_data(checkpoint, path).named()
        split = split or ("test" if "test" in parts else "validation")
        if split not in parts:
            raise UserError(f"the data of {path} has no {split} part; it has {', '.join(parts)}")
        images = parts[split]
    else:
        benchmark = recognise(data)
        if not checkpoint.class_counts:
            checkpoint = _with_views_of(checkpoint, benchmark)
        no_lists: list[tuple[Field, Any]] = [(find_field(key), "") for key in LISTS.values()]  # its own are of its data
        overrides = [*no_lists, *overrides]
        checkpoint = _overridden(checkpoint, overrides, path)
        source = replace(source_of(checkpoint.recipe), path=data)
        if not source.lists:
            source = replace(source, benchmark=benchmark if benchmark in BENCHMARKS else "")
        if checkpoint.class_counts:
            split = split or "test"
            images = open_part(source, split, checkpoint.class_names)
        else:
            checkpoint, split, images = _with_classes_of(checkpoint, source, split, path)
    return checkpoint, split, images


def _overridden(checkpoint: Checkpoint, overrides: Sequence[tuple[Field, Any]], path: Path) -> Checkpoint:
    """The checkpoint with fields of its recipe changed. Raises UserError for one that decides the model."""
    recipe = checkpoint.recipe
    for field, value in overrides:
        changed = override(recipe, field, value)
        before, after = field_value(recipe, field), field_value(changed, field)
        if field.path[0] == "model" and before != after and field.path[1] in ("encoder", "classifier", "feature_dim"):
            raise UserError(
                f"{path} has {field.key} = {before}, not {after}; change it back or name another checkpoint"
            )
        if field.path[0] != "model" and field.key != "method":
            recipe = changed
    return replace(checkpoint, recipe=recipe)


def _with_views_of(checkpoint: Checkpoint, benchmark: str) -> Checkpoint:
    """A checkpoint of the authors' with the mean and std of the data set it is to be scored on."""
    if benchmark not in BENCHMARKS:
        return checkpoint
    views = load_recipe(benchmark).views
    return replace(checkpoint, recipe=replace(checkpoint.recipe, views=views))


def _with_classes_of(
    checkpoint: Checkpoint, source: Source, split: str | None, path: Path
) -> tuple[Checkpoint, str, ImageList]:
    """A checkpoint of the authors' with the class names, and the training counts where there is a training part, of the
    data it is to be scored on; and that data. Raises UserError where the number of classes differs."""
    found = find_parts(source)
    split = split or ("test" if "test" in {**found.parts, **found.absent} or not found.divided else "validation")
    images = part_of(found, split, source.path)
    classes, known = len(checkpoint.class_names), len(images.class_names)
    if known > classes or (known < classes and not found.of_lists):
        raise UserError(
            f"{path} knows {classes:,} classes, but {source.path} has {known:,}: it was trained on other data"
        )
    names = (*images.class_names, *checkpoint.class_names[known:])
    train = found.parts.get("train") if found.divided else None
    # Lists of a part of the classes: the others have no images here, and no group.
    counts = (*train.class_counts, *[0] * (classes - known)) if train is not None else ()
    return replace(checkpoint, class_names=names, class_counts=counts), split, replace(images, class_names=names)


def _unchanged_data(checkpoint: Checkpoint, path: Path) -> Parts:
    """What the checkpoint was trained and scored on. Raises UserError if it has changed since: labels would shift, and
    images trained on would be held out."""
    parts = open_data(checkpoint.recipe)
    name = changed_part(parts, checkpoint)
    if name:
        raise UserError(
            f"the {name} part of {checkpoint.recipe.data.path} is not what {path} was trained with (images were "
            "added, removed or renamed); restore it, or score other data with --data"
        )
    return parts


def _classes(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"class_names": list(checkpoint.class_names), "train_counts": list(checkpoint.class_counts)}


def _open(recipe: Recipe, images: ImageList, device_name: str, world: World = ALONE) -> Batches:
    device, workers = choose_device(device_name, world.local_rank), worker_count(recipe.workers, world.local_size)
    skip = recipe.data.on_bad_image == "skip"
    return open_batches(images, view_settings(recipe), device, workers, world, skip)


def _score(
    checkpoint: Checkpoint,
    network: TwoBranchNetwork,
    batches: Batches,
    device_name: str,
    keep_logits: bool = False,
    world: World = ALONE,
    observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> tuple[dict[str, Any], Predictions]:
    device, counts = choose_device(device_name, world.local_rank), checkpoint.class_counts or None
    has_prior = counts is not None and min(counts) > 0
    prior_C = log_prior(torch.tensor(counts)).float() if has_prior else None
    predictions = predict(network.to(device), batches, prior_C, keep_logits, observe, world)
    figures = score(predictions, counts, len(checkpoint.class_names)).as_dict()
    return {**figures, "prior_sweep": sweep(predictions, counts) if counts and has_prior else None}, predictions


def _post_hoc(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """The post-hoc prior whose strength the validation part chose, and what it gives on each part. None without a
    validation part: the test part chooses nothing."""
    if not figures["validation"]:
        return None
    tau = choose_tau(figures["validation"]["prior_sweep"])
    at_tau = {
        part: next(row for row in scored["prior_sweep"] if row["tau"] == tau)
        for part, scored in figures.items()
        if scored
    }
    return {"tau": tau, "chosen_on": "validation", **at_tau}


def _temperature(checkpoint: Checkpoint, validation: Predictions) -> float | None:
    """The temperature that calibrates the checkpoint, see `fit_temperature`."""
    assert validation.logits_NC is not None
    shares_C = np.bincount(validation.labels_N, minlength=len(checkpoint.class_names)) / len(validation.labels_N)
    with np.errstate(divide="ignore"):  # a class that the validation part lacks has the prior 0 there
        log_ratio_C = np.log(shares_C) - checkpoint.log_prior_of_logits().numpy()
    return fit_temperature(validation.logits_NC, validation.labels_N, log_ratio_C)


def _calibrated(validation: Predictions, temperature: float | None) -> Table:
    """As `Observation.calibrated`, of the part that the temperature was fitted on."""
    if temperature is None or validation.logits_NC is None:
        return {}
    return {"calibrated_N": confidence_at(torch.from_numpy(validation.logits_NC), temperature).numpy()}


def write_logits(path: Path, predictions: Predictions, class_names: Sequence[str]) -> None:
    """`logits` `[N, C]`, `labels` `[N]` in the order of the list, and `class_names`, as NumPy's .npz."""
    assert predictions.logits_NC is not None
    with atomic_file(path) as file:
        np.savez_compressed(
            file, logits=predictions.logits_NC, labels=predictions.labels_N, class_names=np.array(class_names)
        )
