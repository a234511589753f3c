"""Own pictures, a machine and a time limit become a recipe: what is tuned of which encoder, for how long, in which
batches. Some batches are timed for it, so that people know beforehand how long the run will take."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch

from equipoise.base.device import exact_float32
from equipoise.base.errors import UserError, several
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Field, Recipe, override_all
from equipoise.data.images import Parts
from equipoise.evaluation.features import missing_features
from equipoise.method.clip import PREFIX
from equipoise.method.pretrained import find_pretrained
from equipoise.training.loop import Requests, Trainer, set_training
from equipoise.training.plan import Named, Plan, prepare
from equipoise.training.session import open_network, starts_at_means
from equipoise.views.loader import Batch, open_recipe_batches, worker_count
from equipoise.views.views import view_settings

Settings = Sequence[tuple[Field, Any]]

_RECIPES = {"frozen": "frozen", "scratch": "pictures"}  # of the ways to tune; of others 'finetune'
_TIMED_FOR = 6.0  # seconds
_IMAGES = 16  # encoded at a time, as for features
_REST = 3.0  # seconds in which networks are built and files are written


@dataclass(frozen=True)
class Cost:
    """Seconds that a run takes: before its first epoch, for each, after the last. `image`: to encode one, if any is."""

    before: float
    epoch: float
    after: float
    image: float = 0.0

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


def choose(settings: Settings, budget: float | None = None, out: Named = None, ranks: int = 1) -> Choice:
    """The recipe for the data that `settings` name, on this machine, within `budget` seconds, of which measuring takes
    its part. What they set stays as it is. `out`: see `prepare`; `ranks`: the processes that will share the work.

    Raises UserError for data that cannot be trained on, and for a folder that will not do.
    """
    begun = time.monotonic()
    fixed = {field.key for field, _ in settings}
    reasons = {} if "batch_size" in fixed else {"batch_size": "a quarter of the training images at most"}
    tunes, why = _candidates(fixed, budget, settings)
    parts: Parts | None = None  # the data are read once
    choices: list[Choice] = []
    for tune in tunes:
        recipe = override_all(load_recipe(_RECIPES.get(tune, "finetune"), tune=tune), settings)
        if "batch_size" not in fixed:
            parts = parts or prepare(replace(recipe, batch_size=2 * ranks), out).parts
            batch = min(recipe.batch_size, max(len(parts.train) // 4, 2 * ranks))
            recipe = replace(recipe, batch_size=batch - batch % ranks)
        plan = prepare(recipe, out, parts=parts)
        left = None if budget is None else budget - (time.monotonic() - begun)
        recipe, parts, cost = plan.recipe, plan.parts, measure(plan, ranks, _TIMED_FOR)
        if left is not None and "epochs" not in fixed:
            affordable = int((left - cost.before - cost.after) / cost.epoch)
            least = 1 if len(tunes) == 1 and tune != "frozen" else -(-recipe.epochs // 2)
            reasons["epochs"] = f"what the budget allows, from {least} to twice the recipe's"
            recipe = replace(recipe, epochs=min(2 * recipe.epochs, max(affordable, least)))
        choices.append(Choice(recipe, reasons, cost))
        if left is None or cost.of(recipe.epochs) <= left:
            break
    choice = choices[-1]
    if len(tunes) > 1 and budget is not None:
        fits = choice.cost.of(choice.recipe.epochs) <= budget
        why = f"the most thorough that fits into {duration(budget)}" if fits else f"{duration(budget)} are too short"
    return replace(choice, reasons={**reasons, "model.tune": why})


def _candidates(fixed: set[str], budget: float | None, settings: Settings) -> tuple[list[str], str]:
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


def measure(plan: Plan, ranks: int, timed_for: float) -> Cost:
    """What a run by so many processes costs, by timing some batches, twice for so many seconds; without what they send
    each other."""
    own, resting = max(plan.recipe.batch_size // ranks, 2), replace(plan.recipe.optim, lr=0.0)  # the weights stay
    recipe = replace(plan.recipe, workers=worker_count(plan.recipe.workers, ranks), optim=resting)
    parts, device, frozen = plan.parts, plan.device, recipe.model.tune == "frozen"
    network, ahead = open_network(plan), 2 * recipe.workers + 1
    read = list(parts.named().values()) if frozen else [parts.train] if starts_at_means(recipe) else []
    todo = sum(missing_features(recipe, part, network) for part in read)
    with closing(open_recipe_batches(recipe, parts.train, device, plan.world)) as batches:
        labels_B = torch.tensor(parts.train.labels_N[:own], device=device)
        features_VBF = torch.rand(len(view_settings(recipe).kinds), len(labels_B), network.width, device=device)
        made = repeat(Batch(features_VBF, labels_B, slice(0, len(labels_B))), 1000)
        steps = made if frozen else batches.training(0, own, range(1000))
        set_training(network, recipe)
        trainer = Trainer(replace(plan, recipe=recipe), network, batches, None, Requests())
        a_step = _paced(steps, trainer.take_step, ahead, device, timed_for)

        def encode(batch: Batch) -> None:
            with torch.inference_mode(), exact_float32():
                network.encode(batch.images_VB3SS[0])

        network.eval()
        seen = min(len(parts.train), _IMAGES) * ranks
        encoding = batches.evaluation(_IMAGES), encode, ahead, device, timed_for
        an_image = _paced(*encoding) / seen if todo or not frozen else 0.0
    validation, test = (len(part) if part else 0 for part in (parts.validation, parts.test))
    scored = 0.0 if frozen else an_image
    last = 2 * (validation + test) + (0 if recipe.model.tune == "scratch" else len(parts.train))
    an_epoch = plan.steps_per_epoch * a_step + validation * scored
    return Cost(todo * an_image, an_epoch, last * scored + _REST, an_image)


def _paced(
    items: Iterable[Batch], work: Callable[[Batch], object], ahead: int, device: torch.device, timed_for: float
) -> float:
    """Seconds for an item, with its making by the loader, which is `ahead` by so many: they do not count, since all
    must get ready first. Of fewer items, all count."""
    ends = [time.perf_counter()]
    for number, item in enumerate(items):
        work(item)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        if number > ahead and ends[-1] - ends[ahead + 1] > timed_for:
            break
    return float(np.diff(ends[ahead + 1 :] if len(ends) > ahead + 2 else ends).mean())
