"""A checkpoint and images become metrics.

The flow: the network predicts the validation part; its predictions fit the temperature and choose the strength of the
post-hoc prior; then the network predicts the test part, which never chooses anything.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.base.device import choose_device
from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.base.world import ALONE, World
from equipoise.config.recipe import Field, Recipe
from equipoise.data.images import ImageList, Parts
from equipoise.data.sources import PARTS
from equipoise.evaluation.metrics import choose_tau, fit_temperature, score
from equipoise.evaluation.observe import Observation, Table, confidence_at
from equipoise.evaluation.predictions import Predictions, predict
from equipoise.evaluation.target import find_target, unchanged_data, with_overrides
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, load_checkpoint
from equipoise.runs.folder import BAD_IMAGES, BEST, LAST, METRICS, OBSERVED, write_json
from equipoise.runs.records import BadImages, CheckpointMetrics, PartMetrics, PostHocPrior, RunMetrics, read_bad_images
from equipoise.views.loader import Batches, open_batches, worker_count
from equipoise.views.views import view_settings

Observe = Callable[[Tensor, Tensor], None]


class ScoredCheckpoint(NamedTuple):
    """`observed`: what the report draws of it, by 'PART/NAME'; rank 0 alone has it."""

    metrics: CheckpointMetrics
    observed: Table


def evaluate_run(
    path: Path,
    parts: Parts | None = None,
    device: str = "auto",
    world: World = ALONE,
    overrides: Sequence[tuple[Field, Any]] = (),
) -> RunMetrics:
    """Score the last checkpoint, and the best one where validation chose one, on the run's validation and test parts.

    Returns and writes the run's `metrics.json`, and beside it what the report draws of the best checkpoint, or else of
    the last. A best checkpoint that cannot be read is left out, and `best_lost` says why. `overrides`: see
    `evaluate_checkpoint`. Raises UserError if the run has no checkpoint, or its data has changed.
    """
    # Rank 0 reads the files: another host may not see them.
    last, best, lost = world.first_makes(lambda: _load_last_and_best(path, overrides))
    parts = parts or world.each_makes(lambda: unchanged_data(last, path))
    validation, test = world.each_makes(
        lambda: [
            _open(last.recipe, images, device, world) if images else None for images in (parts.validation, parts.test)
        ]
    )
    with ExitStack() as stack:
        for batches in (validation, test):
            if batches is not None:
                stack.enter_context(closing(batches))
        of_last = score_checkpoint(last, validation, test, device, world)
        of_best = score_checkpoint(best, validation, test, device, world) if best else None
        bad = record_bad_images(path, world, validation=validation, test=test)
    metrics: RunMetrics = {
        "method": last.recipe.method,
        "test": of_last.metrics["test"],
        "validation": of_last.metrics["validation"],
        "last": of_last.metrics,
        "best": of_best.metrics if of_best else None,
        "best_lost": lost,
        "bad_images": bad,
        "class_names": list(last.class_names),
        "train_counts": list(last.class_counts),
    }
    if world.is_first:
        with atomic_file(path / OBSERVED) as file:
            observed = (of_best or of_last).observed
            np.savez_compressed(file, **observed)  # pyright: ignore[reportArgumentType] no key is its own argument
        write_json(path / METRICS, metrics)
    return metrics


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
    them stands for the data's own lists. Raises UserError where there is no such part or its classes are not the
    checkpoint's.
    """
    target = world.each_makes(lambda: find_target(path, data, split, overrides))
    checkpoint, device = target.checkpoint, target.checkpoint.recipe.device
    with closing(world.each_makes(lambda: _open(checkpoint.recipe, target.images, device, world))) as batches:
        network = checkpoint.build().to(choose_device(device, world.local_rank))
        metrics, predictions = _score_part(checkpoint, network, batches, world, keep_logits)
        bad = _bad_images(batches, world)
    table = {
        "method": checkpoint.recipe.method,
        "epoch": checkpoint.epoch,
        "split": target.part,
        target.part: metrics,
        "bad_images": {target.part: bad} if bad else {},
        "class_names": list(checkpoint.class_names),
        "train_counts": list(checkpoint.class_counts),
    }
    return table, predictions


# ---------------------------------------------------------------------------------------------- one checkpoint


def score_checkpoint(
    checkpoint: Checkpoint, validation: Batches | None, test: Batches | None, device: str = "auto", world: World = ALONE
) -> ScoredCheckpoint:
    """The metrics of a checkpoint on the parts there are."""
    network = checkpoint.build().to(choose_device(device, world.local_rank))
    on_validation = on_test = temperature = None
    observed: Table = {}

    def keep(part: str, predictions: Predictions, observation: Observation, calibrated: Table) -> None:
        observation.gather(world)
        if world.is_first:
            table = {**_as_table(predictions), **calibrated, **observation.geometry(network, checkpoint.class_counts)}
            observed.update({f"{part}/{name}": values for name, values in table.items()})

    if validation is not None:
        observation = Observation(len(checkpoint.class_names))
        with observation.watch(network) as observe:
            on_validation, predictions = _score_part(checkpoint, network, validation, world, True, observe)
        temperature = calibrating_temperature(checkpoint, predictions)
        keep("validation", predictions, observation, _calibrated(predictions, temperature))
    if test is not None:
        observation = Observation(len(checkpoint.class_names), temperature)
        with observation.watch(network) as observe:
            on_test, predictions = _score_part(checkpoint, network, test, world, observe=observe)
        keep("test", predictions, observation, observation.calibrated())
    metrics: CheckpointMetrics = {
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "validation": on_validation,
        "test": on_test,
        "post_hoc": _post_hoc_prior(on_validation, on_test),
        "temperature": temperature,
    }
    return ScoredCheckpoint(metrics, observed)


def _score_part(
    checkpoint: Checkpoint,
    network: TwoBranchNetwork,
    batches: Batches,
    world: World,
    keep_logits: bool = False,
    observe: Observe | None = None,
) -> tuple[PartMetrics, Predictions]:
    counts = checkpoint.class_counts or None
    prior_C = log_prior(torch.tensor(counts)).float() if counts and min(counts) > 0 else None
    predictions = predict(network, batches, prior_C, keep_logits, observe, world)
    return score(predictions, counts, len(checkpoint.class_names)), predictions


def calibrating_temperature(checkpoint: Checkpoint, validation: Predictions) -> float | None:
    """The temperature that calibrates the checkpoint, from predictions of its validation part with their logits. See
    `fit_temperature`."""
    assert validation.logits_NC is not None
    shares_C = np.bincount(validation.labels_N, minlength=len(checkpoint.class_names)) / len(validation.labels_N)
    with np.errstate(divide="ignore"):  # a class without validation images has the prior 0 there
        log_ratio_C = np.log(shares_C) - checkpoint.log_prior_of_logits().numpy()
    return fit_temperature(validation.logits_NC, validation.labels_N, log_ratio_C)


def _post_hoc_prior(validation: PartMetrics | None, test: PartMetrics | None) -> PostHocPrior | None:
    """The post-hoc prior whose strength the validation part chose, and what it gives on each part."""
    if validation is None or validation["prior_sweep"] is None:
        return None
    tau = choose_tau(validation["prior_sweep"])
    at_tau = next(row for row in validation["prior_sweep"] if row["tau"] == tau)
    post_hoc: PostHocPrior = {"tau": tau, "chosen_on": "validation", "validation": at_tau}
    if test is not None:
        post_hoc["test"] = next(row for row in test["prior_sweep"] or () if row["tau"] == tau)
    return post_hoc


def _as_table(predictions: Predictions) -> Table:
    return {
        "labels_N": predictions.labels_N.astype(np.int32),
        "predicted_N": predictions.ranked_NK[:, 0].astype(np.int32),
        "confidence_N": predictions.confidence_N.astype(np.float32),
    }


def _calibrated(predictions: Predictions, temperature: float | None) -> Table:
    """As `Observation.calibrated`, of the part that the temperature was fitted on."""
    if temperature is None or predictions.logits_NC is None:
        return {}
    return {"calibrated_N": confidence_at(torch.from_numpy(predictions.logits_NC), temperature).numpy()}


# ---------------------------------------------------------------------------------------------- files


def _load_last_and_best(
    path: Path, overrides: Sequence[tuple[Field, Any]]
) -> tuple[Checkpoint, Checkpoint | None, str | None]:
    """A run's checkpoints, and why the best one cannot be read."""
    last = with_overrides(load_checkpoint(path / LAST), overrides, path)
    if last.best is None and not (path / BEST).is_file():
        return last, None, None
    try:
        return last, with_overrides(load_checkpoint(path / BEST), overrides, path), None
    except UserError as error:
        return last, None, str(error)


def _open(recipe: Recipe, images: ImageList, device: str, world: World) -> Batches:
    workers, skip = worker_count(recipe.workers, world.local_size), recipe.data.on_bad_image == "skip"
    return open_batches(images, view_settings(recipe), choose_device(device, world.local_rank), workers, world, skip)


def record_bad_images(path: Path, world: World, **parts: Batches | None) -> BadImages:
    """Add the images of each part that any rank could not read so far to the run's `bad-images.json`, and return what
    it holds: a run that is interrupted and goes on knows all of them."""
    new = {part: _bad_images(batches, world) for part, batches in parts.items() if batches}

    def write() -> BadImages:
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


def write_logits(path: Path, predictions: Predictions, class_names: Sequence[str]) -> None:
    """`logits` `[N, C]`, `labels` `[N]` in the order of the list, and `class_names`, as NumPy's .npz."""
    assert predictions.logits_NC is not None
    arrays = {"logits": predictions.logits_NC, "labels": predictions.labels_N, "class_names": np.array(class_names)}
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType] no key is its own argument
