"""The flags of the BCL authors' `main.py` that are no fields of a recipe, and their run folder: see docs/authors.md."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from equipoise.config.recipe import Recipe, nearest

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
    add("--dataset", metavar="NAME", type=_recipe_of_dataset, help=names)
    norm, cos = _either("cosine", "linear"), _either("cosine", "step")
    add("--use-norm", dest="model.classifier", type=norm, help="the cosine classifier, or the linear one", **switch)
    add("--cos", dest="optim.schedule", type=cos, help="the cosine schedule, or the step schedule", **switch)
    add("--gpu", dest="device", metavar="N", type="cuda:{}".format, help="train on this GPU: --device cuda:N")
    add("--root-log", metavar="FOLDER", help=f"name the run folder as they do, in this one (theirs: {LOG})")
    add("--resume", metavar="RUN", help="go on with it, or score it; auto: the newest unfinished")
    reload = "score the checkpoint of --resume on the test part; no training"
    add("--reload", type=_truth, help=reload, **switch)
    add("-e", "--evaluate", type=_truth, help="score it on the validation part; no training", **switch)


def _truth(text: str) -> bool:
    """The value of a switch."""
    try:
        return msgspec.convert(text, bool, strict=False)
    except msgspec.ValidationError:
        raise argparse.ArgumentTypeError(f"must be true or false, not '{text}'") from None


def _either(true: str, false: str) -> Callable[[str], str]:
    return lambda text: true if _truth(text) else false


def _recipe_of_dataset(name: str) -> str:
    """The recipe that `--dataset` names: by the authors' name or by its own."""
    if name not in DATASETS and name not in DATASETS.values():
        raise argparse.ArgumentTypeError(f"no '{name}' is known{nearest(name, list(DATASETS))}")
    return DATASETS.get(name, name)


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
