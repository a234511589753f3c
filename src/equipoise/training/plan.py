"""A recipe becomes a plan: its place is found, its data read, all that cannot be trained refused, nothing written."""

import os
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise import __version__
from equipoise.base.device import choose_device, choose_precision
from equipoise.base.errors import SharedError, UserError, own_command, several
from equipoise.base.files import real_path
from equipoise.base.world import ALONE, World
from equipoise.config.recipe import Recipe, field_value, recipe_fields
from equipoise.data.decode import bad_images, no_image_left
from equipoise.data.images import DIGITS, ImageList, Parts, imbalance_factor
from equipoise.data.lists import BENCHMARKS, find_list
from equipoise.data.sources import LISTS, named_lists, open_data
from equipoise.runs.checkpoint import changed_part
from equipoise.runs.folder import METRICS
from equipoise.training.place import (
    DATA_FILES,
    FREE_AMONG_RANKS,
    FREE_IN_RESUME,
    Finished,
    Fresh,
    Place,
    Resume,
    Start,
    WarmStart,
    differing,
    find_place,
)
from equipoise.training.step import is_recorded
from equipoise.views.loader import steps_per_epoch
from equipoise.views.views import view_settings


@dataclass(frozen=True)
class Plan:
    """What a training run is about to do. Nothing has been written yet."""

    recipe: Recipe
    parts: Parts
    device: torch.device
    precision: str
    steps_per_epoch: int
    place: Place
    world: World

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def start(self) -> Start | None:
        """The checkpoint that the run starts from, if any."""
        return self.place.start if isinstance(self.place, Resume | WarmStart) else None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """By part, what tells whether its images are the same."""
        return {name: part.fingerprint() for name, part in self.parts.named().items()}

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.recipe.epochs * self.steps_per_epoch

    def describe(self) -> dict[str, str]:
        """The plan for people: what, and its value."""
        recipe, parts = self.recipe, self.parts
        counts, names = parts.train.class_counts, parts.train.class_names
        most, fewest = max(counts), min(counts)
        others = [f", {len(part):,} for {name}" for name, part in parts.named().items() if name != "train"]
        ranks = f", {self.world.size} processes, BatchNorm {recipe.model.batch_norm}" if self.world.size > 1 else ""
        if self.device.type == "cuda" and torch.cuda.device_count() < self.world.local_size:
            ranks += ", which share GPUs (by gloo, slowly)"
        recorded = ", steps recorded as CUDA graphs" if is_recorded(recipe, self.device, self.world) else ""
        said = {
            "recipe": f"{recipe.name}, method {recipe.method}, seed {recipe.seed}",
            "data": f"{recipe.data.path} ({parts.kind})",
            "lists": "; ".join(parts.described),
            "note": "; ".join(parts.notes),
            "images": f"{len(parts.train):,} to train on{''.join(others)}",
            "classes": f"{len(counts):,}, from {most:,} images ({names[counts.index(most)]}) to {fewest:,} "
            f"({names[counts.index(fewest)]}): imbalance factor {imbalance_factor(counts):.4g}",
            "network": f"{recipe.model.encoder} at {recipe.views.size} pixels, {recipe.model.classifier} classifier",
            "device": f"{self.device}, {self.precision}{ranks}{recorded}",
            "steps": f"{several(recipe.epochs, 'epoch')} of {self.steps_per_epoch:,}: {several(self.steps, 'step')} "
            f"of {recipe.batch_size} images{self._micro_batches()}",
            "goes on": self._goes_on(),
            "run folder": str(self.folder),
        }
        return {name: value for name, value in said.items() if value}

    def resume_command(self) -> str:
        """What a user types to go on with the run in its folder."""
        world, program = self.world, own_command()
        if world.size > world.local_size:
            nodes = f"--nnodes {world.size // world.local_size} --nproc-per-node {world.local_size}"
            program = f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m equipoise"
        elif world.size > 1:
            program = f"torchrun --standalone --nproc-per-node {world.size} -m equipoise"
        return f"{program} train --resume {shlex.quote(str(self.folder))}"

    def _micro_batches(self) -> str:
        if not 0 < self.recipe.micro_batch < self.recipe.batch_size // self.world.size:
            return ""
        batch_norm = "" if self.recipe.model.batch_norm == "frozen" else ", which BatchNorm, if any, is over"
        return f", {self.recipe.micro_batch} at a time{batch_norm}"

    def _goes_on(self) -> str:
        """From where; empty for a new run."""
        place, epochs = self.place, self.recipe.epochs
        if isinstance(place, Finished):
            return "no further: it is finished"
        if isinstance(place, Fresh):
            where = place.folder if place.named else "runs"
            none = f"with none: a new run begins, since {where} holds no unfinished one of this recipe"
            return none if place.sought else ""
        if place.start is None:
            return "from its beginning: it had no checkpoint yet"
        done, remark = place.start.checkpoint, place.start.remark
        epoch, steps = divmod(done.step, self.steps_per_epoch)
        after = f"step {done.step}" if steps else f"epoch {epoch or done.epoch}"
        said = f"from {place.start.path}, after {after}{f' ({remark})' if remark else ''}"
        if isinstance(place, WarmStart):
            return said
        if done.recipe.epochs != epochs:
            said += f"; {several(epochs, 'epoch')} instead of {done.recipe.epochs}: so the learning rate changes"
        if place.processes not in (None, self.world.size) and self.recipe.model.batch_norm == "per-rank":
            said += f"; {self.world.size} processes instead of {place.processes}: so BatchNorm is over other batches"
        return said


def prepare(
    recipe: Recipe, out: str | Path | None = None, resume: str | Path | None = None, world: World = ALONE
) -> Plan:
    """Read the data and check that `recipe` can be trained on it, into the folder `out`.

    `resume` is a run folder, or a checkpoint, to go on from: one of a run, which goes on in its own folder unless `out`
    is another, or one of the BCL authors' code. 'auto' is the newest unfinished run of the same recipe, where there is
    one; a process that torchrun has started anew goes on with the run that it was.

    Raises UserError for what the user must put right; writes nothing. With several ranks, all call it and all raise.
    """
    recipe = _with_absolute_paths(recipe)
    place = world.first_makes(lambda: find_place(recipe, out, resume, world))
    plan = world.each_makes(lambda: _plan(recipe, place, world))
    _refuse_different_ranks(plan)
    for part in plan.parts.named().values():
        _refuse_bad_images(part, plan)
    return plan


def _plan(recipe: Recipe, place: Place, world: World) -> Plan:
    if recipe.data.path not in (DIGITS, "") and real_path(place.folder).is_relative_to(recipe.data.path):
        raise UserError(f"the run folder {place.folder} would lie inside the data; name one outside with --out")
    if 1 < world.local_size <= torch.cuda.device_count() and recipe.device.startswith("cuda:"):
        raise UserError(f"{world.local_size} processes on this host cannot all take {recipe.device}; set --device cuda")
    parts = open_data(recipe.data)
    refuse_batches(recipe, len(parts.train), world)
    device = choose_device(recipe.device, world.local_rank)
    precision = choose_precision(recipe.precision, device)
    plan = Plan(recipe, parts, device, precision, steps_per_epoch(len(parts.train), recipe.batch_size), place, world)
    if plan.start is not None:
        _refuse_other_run(plan, plan.start)
    return plan


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as it can be trained again from anywhere. A benchmark's lists that were found below the working
    directory become lists of the recipe."""

    def absolute(path: str) -> str:
        return path if path in (DIGITS, "") else str(real_path(Path(os.path.expanduser(path))))

    data = recipe.data
    files = {name: absolute(getattr(data, name)) for name in DATA_FILES}
    if data.benchmark and not named_lists(data):
        lists = BENCHMARKS[data.benchmark]
        found = {part: find_list(Path(files["path"]), known) for part, known in lists.items()}
        complete = all(found[part] or not known.blob for part, known in lists.items())
        if complete and any(file and not file.is_absolute() for file in found.values()):
            files |= {LISTS[part].removeprefix("data."): str(file.resolve()) for part, file in found.items() if file}
    model = replace(recipe.model, weights=absolute(recipe.model.weights))
    return replace(recipe, data=replace(data, **files), model=model)


# ---------------------------------------------------------------------------------------------- refusals


def refuse_batches(recipe: Recipe, images: int, world: World) -> None:
    """Raise UserError for batches, of an epoch over so many images, that the ranks cannot share or BatchNorm cannot
    normalise."""
    batch, part, ranks, batch_norm = recipe.batch_size, recipe.micro_batch, world.size, recipe.model.batch_norm
    last = images % batch
    if batch > images:
        fewer = max(2, images // 4)
        raise UserError(
            f"batch_size ({batch}) is larger than the training part ({images} images); set --batch-size {fewer} or so"
        )
    if batch % ranks or batch < 2 * ranks:
        below = max(batch // ranks, 2) * ranks
        raise UserError(
            f"batch_size ({batch}) is that of all {ranks} processes together, which need equal shares of two images or "
            f"more; set --batch-size {below} or {below + ranks}"
        )
    if ranks > 1 and batch_norm == "synchronised" and (part or 1 < last < 2 * ranks):
        why = "over micro-batches" if part else f"over the last batch of an epoch, {last} images for {ranks} processes"
        raise UserError(f"BatchNorm cannot be synchronised {why}; set model.batch_norm to per-rank or frozen")
    if not part or batch_norm == "frozen" or len(view_settings(recipe).kinds) > 1:  # it is over all views
        return
    for rows in (batch, last):
        share = world.share(rows)
        own = share.stop - share.start
        if own > part and own // -(-own // part) == 1:
            raise UserError(
                f"micro_batch ({part}) would leave BatchNorm a single image; set --micro-batch 3 or more, or "
                "model.batch_norm to frozen"
            )


def _refuse_other_run(plan: Plan, start: Start) -> None:
    """Raise UserError where the recipe or the data cannot go on from the checkpoint."""
    recipe, path, done, data = plan.recipe, start.path, start.checkpoint, plan.recipe.data.path
    resumes, of_authors = isinstance(plan.place, Resume), not done.class_counts
    if done.epoch >= recipe.epochs and not (resumes and not (plan.folder / METRICS).exists()):
        epochs = several(done.epoch, "epoch")
        raise UserError(f"{path} has trained {epochs} already, of {recipe.epochs}; set --epochs higher")
    classes = len(plan.parts.train.class_names)
    if len(done.class_names) != classes:
        raise UserError(f"{path} knows {len(done.class_names):,} classes, but {data} has {classes:,}")
    changed = None if of_authors else changed_part(plan.parts, done)
    if changed == "train" or (changed and resumes):
        raise UserError(
            f"the {changed} part of {data} is not what {path} was trained with (images were added, removed or "
            "renamed); restore it, name the data it was trained on, or start a new run"
        )
    for key, before, now in differing(done.recipe, recipe, FREE_IN_RESUME):
        in_model = key.startswith("model.") and key != "model.batch_norm"
        if in_model or (resumes and not of_authors):
            raise UserError(
                f"{path} was trained with {key} = {before}, not {now}: a run goes on under its own recipe; change it "
                "back, or start a new run"
            )


def _refuse_different_ranks(plan: Plan) -> None:
    """Raise SharedError where another rank has another recipe, other data, or another version."""
    fields = [field for field in recipe_fields() if field.key not in FREE_AMONG_RANKS]
    own: dict[str, Any] = {field.key: field_value(plan.recipe, field) for field in fields}
    own |= {f"the {name} images": fingerprint for name, fingerprint in plan.fingerprints.items()}
    own |= {"the precision": plan.precision, "the kind of device": plan.device.type}
    own |= {"the version of equipoise": __version__, "the version of torch": torch.__version__}
    first, *others = plan.world.gather_objects(own)
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            one, two = first.get(name), other.get(name)
            if one != two:
                raise SharedError(
                    f"rank {rank} has {name} = {two}, but rank 0 has {one}: start all ranks with the same recipe "
                    "and data"
                )


def _refuse_bad_images(images: ImageList, plan: Plan) -> None:
    """Raise UserError for the first image whose header is no image's. If such are skipped, for a class of the training
    part that has no other, and for another part that has none. Each rank looks at its share."""
    world, skip = plan.world, plan.recipe.data.on_bad_image == "skip"
    share = np.arange(world.rank, len(images), world.size)

    def look() -> list[int]:
        bad: list[int] = []
        for index, error in zip(share.tolist(), bad_images(images.take(share)), strict=False):
            if error is not None and not skip:
                raise error
            bad += [index] if error else []
        return bad

    bad = [index for of_rank in world.gather_objects(world.each_makes(look)) for index in of_rank]
    left_C = np.array(images.class_counts) - np.bincount(images.labels_N[bad], minlength=len(images.class_names))
    if images is plan.parts.train and left_C.min() == 0:
        raise SharedError(str(no_image_left(images, int(left_C.argmin()))))
    if not left_C.any():
        raise SharedError(f"{images.origin}: none of the {len(images):,} images can be read; repair them")
