"""A recipe becomes a plan: its place is found, its data read, what cannot be trained refused, and nothing written."""

import os
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from equipoise import __version__
from equipoise.base.device import choose_device, choose_precision
from equipoise.base.errors import SharedError, UserError, own_command, several
from equipoise.base.files import real_path
from equipoise.base.world import ALONE, World
from equipoise.config.recipe import PUBLISHED, Recipe, field_value, find_field, override
from equipoise.data.decode import bad_images
from equipoise.data.images import DIGITS, Parts, imbalance_factor
from equipoise.data.rows import TABLES
from equipoise.data.sources import open_data
from equipoise.method.clip import PREFIX
from equipoise.method.methods import METHODS
from equipoise.method.pretrained import find_pretrained, viewed_as_pretrained
from equipoise.runs.checkpoint import changed_part, create_network
from equipoise.runs.folder import METRICS, chosen_checkpoint
from equipoise.training.place import FILES, FREE, Place, Start, differing, find_place
from equipoise.views.loader import steps_per_epoch
from equipoise.views.views import view_settings


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
        """The checkpoint that the run starts from, if any."""
        return self.place.start

    @property
    def steps(self) -> int:
        """Of all epochs; none where the classifier is computed."""
        return 0 if self.classifier is not None else self.recipe.epochs * self.steps_per_epoch

    def of(self, recipe: Recipe) -> "Plan":
        """The plan of another recipe for the same data."""
        recipe = viewed_as_pretrained(replace(recipe, data=self.recipe.data))
        steps = steps_per_epoch(len(self.parts.train), recipe.batch_size)
        return replace(self, recipe=recipe, precision=_precision(recipe, self.device), steps_per_epoch=steps)

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
            "settings": ", ".join(f"{key} {value}" for key, value in self._settings().items()),
            "data": f"{recipe.data.path} ({parts.kind})",
            "lists": "; ".join(parts.described),
            "note": "; ".join(parts.notes),
            "images": f"{len(parts.train):,} to train on{''.join(others)}",
            "classes": f"{len(counts):,}, of {max(counts):,} ({largest}) to {min(counts):,} ({smallest}) images: "
            f"imbalance factor {imbalance_factor(counts):.4g}",
            "weights": self._weights(),
            "network": f"{recipe.model.encoder} at {recipe.views.size} pixels, {recipe.model.classifier} classifier",
            "device": f"{self.device}, {self.precision}{ranks}",
            "steps": "none: the classifier is computed"
            if self.classifier
            else f"{several(recipe.epochs, 'epoch')} of {self.steps_per_epoch:,}: {several(self.steps, 'step')} of "
            f"{recipe.batch_size} images{at_a_time}",
            "goes on": self._goes_on(),
            "run folder": str(self.folder),
        }
        return {name: value for name, value in said.items() if value}

    def _settings(self) -> dict[str, Any]:
        """What the method may have brought along, and what is not usual."""
        keys = [*PUBLISHED.get(self.recipe.method, {}), "sampler", "label_smoothing", "mix", "sam", "ema"]
        values = {
            key: (field_value(self.recipe, find_field(key)), field_value(Recipe(), find_field(key))) for key in keys
        }
        return {key: now for key, (now, usual) in values.items() if now != usual or key in keys[:-5]}

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
    recipe = viewed_as_pretrained(with_absolute_paths(recipe))
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
    steps = steps_per_epoch(len(parts.train), recipe.batch_size)
    plan = Plan(recipe, parts, device, _precision(recipe, device), steps, place, world)
    _refuse_idle_settings(recipe)
    if plan.start is not None:
        _refuse_other_run(plan, plan.start)
    return plan


def _refuse_idle_settings(recipe: Recipe) -> None:
    """Raise UserError for fields that would have no effect, and for those that the method does not go with."""
    model, method = recipe.model, METHODS[recipe.method]
    if method.cosine and model.classifier != "cosine":
        raise UserError(f"{recipe.method} needs a cosine classifier: set --classifier cosine")
    if recipe.data.sampler != "instance" and not method.resamples:
        raise UserError(f"{recipe.method} goes by the class counts as they are: set --sampler instance")
    if recipe.loss.label_smoothing and not method.smooths:
        raise UserError(f"{recipe.method} has no label smoothing: set --label-smoothing 0")
    mix = recipe.views.mix
    if method.must_mix and model.tune == "frozen":
        raise UserError(
            f"{recipe.method} mixes images, and a frozen encoder's features cannot be: set --tune last-stage"
        )
    if method.must_mix and mix not in ("cutmix", "cmo"):
        raise UserError(f"{recipe.method} pastes boxes of other images: set --mix cmo")
    if mix != "none" and (not method.mixes or model.tune == "frozen"):
        why = "a frozen encoder's features" if method.mixes else f"{recipe.method}, whose views train both branches,"
        raise UserError(f"{why} cannot take mixed images: set --mix none")
    started = model.tune != "scratch" and model.classifier == "cosine"
    if model.tune == "scratch" and model.weights:
        raise UserError("tune = scratch starts from random weights: set --tune full, or drop --weights")
    if model.classifier_start == "text" and not (started and model.encoder.startswith(PREFIX)):
        raise UserError(f"only a cosine classifier on a pretrained {PREFIX}... starts at text: drop --classifier-start")
    if model.classifier_start == "scaled" and not (model.tune == "frozen" and model.weights):
        raise UserError("scaled is for equipoise retune RUN --with lws: drop --classifier-start")
    if model.anchor and not started:
        raise UserError("only a cosine classifier on a pretrained encoder is held at its start: set --anchor 0")


def _precision(recipe: Recipe, device: torch.device) -> str:
    """As the recipe says; 'auto' is what is fastest on the device."""
    precision = choose_precision(recipe.precision, device)
    slow = (recipe.precision, precision, device.type) == ("auto", "bf16", "cpu") and _is_slower_in_bf16(recipe)
    return "fp32" if slow else precision


def _is_slower_in_bf16(recipe: Recipe) -> bool:
    """Whether a CPU would take longer in bf16: the backward pass of convolutions in groups does, more than twice
    (docs/performance.md)."""
    if recipe.model.tune in ("frozen", "last-stage", "lora"):  # little or nothing of it is passed backward
        return False
    with torch.device("meta"):
        modules = create_network(recipe, 2, start=False).modules()
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in modules)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, as it can be trained again from elsewhere."""
    for field in map(find_field, FILES):
        path = field_value(recipe, field)
        if path not in (DIGITS, ""):
            absolute = real_path(Path(os.path.expanduser(path)))
            if field.key == "model.weights" and absolute.is_dir():  # a run folder
                absolute = chosen_checkpoint(absolute)
            recipe = override(recipe, field, str(absolute))
    return recipe


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
    alone = len(view_settings(recipe).kinds) == 1 or METHODS[recipe.method].momentum > 0  # an image's view in a pass
    if part in (1, 2) and batch_norm != "frozen" and alone:
        raise UserError(
            f"micro_batch ({part}) may leave BatchNorm a single image; set --micro-batch 3 or more, or "
            "model.batch_norm to frozen"
        )


def _refuse_other_run(plan: Plan, start: Start) -> None:
    """Raise UserError where the recipe or the data cannot go on from the checkpoint."""
    recipe, path, done, resumes = plan.recipe, start.path, start.checkpoint, plan.place.resumes
    scored = (plan.folder / METRICS).exists() and not plan.world.restarted
    if done.epoch > recipe.epochs or (done.epoch == recipe.epochs and (scored or not resumes)):
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
        for error in bad_images(share):
            raise error
