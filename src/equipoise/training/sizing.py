"""Own pictures, a machine and a time limit become a recipe: what is tuned of which encoder, for how long, in which
batches. Some batches are timed for it, so that people know beforehand how long the run will take."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from equipoise.base.device import exact_float32, keep_freed_memory
from equipoise.base.errors import UserError, several
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Field, Recipe, override_all
from equipoise.evaluation.features import missing_features
from equipoise.method.clip import PREFIX
from equipoise.method.pretrained import find_pretrained
from equipoise.method.tuning import parameter_groups
from equipoise.runs.checkpoint import create_network
from equipoise.training.loop import set_training
from equipoise.training.optim import create_sgd
from equipoise.training.plan import Plan, prepare
from equipoise.training.session import starts_at_means
from equipoise.training.step import Step
from equipoise.views.loader import Batch, open_recipe_batches, worker_count
from equipoise.views.views import view_settings

T = TypeVar("T")
Settings = Sequence[tuple[Field, Any]]

_RECIPES = {"frozen": "frozen", "scratch": "pictures"}  # of the ways to tune; else:
_FINETUNE = "finetune"
_TIMED_FOR = 6.0  # seconds
_IMAGES = 16  # encoded at a time, as for features
_REST = 3.0  # seconds in which networks are built and files are written


@dataclass(frozen=True)
class Cost:
    """Seconds that a run takes: before its first epoch, for each, after the last."""

    before: float
    epoch: float
    after: float

    def of(self, epochs: int) -> float:
        return self.before + epochs * self.epoch + self.after


@dataclass(frozen=True)
class Choice:
    """`reasons`: by the field's key, why it has its value. `cost`: as measured here."""

    recipe: Recipe
    reasons: Mapping[str, str]
    cost: Cost

    def describe(self) -> dict[str, str]:
        """For people: what was chosen and why, and how long it will take."""
        recipe, cost = self.recipe, self.cost
        what = f"{recipe.model.tune} {recipe.model.encoder} at {recipe.views.size} pixels"
        first = "features" if recipe.model.tune == "frozen" else "the start of the classifier"
        epochs = several(recipe.epochs, "epoch")
        parts = {first: cost.before, epochs: recipe.epochs * cost.epoch, "scoring and files": cost.after}
        said = [f"{duration(seconds)} for {part}" for part, seconds in parts.items() if seconds >= 1]
        takes = ": ".join([duration(cost.of(recipe.epochs)), *filter(None, [", ".join(said)])])
        return {"chosen": f"{what}: {self.reasons['model.tune']}", "takes about": takes}


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def choose(settings: Settings, budget: float | None = None, out: str | Path | None = None, ranks: int = 1) -> Choice:
    """The recipe for the data that `settings` name, on this machine, within `budget` seconds, of which measuring takes
    its part. What they set stays as it is. `out`: see `prepare`; `ranks`: the processes that will share the work.

    Raises UserError for data that cannot be trained on, and for a folder that will not do.
    """
    begun = time.monotonic()
    fixed = {field.key: value for field, value in settings}
    tunes, why = _candidates(fixed, budget, settings)
    plan: Plan | None = None
    choices: list[Choice] = []
    for tune in tunes:
        recipe = override_all(load_recipe(_RECIPES.get(tune, _FINETUNE), tune=tune), settings)
        if plan is None:  # the data are read once
            smallest = recipe if "batch_size" in fixed else replace(recipe, batch_size=2 * ranks)
            plan = prepare(smallest, out)
        if "batch_size" not in fixed:
            batch = min(recipe.batch_size, max(len(plan.parts.train) // 4, 2 * ranks))
            recipe = replace(recipe, batch_size=batch - batch % ranks)
        plan = plan.of(recipe)
        left = None if budget is None else budget - (time.monotonic() - begun)
        least = 1 if len(tunes) == 1 and tune != "frozen" else -(-recipe.epochs // 2)
        choices.append(_within(left, fixed, plan, measure(plan, ranks), least))
        if left is None or choices[-1].cost.of(choices[-1].recipe.epochs) <= left:
            break
    choice = choices[-1]
    if len(tunes) > 1 and budget is not None:
        fits = choice.cost.of(choice.recipe.epochs) <= budget
        why = f"the most thorough that fits into {duration(budget)}" if fits else f"{duration(budget)} are too short"
    return replace(choice, reasons={**choice.reasons, "model.tune": why})


def _candidates(fixed: Mapping[str, Any], budget: float | None, settings: Settings) -> tuple[list[str], str]:
    """The ways to tune that come into question, the most thorough first, and the reason if there is but one."""
    recipe = override_all(load_recipe("frozen"), settings)
    if "model.tune" in fixed:
        return [recipe.model.tune], "as it was asked for"
    try:
        if not recipe.model.weights:
            find_pretrained(recipe.model.encoder)
    except UserError as error:
        return ["scratch"], str(error)
    if recipe.model.encoder.startswith(PREFIX):
        return ["frozen"], "what is known of this encoder's layers does not suffice to tune them at their rates"
    if budget is not None:
        return ["full", "last-stage", "frozen"], ""
    if torch.cuda.is_available() and recipe.device != "cpu":
        return ["full"], "there is a GPU; --tune frozen is faster"
    return ["frozen"], "on a CPU, each image passes the encoder once; with --budget TIME it is tuned if that suffices"


def _within(budget: float | None, fixed: Mapping[str, Any], plan: Plan, cost: Cost, least: int) -> Choice:
    """The plan's recipe with as many epochs as the budget allows, from `least` to twice its own."""
    recipe = plan.recipe
    reasons = {} if "batch_size" in fixed else {"batch_size": "a quarter of the training images at most"}
    if budget is not None and "epochs" not in fixed:
        affordable = int((budget - cost.before - cost.after) / cost.epoch)
        recipe = replace(recipe, epochs=min(2 * recipe.epochs, max(affordable, least)))
        reasons["epochs"] = f"what the budget allows, from {least} to twice the recipe's"
    return Choice(recipe, reasons, cost)


def measure(plan: Plan, ranks: int = 1) -> Cost:
    """What a run of `plan` by so many processes costs on this machine, by timing some batches. What the processes
    send each other is not in it."""
    if plan.device.type == "cpu":
        keep_freed_memory()
    recipe, parts, device = plan.recipe, plan.parts, plan.device
    network = create_network(recipe, len(parts.train.class_names), start=True).to(device)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] torch's stub lacks it
    frozen = recipe.model.tune == "frozen"
    read = list(parts.named().values()) if frozen else [parts.train] if starts_at_means(recipe) else []
    todo = sum(missing_features(recipe, part, network) for part in read)
    own = max(recipe.batch_size // ranks, 2)
    workers = worker_count(recipe.workers, ranks)
    ahead = 2 * workers + 1
    with closing(open_recipe_batches(replace(recipe, workers=workers), parts.train, device, plan.world)) as batches:
        labels_B = torch.tensor(parts.train.labels_N[:own], device=device)
        features_VBF = torch.rand(len(view_settings(recipe).kinds), len(labels_B), network.width, device=device)
        made = repeat(Batch(features_VBF, labels_B, slice(0, len(labels_B))), 1000)
        steps = iter(made) if frozen else batches.training(0, own, range(1000))
        a_step = _paced(steps, _training_step(plan, network), ahead, device)
        everything = np.arange(len(parts.train))
        images = (batch for batch, _ in batches.evaluation_of(everything, _IMAGES))

        def encode(batch: Batch) -> None:
            with torch.inference_mode(), exact_float32():
                network.encode(batch.images_VB3SS[0])

        network.eval()
        seen = min(len(everything), _IMAGES)
        an_image = _paced(images, encode, ahead, device) / seen / ranks if todo or not frozen else 0.0
    validation, test = (len(part) if part else 0 for part in (parts.validation, parts.test))
    scored = 0.0 if frozen else an_image
    last = 2 * (validation + test) + (0 if recipe.model.tune == "scratch" else len(parts.train))
    return Cost(todo * an_image, plan.steps_per_epoch * a_step + validation * scored, last * scored + _REST)


def _training_step(plan: Plan, network: Any) -> Callable[[Batch], None]:
    """What the loop does with a batch, at a rate that leaves the weights as they are."""
    recipe = plan.recipe
    step = Step(recipe, network, plan.parts.train.class_counts, plan.device, plan.precision, plan.world)
    groups = parameter_groups(network, network.encoder, recipe.optim.layer_decay)
    optimizer = create_sgd(groups, 0.0, recipe.optim.momentum, 0.0)
    set_training(network, recipe)

    def train(batch: Batch) -> None:
        optimizer.zero_grad()
        step(batch)
        optimizer.step()

    return train


def _paced(items: Iterator[T], work: Callable[[T], None], ahead: int, device: torch.device) -> float:
    """Seconds for an item, with its making by the loader, which is `ahead` by so many: they do not count, since all
    must get ready first. Of fewer items, all count."""
    ends = [time.perf_counter()]
    for number, item in enumerate(items):
        work(item)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        if number > ahead and ends[-1] - ends[ahead + 1] > _TIMED_FOR:
            break
    first = ahead + 1 if len(ends) > ahead + 2 else 0
    return (ends[-1] - ends[first]) / max(len(ends) - 1 - first, 1)
