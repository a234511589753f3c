"""A recipe becomes a plan: its place is found, its data read, what cannot be trained refused, and nothing written."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from equipoise import __version__
from equipoise.base.device import choose_device, choose_precision
from equipoise.base.errors import SharedError, UserError, own_command, quoted, several
from equipoise.base.files import real_path
from equipoise.base.world import ALONE, World
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import PUBLISHED, Recipe, field_value, find_field, override, recipe_fields
from equipoise.data.decode import bad_images
from equipoise.data.images import DIGITS, Parts, imbalance_factor
from equipoise.data.rows import TABLES
from equipoise.data.sources import PARTS, open_data
from equipoise.method.clip import PREFIX
from equipoise.method.methods import METHODS
from equipoise.method.pretrained import find_pretrained, viewed_as_pretrained
from equipoise.runs.checkpoint import Checkpoint, create_network, load_checkpoint, refuse_changed
from equipoise.runs.folder import LAST, METRICS, PREVIOUS, RECIPE, RECORD, checkpoints_at, chosen_checkpoint, is_used
from equipoise.runs.records import read_record
from equipoise.views.loader import steps_per_epoch
from equipoise.views.views import view_settings

Named = str | Path | None  # a file or folder that a user names

# Fields in which a recipe may change while a run goes on: they say where and how it is computed, not what.
HOW = ("precision", "compile", "cuda_graph", "deterministic", "data.on_bad_image", "data.allow_outside")
FREE = frozenset({*HOW, "name", "summary", "device", "workers", "log_every", "checkpoint_minutes", "track"})
# Files may be moved, and lie elsewhere on each host: fingerprints tell whether they are the same.
FILES = frozenset({"model.weights", "data.path", "data.train_list", "data.val_list", "data.test_list"})


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from."""

    path: Path
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Place:
    """Where a run is written. `start`: a checkpoint to start from. `resumes`: the run is there and goes on, or begins
    again where it has no checkpoint. `named`: no other folder will do."""

    folder: Path
    start: Start | None
    resumes: bool
    named: bool = True


@dataclass(frozen=True)
class Plan:
    """What a run is about to do. Nothing has been written yet. With a `classifier`, it takes it and trains nothing."""

    recipe: Recipe
    parts: Parts
    device: torch.device
    precision: str
    steps_per_epoch: int
    place: Place
    world: World
    classifier: nn.Module | None = None

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def start(self) -> Start | None:
        return self.place.start

    @property
    def steps(self) -> int:
        """Of all epochs; none where the classifier is computed."""
        return 0 if self.classifier is not None else self.recipe.epochs * self.steps_per_epoch

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """By part, what tells whether its images are the same."""
        return {name: part.fingerprint() for name, part in self.parts.named().items()}

    def describe(self) -> dict[str, str]:
        """The plan for people: what, and its value."""
        recipe, model, parts, world = self.recipe, self.recipe.model, self.parts, self.world
        # What the method may have brought along, and what is not usual.
        brought, others = PUBLISHED.get(recipe.method, {}), ("sampler", "label_smoothing", "mix", "sam", "ema")
        fields = {key: find_field(key) for key in (*brought, *others)}
        now, usual = ({key: field_value(of, field) for key, field in fields.items()} for of in (recipe, Recipe()))
        random = self.start is not None or (model.tune == "scratch" and not model.weights)
        counts, names = parts.train.class_counts, parts.train.class_names
        ends = [f"{count:,} ({names[counts.index(count)]})" for count in (max(counts), min(counts))]
        factor = imbalance_factor(counts)
        scored = [f", {len(part):,} for {name}" for name, part in parts.named().items() if name != "train"]
        ranks = f", {world.size} processes, BatchNorm {model.batch_norm}" if world.size > 1 else ""
        epochs = f"{several(recipe.epochs, 'epoch')} of {self.steps_per_epoch:,}: {several(self.steps, 'step')}"
        at_a_time = f", {recipe.micro_batch} at a time" if recipe.micro_batch else ""
        steps = f"{epochs} of {recipe.batch_size} images{at_a_time}"
        said = {
            "recipe": f"{recipe.name}, method {recipe.method}, seed {recipe.seed}",
            "settings": ", ".join(f"{key} {now[key]}" for key in now if key in brought or now[key] != usual[key]),
            "data": f"{recipe.data.path} ({parts.kind})",
            "lists": "; ".join(parts.described),
            "note": "; ".join(parts.notes),
            "images": f"{len(parts.train):,} to train on{''.join(scored)}",
            "classes": f"{len(counts):,}, of {' to '.join(ends)} images: imbalance factor {factor:.4g}",
            "weights": "" if random else model.weights or find_pretrained(model.encoder).said,
            "network": f"{model.encoder} at {recipe.views.size} pixels, {model.classifier} classifier",
            "device": f"{self.device}, {self.precision}{ranks}",
            "steps": "none: the classifier is computed" if self.classifier else steps,
            "goes on": self._goes_on(),
            "tracker": "" if recipe.track == "none" else recipe.track,
            "run folder": str(self.folder),
        }
        return {name: value for name, value in said.items() if value}

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
        return f"{program} train --resume {quoted(self.folder)}"


def prepare(
    recipe: Recipe, out: Named = None, resume: Named = None, world: World = ALONE, parts: Parts | None = None
) -> Plan:
    """Read the data, unless the `parts` are those of an earlier plan, and check that `recipe` can be trained on it,
    into the folder `out`. Raises UserError, on all ranks; writes nothing.

    `resume` is a run folder, or a checkpoint, to go on from: one of a run, which goes on in its own folder unless `out`
    is another, or one of the BCL authors' code. 'auto' is the newest unfinished run of the same recipe, where there is
    one; a process that torchrun has started anew goes on with the run that it was.
    """
    recipe = viewed_as_pretrained(with_absolute_paths(recipe))
    place = world.first_makes(lambda: find_place(recipe, out, resume, world))
    plan = world.each_makes(lambda: _plan(recipe, place, world, parts))
    _refuse_different_ranks(plan)
    if parts is None and recipe.data.on_bad_image == "error":
        world.each_makes(lambda: _refuse_bad_images(plan))
    return plan


def differing(one: Recipe, other: Recipe, free: frozenset[str]) -> list[tuple[str, Any, Any]]:
    """The fields, without the `free` ones, in which two recipes differ, each with both values."""
    fields = [field for field in recipe_fields() if field.key not in free]
    values = [(field.key, field_value(one, field), field_value(other, field)) for field in fields]
    return [(key, before, now) for key, before, now in values if before != now]


def find_place(recipe: Recipe, out: Named, resume: Named, world: World) -> Place:
    """Where to write a run of `recipe`: see `prepare`. Raises UserError where a folder or checkpoint will not do."""
    folder, source = (Path(os.path.expanduser(path)) if path else None for path in (out, resume))
    again = not resume and (world.restarted or world.launch not in ("", "none"))  # 'none' is torchrun's default name
    if resume == "auto" or again:
        source = newest_run(lambda before: not differing(before, recipe, FREE), folder, world if again else None)
    start = None
    if source:
        run = source if source.is_dir() else source.parent
        own = (run / RECORD).is_file() and (source.is_dir() or source.name in (LAST, PREVIOUS))
        start = _first_whole(checkpoints_at(source, LAST, PREVIOUS))
        if own and (folder is None or real_path(folder) == real_path(run)):
            return Place(run, start, resumes=True)
        if start is None:
            raise UserError(f"there is no run folder or checkpoint at {source}")
    if folder is not None and (folder.is_file() or (folder.is_dir() and is_used(folder))):
        raise UserError(
            f"{folder} is there, and not empty: name another with --out, or go on by equipoise train --resume {folder}"
        )
    return Place(folder or default_folder(recipe), start, resumes=False, named=folder is not None)


def default_folder(recipe: Recipe) -> Path:
    """A folder in `runs` that does not exist yet."""
    stem = f"{recipe.name}-{recipe.method.replace('+', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    # A sweep may start several runs in one second.
    return next(path for n in itertools.count(1) if not (path := Path("runs") / (stem + f"-{n}" * (n > 1))).exists())


def newest_run(meant: Callable[[Recipe], bool], folder: Path | None, world: World | None = None) -> Path | None:
    """The newest unfinished run of a recipe that is `meant`, in `folder` or else in `runs`; with `world`, of this
    torchrun launch. After a restart a finished one too, which is then scored again: there may be a run after it."""
    found: list[tuple[str, Path]] = []
    for run in [folder] if folder else [record.parent for record in Path("runs").glob(f"*/{RECORD}")]:
        with contextlib.suppress(UserError):  # no run, or one that was killed while it made its folder
            record = read_record(run / RECORD)
            open_to_go_on = (world is not None and world.restarted) or not (run / METRICS).exists()
            of_launch = world is None or record.get("launch") == world.launch
            if meant(load_recipe(run / RECIPE)) and open_to_go_on and of_launch:
                found.append((record["started"], run))
    return max(found)[1] if found else None


def _first_whole(paths: Sequence[Path]) -> Start | None:
    """The first checkpoint that the disk has not spoiled; None where there is none. Raises UserError where all are."""
    for path in paths[:-1]:
        with contextlib.suppress(UserError):
            return Start(path, load_checkpoint(path))
    return Start(paths[-1], load_checkpoint(paths[-1])) if paths else None


def _plan(recipe: Recipe, place: Place, world: World, parts: Parts | None) -> Plan:
    data = Path(recipe.data.path)
    data = data.parent if data.suffix.lower() in TABLES else data
    if recipe.data.path not in (DIGITS, "") and real_path(place.folder).is_relative_to(data):
        raise UserError(f"the run folder {place.folder} would lie inside the data; name one outside with --out")
    if 1 < world.local_size <= torch.cuda.device_count() and recipe.device.startswith("cuda:"):
        raise UserError(f"{world.local_size} processes on this host cannot all take {recipe.device}; set --device cuda")
    parts = parts or open_data(recipe.data)
    refuse_batches(recipe, len(parts.train), world)
    _refuse_idle_settings(recipe)
    device = choose_device(recipe.device, world.local_rank)
    steps = steps_per_epoch(len(parts.train), recipe.batch_size)
    plan = Plan(recipe, parts, device, _precision(recipe, device), steps, place, world)
    if plan.start is not None:
        _refuse_other_run(plan, plan.start)
    return plan


def _refuse_idle_settings(recipe: Recipe) -> None:
    """Raise UserError for fields that would have no effect, and for those that the method does not go with."""
    name, model, mix, method = recipe.method, recipe.model, recipe.views.mix, METHODS[recipe.method]
    cosine, frozen, scratch = model.classifier == "cosine", model.tune == "frozen", model.tune == "scratch"
    started, start = cosine and not scratch, model.classifier_start
    unmixed = "a frozen encoder's features" if method.mixes else f"{name}, whose views train both branches,"
    resampled, smoothed = recipe.data.sampler != "instance", recipe.loss.label_smoothing > 0
    no_text = start == "text" and not (started and model.encoder.startswith(PREFIX))
    no_scale, tracker = start == "scaled" and not (frozen and model.weights), recipe.track
    nowhere = tracker == "mlflow" and not (os.environ.get("MLFLOW_TRACKING_URI") or find_spec("alembic"))
    for refused, why, instead in (
        (method.cosine and not cosine, f"{name} needs a cosine classifier", "set --classifier cosine"),
        (resampled and not method.resamples, f"{name} goes by the class counts as they are", "set --sampler instance"),
        (smoothed and not method.smooths, f"{name} has no label smoothing", "set --label-smoothing 0"),
        (method.must_mix and frozen, f"{name} mixes images, not a frozen encoder's features", "set --tune last-stage"),
        (method.must_mix and mix not in ("cutmix", "cmo"), f"{name} pastes boxes of other images", "set --mix cmo"),
        (mix != "none" and (frozen or not method.mixes), f"{unmixed} cannot take mixed images", "set --mix none"),
        (scratch and model.weights, "tune = scratch starts from random weights", "set --tune full, or drop --weights"),
        (no_text, f"only a cosine classifier on a pretrained {PREFIX}... starts at text", "drop --classifier-start"),
        (no_scale, "scaled is for equipoise retune RUN --with lws", "drop --classifier-start"),
        (model.anchor and not started, "only cosine classifiers on pretrained encoders are held", "set --anchor 0"),
        (tracker != "none" and not find_spec(tracker), f"{tracker} is not installed", f"pip install {tracker}"),
        (nowhere, "mlflow-skinny keeps no runs itself", "set MLFLOW_TRACKING_URI to a server, or pip install mlflow"),
    ):
        if refused:
            raise UserError(f"{why}: {instead}")


def _precision(recipe: Recipe, device: torch.device) -> str:
    """As the recipe says; 'auto' is what is fastest. On a CPU that is float32 where convolutions in groups are passed
    backward: in bf16 that takes more than twice as long (docs/performance.md)."""
    precision = choose_precision(recipe.precision, device)
    little = recipe.model.tune in ("frozen", "last-stage", "lora")  # or nothing of it is passed backward
    if (recipe.precision, precision, device.type) != ("auto", "bf16", "cpu") or little:
        return precision
    with torch.device("meta"):
        modules = create_network(recipe, 2, start=False).modules()
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in modules)
    return "fp32" if grouped else precision


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, as it can be trained again from elsewhere."""
    for field in map(find_field, FILES):
        path = field_value(recipe, field)
        if path not in (DIGITS, "") and "://" not in path:
            absolute = real_path(Path(os.path.expanduser(path)))
            if field.key == "model.weights" and absolute.is_dir():  # a run folder
                absolute = chosen_checkpoint(absolute)
            recipe = override(recipe, field, str(absolute))
    return recipe


def refuse_batches(recipe: Recipe, images: int, world: World) -> None:
    """Raise UserError for batches of so many images that ranks cannot share or BatchNorm cannot normalise."""
    batch, part, ranks, batch_norm = recipe.batch_size, recipe.micro_batch, world.size, recipe.model.batch_norm
    if batch > images:
        raise UserError(f"batch_size ({batch}) is larger than the training part ({images} images); set a smaller one")
    if batch % ranks or batch < 2 * ranks:
        least = f"a multiple of {ranks}, {2 * ranks} or more"
        raise UserError(f"batch_size ({batch}) is that of all {ranks} processes together; set --batch-size to {least}")
    last = images % batch
    if ranks > 1 and batch_norm == "synchronised" and (part or 1 < last < 2 * ranks):
        short = f"BatchNorm can be synchronised neither over micro-batches nor over a last batch of {last} images"
        raise UserError(f"{short}; set model.batch_norm to per-rank or frozen")
    alone = len(view_settings(recipe).kinds) == 1 or METHODS[recipe.method].momentum > 0  # an image's view in a pass
    if part in (1, 2) and batch_norm != "frozen" and alone:
        raise UserError(f"micro_batch ({part}) may leave BatchNorm a single image; set --micro-batch 3 or more")


def _refuse_other_run(plan: Plan, start: Start) -> None:
    """Raise UserError where the recipe or the data cannot go on from the checkpoint."""
    recipe, path, done, resumes = plan.recipe, start.path, start.checkpoint, plan.place.resumes
    scored = (plan.folder / METRICS).exists() and not plan.world.restarted
    if done.epoch > recipe.epochs or (done.epoch == recipe.epochs and (scored or not resumes)):
        epochs = several(done.epoch, "epoch")
        raise UserError(f"{path} has trained {epochs} already, of {recipe.epochs}; set --epochs higher")
    if done.class_counts:  # the BCL authors' code does not keep what it was trained on
        refuse_changed(recipe.data.path, plan.parts, done, path, PARTS if resumes else ("train",))
    for key, before, now in differing(done.recipe, recipe, FREE | FILES | {"epochs"}) if resumes else ():
        raise UserError(f"{path} was trained with {key} = {before}, not {now}: change it back, or start a new run")


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
    for part in plan.parts.named().values():
        for error in bad_images(part.take(np.arange(plan.world.rank, len(part), plan.world.size))):
            raise error
