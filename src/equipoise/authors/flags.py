"""The flags of the BCL authors' `main.py` that are no fields of a recipe, and their run folder: see docs/authors.md."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from equipoise.config.recipe import Recipe

LOG = "log"  # their default of --root_log
DATASETS = {
    "imagenet": "imagenet-lt",
    "inat": "inat2018",
    "places": "places-lt",
    "cifar10": "cifar10-lt",
    "cifar100": "cifar100-lt",
}


def add_authors_flags(command: argparse.ArgumentParser) -> None:
    """Add them to `train`. Some set a field of the recipe, under its key."""
    add = command.add_argument_group("of the authors' command line (docs/authors.md)").add_argument
    switch: dict[str, Any] = {"nargs": "?", "const": "true", "metavar": "true|false"}
    names = f"the recipe by its data set: {', '.join(DATASETS)}"
    add("--dataset", metavar="NAME", type=lambda name: DATASETS.get(name, name), choices=DATASETS.values(), help=names)
    for flag, field, other in (("--use-norm", "model.classifier", "linear"), ("--cos", "optim.schedule", "step")):
        add(flag, dest=field, type=_either("cosine", other), help=f"{field}: cosine, or {other}", **switch)
    add("--gpu", dest="device", metavar="N", type="cuda:{}".format, help="train on this GPU: --device cuda:N")
    add("--root-log", metavar="FOLDER", help=f"name the run folder as they do, in this one (theirs: {LOG})")
    add("--resume", metavar="RUN", help="go on with it, or score it; auto: the newest unfinished")
    switch["type"] = _either(True, False)
    add("--reload", help="score the checkpoint of --resume on the test part; no training", **switch)
    add("-e", "--evaluate", help="score it on the validation part; no training", **switch)


def _either(true: object, false: object) -> Callable[[str], object]:
    """What a switch means."""

    def chosen(text: str) -> object:
        try:
            return true if msgspec.convert(text, bool, strict=False) else false
        except msgspec.ValidationError:
            raise argparse.ArgumentTypeError(f"must be true or false, not '{text}'") from None

    return chosen


class Schedule(argparse.Action):
    """`--schedule`: ours with a name, the authors' with numbers, the epochs at which the learning rate drops. That
    means the step schedule, unless `--cos` is given too, as in their code."""

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        schedule = values[0]
        if len(values) > 1 or schedule.strip(".")[:1].isdigit():
            setattr(namespace, "optim.milestones", values)
            schedule = getattr(namespace, self.dest) or "step"
        setattr(namespace, self.dest, schedule)


def authors_folder(root_log: str, recipe: Recipe) -> Path:
    """The run folder under the name that the authors' README gives it, to which another method and a seed are added."""
    names = {recipe: dataset for dataset, recipe in DATASETS.items()}
    name = (
        f"{names.get(recipe.name, recipe.name)}_{recipe.model.encoder}_batchsize{recipe.batch_size}"
        f"_epochs_{recipe.epochs}_temp_{recipe.loss.temperature:g}_lr_{recipe.optim.lr:g}_{recipe.views.cl_views}"
    )
    if recipe.method != "bcl":
        name += f"_{recipe.method.replace('+', '-')}"
    return Path(root_log) / (name + f"_seed_{recipe.seed}" * (recipe.seed != 0))
