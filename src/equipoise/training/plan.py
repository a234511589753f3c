"""A recipe becomes a plan: its place is found, its data read, what cannot be trained refused, and nothing written."""

import contextlib
import itertools
import os
import shlex
import time
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
from equipoise.config.recipe import Recipe, Views, field_value, find_field, load_recipe, override, recipe_fields
from equipoise.data.decode import bad_images
from equipoise.data.images import DIGITS, Parts, imbalance_factor
from equipoise.data.rows import TABLES
from equipoise.data.sources import open_data
from equipoise.method.clip import PREFIX
from equipoise.method.pretrained import find_pretrained, input_of
from equipoise.runs.checkpoint import Checkpoint, changed_part, load_checkpoint
from equipoise.runs.folder import LAST, METRICS, PREVIOUS, RECIPE, RECORD, find_checkpoint, is_used
from equipoise.runs.records import read_record
from equipoise.views.loader import steps_per_epoch
from equipoise.views.views import view_settings

AUTO = "auto"  # --resume auto: find out which run

# Fields in which a recipe may change while a run goes on: they say where and how it is computed, not what.
HOW = ("precision", "compile", "cuda_graph", "deterministic", "data.on_bad_image", "data.allow_outside")
FREE = frozenset({*HOW, "name", "summary", "device", "workers", "log_every", "checkpoint_minutes"})
# Files may be moved, and lie elsewhere on each host: fingerprints tell whether they are the same.
FILES = frozenset({"model.weights", "data.path", "data.train_list", "data.val_list", "data.test_list"})


def differing(one: Recipe, other: Recipe, free: frozenset[str]) -> list[tuple[str, Any, Any]]:
    """The fields, without the `free` ones, in which two recipes differ, each with both values."""
    fields = [field for field in recipe_fields() if field.key not in free]
    values = [(field.key, field_value(one, field), field_value(other, field)) for field in fields]
    return [(key, before, now) for key, before, now in values if before != now]


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from."""

    path: Path
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Place:
    """Where a run is written. `start`: a checkpoint to start from, its own, another run's or of the BCL authors' code.
    `resumes`: the run is there and goes on, or begins again where it has no checkpoint. `named`: no other folder will
    do."""

    folder: Path
    start: Start | None
    resumes: bool
    named: bool = True


def find_place(recipe: Recipe, out: str | Path | None, resume: str | Path | None, world: World) -> Place:
    """Where to write a run of `recipe`: see `prepare`. Raises UserError where a folder or checkpoint will not do."""
    folder = Path(os.path.expanduser(out)) if out else None
    source = Path(os.path.expanduser(resume)) if resume else None
    if resume == AUTO:
        source = _newest_run(recipe, folder)
    elif not resume and (world.restarted or world.launch not in ("", "none")):  # 'none' is torchrun's default name
        source = _newest_run(recipe, folder, world)
    start = None
    if source:
        run = source if source.is_dir() else source.parent
        own = (run / RECORD).is_file() and (source.is_dir() or source.name in (LAST, PREVIOUS))
        start = _start_from(find_checkpoint(source))
        if own and (folder is None or real_path(folder) == real_path(run)):
            return Place(run, start, resumes=True)
        if start is None:
            raise UserError(f"{run} has no checkpoint to go on from")
    if folder is not None and (folder.is_file() or (folder.is_dir() and is_used(folder))):
        raise UserError(f"{folder} is a file, or not empty; go on by --resume {folder}, or name another with --out")
    return Place(folder or default_folder(recipe), start, resumes=False, named=folder is not None)


def default_folder(recipe: Recipe) -> Path:
    """A folder in `runs` that does not exist yet."""
    stem = f"{recipe.name}-{recipe.method.replace('+', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    # A sweep may start several runs in one second.
    return next(path for n in itertools.count(1) if not (path := Path("runs") / (stem + f"-{n}" * (n > 1))).exists())


def _newest_run(recipe: Recipe, folder: Path | None, world: World | None = None) -> Path | None:
    """The newest unfinished run of this recipe, in `folder` or else in `runs`; with `world`, of this torchrun launch.
    After a restart a finished one too, which is then scored again: there may be a run after it."""
    found: list[tuple[str, Path]] = []
    for run in [folder] if folder else [record.parent for record in Path("runs").glob(f"*/{RECORD}")]:
        try:
            record, before = read_record(run / RECORD), load_recipe(run / RECIPE)
        except UserError:  # no run, or one that was killed while it made its folder
            continue
        open_to_go_on = (world is not None and world.restarted) or not (run / METRICS).exists()
        of_launch = world is None or record.get("launch") == world.launch
        if open_to_go_on and of_launch and not differing(before, recipe, FREE):
            found.append((record["started"], run))
    return max(found)[1] if found else None


def _start_from(source: Path) -> Start | None:
    """The checkpoint `source`; of a run folder the last one, or if the disk has spoiled that the one before it, None
    where there is none."""
    if not source.is_dir():
        return Start(source, load_checkpoint(source))
    there = [source / name for name in (LAST, PREVIOUS) if (source / name).exists()]
    for path in there[:-1]:
        with contextlib.suppress(UserError):
            return Start(path, load_checkpoint(path))
    return Start(there[-1], load_checkpoint(there[-1])) if there else None


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
        return self.place.start

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.recipe.epochs * self.steps_per_epoch

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """By part, what tells whether its images are the same."""
        return {name: part.fingerprint() for name, part in self.parts.named().items()}

    def describe(self) -> dict[str, str]:
        """The plan for people: what, and its value."""
        recipe, parts, world = self.recipe, self.parts, self.world
        counts, names = parts.train.class_counts, parts.train.class_names
        largest, smallest = (names[counts.index(count)] for count in (max(counts), min(counts)))
        others = [f", {len(part):,} for {name}" for name, part in parts.named().items() if name != "train"]
        ranks = f", {world.size} processes, BatchNorm {recipe.model.batch_norm}" if world.size > 1 else ""
        at_a_time = f", {recipe.micro_batch} at a time" if recipe.micro_batch else ""
        said = {
            "recipe": f"{recipe.name}, method {recipe.method}, seed {recipe.seed}",
            "data": f"{recipe.data.path} ({parts.kind})",
            "lists": "; ".join(parts.described),
            "note": "; ".join(parts.notes),
            "images": f"{len(parts.train):,} to train on{''.join(others)}",
            "classes": f"{len(counts):,}, of {max(counts):,} ({largest}) to {min(counts):,} ({smallest}) images: "
            f"imbalance factor {imbalance_factor(counts):.4g}",
            "weights": self._weights(),
            "network": f"{recipe.model.encoder} at {recipe.views.size} pixels, {recipe.model.classifier} classifier",
            "device": f"{self.device}, {self.precision}{ranks}",
            "steps": f"{several(recipe.epochs, 'epoch')} of {self.steps_per_epoch:,}: {several(self.steps, 'step')} "
            f"of {recipe.batch_size} images{at_a_time}",
            "goes on": self._goes_on(),
            "run folder": str(self.folder),
        }
        return {name: value for name, value in said.items() if value}

    def _weights(self) -> str:
        """Where the encoder's first weights are from; empty for random ones."""
        model = self.recipe.model
        if self.start is not None or (model.tune == "scratch" and not model.weights):
            return ""
        return model.weights or find_pretrained(model.encoder).said

    def _goes_on(self) -> str:
        """From where; empty for a new run."""
        if self.start is None:
            return "from its beginning: it had no checkpoint yet" if self.place.resumes else ""
        done, epochs = self.start.checkpoint, self.recipe.epochs
        said = f"from {self.start.path}, after epoch {done.epoch}, step {done.step}"
        if self.place.resumes and done.recipe.epochs != epochs:
            said += f"; {several(epochs, 'epoch')} instead of {done.recipe.epochs}: so the learning rate changes"
        return said

    def resume_command(self) -> str:
        """What a user types to go on with the run in its folder."""
        world, program = self.world, own_command()
        if world.size > 1:
            hosts = world.size // world.local_size
            where = "--standalone" if hosts == 1 else f"--nnodes {hosts} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
            program = f"torchrun {where} --nproc-per-node {world.local_size} -m equipoise"
        return f"{program} train --resume {shlex.quote(str(self.folder))}"


def prepare(
    recipe: Recipe, out: str | Path | None = None, resume: str | Path | None = None, world: World = ALONE
) -> Plan:
    """Read the data and check that `recipe` can be trained on it, into the folder `out`.

    `resume` is a run folder, or a checkpoint, to go on from: one of a run, which goes on in its own folder unless `out`
    is another, or one of the BCL authors' code. 'auto' is the newest unfinished run of the same recipe, where there is
    one; a process that torchrun has started anew goes on with the run that it was.

    Raises UserError for what the user must put right; writes nothing. With several ranks, all call it and all raise.
    """
    recipe = _viewed_as_pretrained(_with_absolute_paths(recipe))
    place = world.first_makes(lambda: find_place(recipe, out, resume, world))
    plan = world.each_makes(lambda: _plan(recipe, place, world))
    _refuse_different_ranks(plan)
    world.each_makes(lambda: _refuse_bad_images(plan))
    return plan


def _plan(recipe: Recipe, place: Place, world: World) -> Plan:
    data = Path(recipe.data.path)
    data = data.parent if data.suffix.lower() in TABLES else data
    if recipe.data.path not in (DIGITS, "") and real_path(place.folder).is_relative_to(data):
        raise UserError(f"the run folder {place.folder} would lie inside the data; name one outside with --out")
    if 1 < world.local_size <= torch.cuda.device_count() and recipe.device.startswith("cuda:"):
        raise UserError(f"{world.local_size} processes on this host cannot all take {recipe.device}; set --device cuda")
    parts = open_data(recipe.data)
    refuse_batches(recipe, len(parts.train), world)
    device = choose_device(recipe.device, world.local_rank)
    precision = choose_precision(recipe.precision, device)
    plan = Plan(recipe, parts, device, precision, steps_per_epoch(len(parts.train), recipe.batch_size), place, world)
    if recipe.model.classifier_start == "text" and not recipe.model.encoder.startswith(PREFIX):
        raise UserError(f"{recipe.model.encoder} has no text tower to start a classifier: take --arch {PREFIX}...")
    if plan.start is not None:
        _refuse_other_run(plan, plan.start)
    return plan


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, as it can be trained again from elsewhere."""
    for field in map(find_field, FILES):
        path = field_value(recipe, field)
        if path not in (DIGITS, ""):
            recipe = override(recipe, field, str(real_path(Path(os.path.expanduser(path)))))
    return recipe


def _viewed_as_pretrained(recipe: Recipe) -> Recipe:
    """The recipe with the mean, std and size of the encoder's pretrained weights, unless it has some of its own."""
    views = recipe.views
    known = input_of(recipe.model.encoder) if recipe.model.tune != "scratch" else None
    known = known or {"mean": views.mean, "std": views.std, "size": Views().size}
    if (views.mean, views.std) != (Views().mean, Views().std):
        known |= {"mean": views.mean, "std": views.std}
    return replace(recipe, views=replace(views, **(known | ({"size": views.size} if views.size else {}))))


def refuse_batches(recipe: Recipe, images: int, world: World) -> None:
    """Raise UserError for batches, of an epoch over so many images, that the ranks cannot share or BatchNorm cannot
    normalise."""
    batch, part, ranks, batch_norm = recipe.batch_size, recipe.micro_batch, world.size, recipe.model.batch_norm
    if batch > images:
        raise UserError(f"batch_size ({batch}) is larger than the training part ({images} images); set a smaller one")
    if batch % ranks or batch < 2 * ranks:
        raise UserError(
            f"batch_size ({batch}) is that of all {ranks} processes together, which need equal shares of two images or "
            f"more; set --batch-size to a multiple of {ranks}, {2 * ranks} or more"
        )
    last = images % batch
    if ranks > 1 and batch_norm == "synchronised" and (part or 1 < last < 2 * ranks):
        raise UserError(
            f"BatchNorm can be synchronised neither over micro-batches nor, by {ranks} processes, over a last batch of "
            f"{last} images; set model.batch_norm to per-rank or frozen"
        )
    if part in (1, 2) and batch_norm != "frozen" and len(view_settings(recipe).kinds) == 1:
        raise UserError(
            f"micro_batch ({part}) may leave BatchNorm a single image; set --micro-batch 3 or more, or "
            "model.batch_norm to frozen"
        )


def _refuse_other_run(plan: Plan, start: Start) -> None:
    """Raise UserError where the recipe or the data cannot go on from the checkpoint."""
    recipe, path, done, resumes = plan.recipe, start.path, start.checkpoint, plan.place.resumes
    scored = (plan.folder / METRICS).exists() and not plan.world.restarted
    if done.epoch >= recipe.epochs and (scored or not resumes):
        epochs = several(done.epoch, "epoch")
        raise UserError(f"{path} has trained {epochs} already, of {recipe.epochs}; set --epochs higher")
    if not done.class_counts:  # of the BCL authors' code, which does not keep what it was trained on
        return
    changed = changed_part(plan.parts, done)
    if changed == "train" or (changed and resumes):
        raise UserError(
            f"the {changed} part of {recipe.data.path} is not what {path} was trained with (images were added, removed "
            "or renamed); restore it, name the data it was trained on, or start a new run"
        )
    changes = differing(done.recipe, recipe, FREE | FILES | {"epochs"}) if resumes else []
    for key, before, now in changes:
        raise UserError(
            f"{path} was trained with {key} = {before}, not {now}: a run goes on under its own recipe; change it back, "
            "or start a new run"
        )


def _refuse_different_ranks(plan: Plan) -> None:
    """Raise SharedError where another rank would train something else: the ranks would wait for each other in vain."""
    said = plan.recipe, plan.fingerprints, plan.precision, plan.device.type, __version__, torch.__version__
    (recipe, *about), *others = plan.world.gather_objects(said)
    for rank, (other_recipe, *other_about) in enumerate(others, 1):
        fields = ", ".join(key for key, _, _ in differing(recipe, other_recipe, FREE | FILES))
        if fields or about != other_about:
            what = fields or "content of the data, precision, kind of device or version"
            raise SharedError(f"rank {rank} has another {what} than rank 0: start all with the same recipe and data")


def _refuse_bad_images(plan: Plan) -> None:
    """Raise UserError for the first image whose header is no image's. Each rank looks at its share."""
    if plan.recipe.data.on_bad_image == "skip":
        return
    for part in plan.parts.named().values():
        share = part.take(np.arange(plan.world.rank, len(part), plan.world.size))
        for error in filter(None, bad_images(share)):
            raise error
