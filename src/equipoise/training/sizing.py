"""Own pictures, a machine and the minutes there are become a recipe: what is tuned of which encoder, at which size, for
how long. A few batches are timed for it, so that the minutes are known beforehand."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch

from equipoise.base.device import exact_float32, keep_freed_memory
from equipoise.base.errors import UserError, several
from equipoise.config.recipe import Field, Recipe, load_recipe, override
from equipoise.evaluation.features import missing_features
from equipoise.method.pretrained import find_pretrained
from equipoise.method.tuning import parameter_groups
from equipoise.runs.checkpoint import create_network
from equipoise.training.loop import create_sgd, set_training
from equipoise.training.plan import Plan, prepare
from equipoise.training.step import Step
from equipoise.views.loader import Batch, open_recipe_batches, steps_per_epoch
from equipoise.views.views import view_settings

_RECIPES = {"frozen": "frozen", "scratch": "pictures"}  # of the ways to tune; else:
_FINETUNE = "finetune"
_TIMED_FOR, _TIMED_AT_MOST = 6.0, 12  # seconds and batches
_IMAGES_TIMED = 192

Settings = Sequence[tuple[Field, Any]]


@dataclass(frozen=True)
class Cost:
    """Seconds that a run takes: before its first epoch, for each, after the last."""

    before: float
    epoch: float
    after: float

    def of(self, epochs: int) -> float:
        return self.before + epochs * self.epoch + self.after

    def said(self, recipe: Recipe) -> str:
        """For people."""
        first = "features" if recipe.model.tune == "frozen" else "the class means"
        parts = {first: self.before, several(recipe.epochs, "epoch"): recipe.epochs * self.epoch, "scoring": self.after}
        whole = duration(self.of(recipe.epochs))
        return f"{whole}: {', '.join(f'{duration(took)} for {what}' for what, took in parts.items() if took >= 1)}"


@dataclass(frozen=True)
class Choice:
    """`reasons`: by the field's key, why it has its value. `cost`: as measured here."""

    recipe: Recipe
    reasons: Mapping[str, str]
    cost: Cost

    @property
    def seconds(self) -> float:
        """That the run takes."""
        return self.cost.of(self.recipe.epochs)

    def described(self) -> dict[str, str]:
        """For people: what was chosen and why, and what it will take."""
        recipe, why = self.recipe, self.reasons["model.tune"]
        chosen = f"{recipe.model.tune} {recipe.model.encoder} at {recipe.views.size} pixels: {why}"
        return {"chosen": chosen, "takes about": self.cost.said(recipe)}


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def choose(settings: Settings, budget: float | None = None) -> Choice:
    """The recipe for the data that `settings` name, on this machine, within `budget` seconds. What they set stays as it
    is. Raises UserError for data that cannot be trained on."""
    fixed = {field.key: value for field, value in settings}
    tunes, why = _candidates(fixed, budget, settings)
    choice = _within(budget, fixed, _sized(tunes[0], settings), why)
    for tune in tunes[1:]:
        if budget is None or choice.seconds <= budget:
            break
        choice = _within(budget, fixed, _sized(tune, settings), why)
    return choice


def _within(budget: float | None, fixed: Mapping[str, Any], plan: Plan, why: str) -> Choice:
    """The plan's recipe with as many epochs as the budget allows, between half of its own and twice as many."""
    recipe, cost = plan.recipe, measure(plan)
    if budget is not None and "epochs" not in fixed:
        affordable = int((budget - cost.before - cost.after) / cost.epoch)
        epochs = min(2 * recipe.epochs, max(affordable, -(-recipe.epochs // 2)))
        recipe = replace(recipe, epochs=epochs)
    choice = Choice(recipe, {**_reasons(recipe), "model.tune": why}, cost)
    if budget is None or "model.tune" in fixed:
        return choice
    fits = "the most that fits into" if choice.seconds <= budget else "nothing fits into"
    return replace(choice, reasons={**choice.reasons, "model.tune": f"{fits} {duration(budget)}"})


def _candidates(fixed: Mapping[str, Any], budget: float | None, settings: Settings) -> tuple[list[str], str]:
    """The ways to tune that come into question, and why the first of them."""
    if "model.tune" in fixed:
        return [fixed["model.tune"]], "as it was asked for"
    recipe = _with(load_recipe("frozen"), settings)
    try:
        if not recipe.model.weights:
            find_pretrained(recipe.model.encoder)
    except UserError as error:
        return ["scratch"], str(error)
    if budget is not None:
        return ["full", "last-stage", "frozen"], ""
    if torch.cuda.is_available() and recipe.device != "cpu":
        return ["full"], "there is a GPU; --tune frozen is faster"
    return ["frozen"], "without a GPU each image passes the encoder once; --budget 60m would tune it"


def _with(recipe: Recipe, settings: Settings) -> Recipe:
    for field, value in settings:
        recipe = override(recipe, field, value)
    return recipe


def _sized(tune: str, settings: Settings) -> Plan:
    """The plan of the recipe for this way to tune, with batches that suit the number of images."""
    keys = {field.key for field, _ in settings}
    recipe = _with(load_recipe(_RECIPES.get(tune, _FINETUNE), tune=tune), settings)
    smallest = recipe if "batch_size" in keys else replace(recipe, batch_size=2)
    plan = prepare(smallest, out=None)
    images = len(plan.parts.train)
    recipe = replace(plan.recipe, batch_size=recipe.batch_size)
    if "batch_size" not in keys:
        while recipe.batch_size > max(images // 4, 4):
            recipe = replace(recipe, batch_size=recipe.batch_size // 2)
    return replace(plan, recipe=recipe, steps_per_epoch=steps_per_epoch(images, recipe.batch_size))


def _reasons(recipe: Recipe) -> dict[str, str]:
    """Why the fields that matter have their values; `model.tune` is not among them."""
    return {
        "method": "the prior of the training images is taken out of the classifier, for the rare classes",
        "epochs": "what the time, or the recipe, allows",
        "batch_size": "a quarter of the training images at most",
        "views.size": "the size that the encoder's weights are meant for",
        "model.encoder": "a small network of ImageNet whose weights can be had without a hub",
    }


def measure(plan: Plan) -> Cost:
    """What a run of `plan` takes on this machine, as a few batches tell."""
    if plan.device.type == "cpu":
        keep_freed_memory()
    recipe, parts, device = plan.recipe, plan.parts, plan.device
    network = create_network(recipe, len(parts.train.class_names), start=True).to(device)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] torch's stub lacks it
    step = Step(recipe, network, parts.train.class_counts, device, plan.precision, plan.world)
    groups = parameter_groups(network, network.encoder, recipe.optim.layer_decay)
    optimizer = create_sgd(groups, 1e-9, 0.0, 0.0)
    frozen, labels_N = recipe.model.tune == "frozen", torch.from_numpy(parts.train.labels_N)
    read = list(parts.named().values()) if frozen else [parts.train]
    todo = 0 if recipe.model.tune == "scratch" else sum(missing_features(recipe, part, network) for part in read)
    with closing(open_recipe_batches(recipe, parts.train, device, plan.world)) as batches:

        def made() -> Iterable[Batch]:
            if not frozen:
                return batches.training(0, recipe.batch_size, range(_TIMED_AT_MOST))
            rows = slice(0, recipe.batch_size)
            features_VBF = torch.rand(len(view_settings(recipe).kinds), recipe.batch_size, network.width, device=device)
            return repeat(Batch(features_VBF, labels_N[rows].to(device), rows), _TIMED_AT_MOST)

        def encode() -> Iterable[int]:
            network.eval()
            for batch, rows in batches.evaluation_of(np.arange(min(len(parts.train), _IMAGES_TIMED)), 32):
                with torch.inference_mode(), exact_float32():
                    network.encode(batch.images_VB3SS[0])
                yield len(rows)

        def train() -> Iterable[int]:
            set_training(network, recipe)
            for batch in made():
                optimizer.zero_grad()
                step(batch)
                optimizer.step()
                yield 1

        an_image, a_step = pace(encode()), pace(train())
    validation, test = (len(part) if part else 0 for part in (parts.validation, parts.test))
    scored = 0.0 if frozen else an_image
    return Cost(todo * an_image, plan.steps_per_epoch * a_step + validation * scored, 2 * (validation + test) * scored)


def pace(work: Iterable[int]) -> float:
    """Seconds for one of what `work` counts; its first item, for which all gets ready, does not count."""
    items = iter(work)
    next(items)
    begun, done = time.perf_counter(), 0
    for count in islice(items, _TIMED_AT_MOST - 1):
        done += count
        if time.perf_counter() - begun > _TIMED_FOR:
            break
    return (time.perf_counter() - begun) / max(done, 1)
