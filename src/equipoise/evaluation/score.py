"""A checkpoint and images become metrics.

The flow: the network predicts the validation part; its predictions fit the temperature and choose the strength of the
post-hoc prior; then the network predicts the test part, which never chooses anything.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from equipoise.base.device import choose_device
from equipoise.base.errors import UserError
from equipoise.base.progress import say
from equipoise.base.world import ALONE, World
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Data, Field, Recipe, field_value, find_field, override
from equipoise.data.folders import find_images, unlabelled
from equipoise.data.images import Found, ImageList, Parts
from equipoise.data.sources import LISTS, PARTS, as_recognised, find_parts, labelled_as, named_lists, open_data, part_of
from equipoise.evaluation.cost import training_cost
from equipoise.evaluation.features import known_classes_of, look_at_training, open_encoded_batches
from equipoise.evaluation.metrics import Predictions, fit_temperature, post_hoc_prior, score
from equipoise.evaluation.none_of_these import likenesses, read_known, tell_apart, write_known
from equipoise.evaluation.predictions import ClassCalibration, Look, Observation, Table, confidence_at, predict, to_npz
from equipoise.evaluation.shift import label_shift
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, described, figures_of, load_checkpoint, refuse_changed
from equipoise.runs.folder import BAD_IMAGES, BEST, LAST, METRICS, OBSERVED, RECIPE, chosen_checkpoint, write_json
from equipoise.runs.records import (
    BadImages,
    CheckpointMetrics,
    NoneOfThese,
    PartMetrics,
    RunMetrics,
    read_bad_images,
    read_metrics,
)
from equipoise.views.loader import Batches, open_batches, open_recipe_batches, worker_count
from equipoise.views.views import view_settings

Overrides = Sequence[tuple[Field, Any]]  # fields of a recipe, as text or values


def evaluate_run(
    path: Path, parts: Parts | None = None, device: str = "auto", world: World = ALONE, overrides: Overrides = ()
) -> RunMetrics:
    """Score the last checkpoint, and the best one where validation chose one, on the run's validation and test parts.
    Returns and writes the run's `metrics.json`, and beside it what the report draws of the checkpoint that is `chosen`.
    `overrides`: see `evaluate_checkpoint`. Raises UserError if a checkpoint cannot be read, or the run's data changed.
    """
    # Rank 0 reads the files: another host may not see them.
    names = [LAST, BEST] if (path / BEST).is_file() else [LAST]
    checkpoints = world.first_makes(
        lambda: [with_overrides(load_checkpoint(path / name), overrides, path) for name in names]
    )
    last = checkpoints[0]
    if last.best is not None and len(names) == 1 and world.is_first:
        say(f"{path / BEST}, which validation chose, is missing: the figures are of the last checkpoint")
    named = (parts or world.each_makes(lambda: unchanged_data(last, path))).named()
    if last.recipe.model.tune == "scratch":  # such an encoder tells no wrong label from a hard one
        del named["train"]
    where = choose_device(device, world.local_rank)
    networks = [checkpoint.build().to(where) for checkpoint in checkpoints]
    how = networks[0], where, world
    with ExitStack() as stack:
        batches = world.each_makes(
            lambda: {part: open_encoded_batches(last.recipe, images, *how) for part, images in named.items()}
        )
        for of_part in batches.values():
            stack.enter_context(closing(of_part))
            of_part.prepare()
        scored = [score_checkpoint(*pair, batches, world) for pair in zip(checkpoints, networks, strict=True)]
        of_chosen, observed = scored[-1]
        known = look_at_training(networks[-1], batches, observed, world)
        bad = record_bad_images(path, world, **batches)
    metrics: RunMetrics = {
        "method": last.recipe.method,
        "test": of_chosen["test"],
        "validation": of_chosen["validation"],
        "last": scored[0][0],
        "best": of_chosen if len(scored) > 1 else None,
        "cost": world.first_makes(lambda: training_cost(path, last)),
        "bad_images": bad,
        "class_names": list(last.class_names),
        "train_counts": list(last.class_counts),
    }
    if world.is_first:
        to_npz(path / OBSERVED, observed)
        if known:
            write_known(chosen_checkpoint(path), known, checkpoints[-1].step)
        write_json(path / METRICS, metrics)
    return metrics


def evaluate_checkpoint(
    path: Path,
    data: str | None = None,
    split: str | None = None,
    overrides: Overrides = (),
    keep_logits: bool = False,
    shifted: bool = False,
    strangers: str | None = None,
    world: World = ALONE,
) -> tuple[dict[str, Any], Predictions]:
    """Score one checkpoint on the part `split` of `data` (None: what it was trained on), or on the test part, or where
    there is none the validation part. Returns a table like `metrics.json`, with that part alone and, if `shifted`,
    `label_shift`; and the predictions. `strangers`: a folder of images of none of the classes, which `none_of_these` is
    about. `overrides` must not change the model; a list file among them stands for the data's own lists. Raises
    UserError where there is no such part or its classes are not the checkpoint's."""
    checkpoint, part, images, note = world.each_makes(lambda: find_target(path, data, split, overrides))
    strange = world.each_makes(lambda: _strange_images(strangers)) if strangers else None
    if strangers and not checkpoint.fingerprints:
        raise UserError(f"{path} does not say what it was trained on: drop --none-of-these")
    if shifted and 0 in (checkpoint.class_counts or (0,)):
        raise UserError(f"{path} does not say how many training images each class had: drop --label-shift")
    device = choose_device(checkpoint.recipe.device, world.local_rank)
    with closing(world.each_makes(lambda: open_recipe_batches(checkpoint.recipe, images, device, world))) as batches:
        network = checkpoint.build().to(device)
        metrics, predictions = _score(checkpoint, network, batches, world, keep_logits or shifted)
        bad = _bad_images(batches, world)
        none_of_these = strange and _none_of_these(path, checkpoint, strange, network, batches, world)
    table: dict[str, Any] = {
        "method": checkpoint.recipe.method,
        "checkpoint": described(path, checkpoint),
        "epoch": checkpoint.epoch,
        "split": part,
        "note": note,
        part: metrics,
        "bad_images": {part: bad} if bad else {},
        "class_names": list(checkpoint.class_names),
        "train_counts": list(checkpoint.class_counts),
    }
    if none_of_these:
        table["none_of_these"] = none_of_these
    if shifted and (logits_NC := predictions.logits_NC) is not None:
        figures, log_prior_C = figures_of(path, checkpoint), checkpoint.log_prior_of_logits().numpy()
        how = checkpoint.class_counts, log_prior_C, (figures and figures["temperature"]) or 1.0
        table["label_shift"] = label_shift(logits_NC, predictions.labels_N, *how)
    return table, predictions


def _strange_images(folder: str) -> tuple[list[str], int]:
    """The images in a folder, and how many other files there are. Raises UserError where there are no images."""
    files, errors = find_images([folder]) if Path(folder).is_dir() else ([], [])
    if not files:
        raise UserError(f"{folder} is no folder with images; name one whose pictures show none of the classes")
    return files, len(errors)


def _none_of_these(
    path: Path,
    checkpoint: Checkpoint,
    strange: tuple[list[str], int],
    network: TwoBranchNetwork,
    batches: Batches,
    world: World,
) -> NoneOfThese:
    """How well images of the scored part are told from strange ones."""
    files, others = strange
    device = next(network.parameters()).device
    known = world.first_makes(lambda: read_known(path, checkpoint.step))
    if known is None:
        parts = world.each_makes(lambda: unchanged_data(load_checkpoint(path), path))  # not the data to score
        known = known_classes_of(checkpoint.recipe, network, parts, world)
        if world.is_first:
            write_known(path, known, checkpoint.step)
    known.to(device)
    how = view_settings(checkpoint.recipe), device, worker_count(-1), world, True
    with closing(open_batches(unlabelled(files), *how)) as batches_of_strange:
        _, of_S = likenesses(known, network, batches_of_strange, world)
    passed_over = others + len(files) - len(of_S)
    return tell_apart(*likenesses(known, network, batches, world), of_S, known.threshold, passed_over)


def score_checkpoint(
    checkpoint: Checkpoint, network: TwoBranchNetwork, parts: Mapping[str, Batches], world: World = ALONE
) -> tuple[CheckpointMetrics, Table]:
    """The metrics of a checkpoint, whose network this is, on the parts that there are, and what the report draws, which
    rank 0 alone has."""
    scored: dict[str, PartMetrics] = {}
    observed: Table = {}
    temperature = None
    for part in [part for part in ("validation", "test") if part in parts]:
        observation, fits = Observation(network, checkpoint.class_counts, temperature), part == "validation"
        scored[part], predictions = _score(checkpoint, network, parts[part], world, fits, observation.add)
        table = observation.table(predictions, world)
        if (logits_NC := predictions.logits_NC) is not None:  # of validation, under its own shares of the classes
            labels_N = predictions.labels_N
            shares_C = np.bincount(labels_N, minlength=len(checkpoint.class_names)) / len(labels_N)
            with np.errstate(divide="ignore"):  # a class without validation images has the prior 0 there
                log_ratio_C = np.log(shares_C) - checkpoint.log_prior_of_logits().numpy()
            temperature = fit_temperature(logits_NC, labels_N, log_ratio_C)
            if temperature is not None:
                table["calibrated_N"] = confidence_at(torch.from_numpy(logits_NC), temperature).numpy()
        observed |= {f"{part}/{name}": values for name, values in table.items()}
    validation, test = scored.get("validation"), scored.get("test")
    metrics: CheckpointMetrics = {
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "validation": validation,
        "test": test,
        "post_hoc": post_hoc_prior(validation, test),
        "temperature": temperature,
    }
    return metrics, observed


def _score(
    checkpoint: Checkpoint, network: TwoBranchNetwork, batches: Batches, world: World, keep_logits: bool, *looks: Look
) -> tuple[PartMetrics, Predictions]:
    counts, classes = checkpoint.class_counts, len(checkpoint.class_names)
    prior_C = log_prior(torch.tensor(counts)).float() if counts and min(counts) > 0 else None
    calibration = ClassCalibration(classes)
    predictions = predict(network, batches, prior_C, keep_logits, [calibration.add, *looks], world)
    metrics = score(predictions, counts, classes)
    metrics["calibration"] = calibration.by_group(counts, world)
    return metrics, predictions


def record_bad_images(path: Path, world: World, **parts: Batches | None) -> BadImages:
    """Add the images of each part that any rank could not read so far to the run's `bad-images.json`, and return what
    it holds: a run that is interrupted and goes on knows all of them."""
    new = {part: _bad_images(batches, world) for part, batches in parts.items() if batches}

    def write() -> BadImages:
        known = read_bad_images(path / BAD_IMAGES) if (path / BAD_IMAGES).is_file() else {}
        together = {part: known.get(part, {}) | new.get(part, {}) for part in PARTS}
        found = {part: dict(sorted(names.items())) for part, names in together.items() if names}
        if found != known:
            write_json(path / BAD_IMAGES, found)
        return found

    return world.first_makes(write)


def _bad_images(batches: Batches, world: World) -> dict[str, str]:
    """The images that any rank could not read so far, and why, in the order of the list."""
    together = dict(found for of_rank in world.gather_objects(batches.bad) for found in of_rank.items())
    return {error.name: error.reason for _, error in sorted(together.items())}


def find_target(
    path: Path, data: str | None, part: str | None, overrides: Overrides
) -> tuple[Checkpoint, str, ImageList, str]:
    """What `evaluate_checkpoint` scores, whose arguments these are: the checkpoint, the part, its images, and what is
    odd about them."""
    checkpoint = load_checkpoint(path)
    of_authors = not checkpoint.class_counts
    if data is None and of_authors:
        raise UserError(f"{path} does not say what it was trained on; name the data with --data FOLDER")
    if data is None and any(field.key in LISTS.values() for field, _ in overrides):
        data = checkpoint.recipe.data.path  # the images are where they were, the list is another
    if data is None:
        checkpoint = with_overrides(checkpoint, overrides, path)
        parts = unchanged_data(checkpoint, path).named()
        part = part or ("test" if "test" in parts else "validation")
        if part not in parts:
            raise UserError(f"the data of {path} has no {part} part; it has {', '.join(parts)}")
        return checkpoint, part, parts[part], ""
    benchmark = as_recognised(Data(data)).benchmark
    if of_authors and benchmark:  # its file has no mean and std: they are those of the data set
        checkpoint = replace(checkpoint, recipe=replace(checkpoint.recipe, views=load_recipe(benchmark).views))
    no_lists = [(find_field(key), "") for key in LISTS.values()]  # its own are of its data
    checkpoint = with_overrides(checkpoint, [*no_lists, *overrides, (find_field("data"), data)], path)
    source = checkpoint.recipe.data
    found = find_parts(source if named_lists(source) else replace(source, benchmark=benchmark))
    no_test = "validation" in found.parts and "test" not in {**found.parts, **found.faults}
    part = part or ("validation" if no_test else "test")
    images = part_of(found, part, source.path)
    if of_authors:
        checkpoint = _with_classes_of(checkpoint, found, images, path)
    images = labelled_as(images, checkpoint.class_names, found.named)
    trained_on = part != "train" and images.fingerprint() == checkpoint.fingerprints.get("train")
    note = f"{data} holds the images that {path} was trained on: these figures are too good" if trained_on else ""
    return checkpoint, part, images, note


def with_overrides(checkpoint: Checkpoint, overrides: Overrides, path: Path) -> Checkpoint:
    """The checkpoint with fields of its recipe changed. Raises UserError for one that decides the model."""
    recipe = checkpoint.recipe
    for field, value in overrides:
        changed = override(recipe, field, value)
        if changed != recipe and (field.path[0] == "model" or field.key == "method"):
            raise UserError(f"{path} has {field.key} = {field_value(recipe, field)}; change it back, or name another")
        recipe = changed
    return replace(checkpoint, recipe=recipe)


def unchanged_data(checkpoint: Checkpoint, path: Path) -> Parts:
    """The data that the checkpoint was trained and scored on. Raises UserError if it has changed since."""
    parts = open_data(checkpoint.recipe.data)
    refuse_changed(checkpoint.recipe.data.path, parts, checkpoint, path)
    return parts


def _with_classes_of(checkpoint: Checkpoint, found: Found, images: ImageList, path: Path) -> Checkpoint:
    """A checkpoint of the authors' with the class names of the data, and its training counts where it has a training
    part. Raises UserError where the number of classes differs."""
    classes, known = len(checkpoint.class_names), len(images.class_names)
    if known > classes or (known < classes and found.named):
        raise UserError(f"{path} knows {classes:,} classes, but {images.origin} has {known:,}: it is of other data")
    names = (*images.class_names, *checkpoint.class_names[known:])
    train = found.parts.get("train") if found.divided else None
    # Lists may name the first classes only: the others have no images here.
    counts = (*train.class_counts, *[0] * (classes - known)) if train is not None else ()
    return replace(checkpoint, class_names=names, class_counts=counts)


@dataclass(frozen=True)
class Run:
    """A finished training run, in the folder `path`.

    >>> equipoise.Run(Path("runs/first")).recipe.epochs
    1
    """

    path: Path

    @cached_property
    def recipe(self) -> Recipe:
        """The complete recipe, as it was run."""
        return load_recipe(self.path / RECIPE)

    @cached_property
    def metrics(self) -> RunMetrics:
        """What `metrics.json` holds."""
        return read_metrics(self.path / METRICS)

    @cached_property
    def model(self) -> TwoBranchNetwork:
        """The network of the checkpoint that is `chosen`, on a CPU: uint8 images `[N, 3, S, S]` to logits `[N, C]`."""
        return load_checkpoint(chosen_checkpoint(self.path)).build()

    def evaluate(self) -> RunMetrics:
        """The metrics computed anew: see `evaluate_run`."""
        return evaluate_run(self.path)


def chosen(metrics: Mapping[str, Any]) -> tuple[Literal["last", "best"], Literal["validation", "test"]]:
    """Which metrics are a run's result (`RunMetrics`): those of the best checkpoint where validation chose one, else of
    the last, on the test part, or else on validation."""
    checkpoint = "best" if metrics["best"] else "last"
    return checkpoint, "test" if metrics[checkpoint]["test"] else "validation"
