"""The flags of the BCL authors' `main.py` that are no fields of a recipe, and their run folder: see docs/authors.md."""

import argparse
from pathlib import Path
from typing import Any

import msgspec

from equipoise.base.errors import UserError
from equipoise.config.recipe import Field, Recipe, find_field, nearest

LOG = "log"  # their default of --root_log
DATASETS = {
    "imagenet": "imagenet-lt",
    "inat": "inat2018",
    "places": "places-lt",
    "cifar10": "cifar10-lt",
    "cifar100": "cifar100-lt",
}


def add_authors_flags(command: argparse.ArgumentParser) -> None:
    """Add them to `train`. Each takes its value as text; a switch without a value means true."""
    group = command.add_argument_group("of the authors' command line (docs/authors.md)")
    switch: dict[str, Any] = {"nargs": "?", "const": "true", "metavar": "true|false"}
    group.add_argument("--dataset", metavar="NAME", help=f"the recipe by its data set: {', '.join(DATASETS)}")
    group.add_argument("--use-norm", help="the cosine classifier, or the linear one", **switch)
    group.add_argument("--cos", help="the cosine schedule, or the step schedule", **switch)
    group.add_argument("--gpu", metavar="N", help="train on this GPU: --device cuda:N")
    group.add_argument(
        "--root-log", metavar="FOLDER", help=f"name the run folder as they do, in this one (theirs: {LOG})"
    )
    group.add_argument("--resume", metavar="RUN", help="go on with it, or score it; auto: the newest unfinished")
    group.add_argument("--reload", help="score the checkpoint of --resume on the test part; no training", **switch)
    group.add_argument("-e", "--evaluate", help="score it on the validation part; no training", **switch)


def truth(flag: str, text: str | None) -> bool | None:
    """The value of a switch: None if it was not given. Raises UserError for anything but true, false, 1 and 0."""
    try:
        return None if text is None else msgspec.convert(text, bool, strict=False)
    except msgspec.ValidationError:
        raise UserError(f"{flag} must be true or false, not '{text}'") from None


def recipe_of_dataset(name: str) -> str:
    """The recipe that `--dataset` names: by the authors' name or by its own. Raises UserError for another name."""
    if name not in DATASETS and name not in DATASETS.values():
        raise UserError(f"--dataset knows no '{name}'{nearest(name, list(DATASETS))}")
    return DATASETS.get(name, name)


def authors_overrides(options: argparse.Namespace) -> list[tuple[Field, Any]]:
    """Recipe fields that the flags stand for. Raises UserError where a flag contradicts one of ours."""
    use_norm, cos = truth("--use-norm", options.use_norm), truth("--cos", options.cos)
    meant = [
        ("--use-norm", "model.classifier", None if use_norm is None else "cosine" if use_norm else "linear"),
        ("--cos", "optim.schedule", None if cos is None else "cosine" if cos else "step"),
        ("--gpu", "device", None if options.gpu is None else f"cuda:{options.gpu}"),
    ]
    for flag, key, value in meant:
        other = getattr(options, key, None)
        if isinstance(other, list):  # `--schedule`: its numbers contradict nothing
            other = None if _are_milestones(other) else other[0]
        if None not in (value, other) and other != value:
            raise UserError(f"{flag} says {key} = {value}, but another flag says {other}; drop one of them")
    return [(find_field(key), value) for _, key, value in meant if value is not None]


def milestones_of(options: argparse.Namespace) -> list[tuple[Field, Any]]:
    """The fields that `--schedule` stands for: ours with a name, the authors' with numbers, the epochs at which the
    learning rate drops. That means the step schedule, unless `--cos` is given too, as in their code."""
    schedule, values = find_field("optim.schedule"), getattr(options, "optim.schedule")
    if values is None or not _are_milestones(values):
        return [(schedule, values[0])] if values else []
    step = [(schedule, "step")] if options.cos is None else []
    return [(find_field("optim.milestones"), values), *step]


def _are_milestones(values: list[str]) -> bool:
    return len(values) > 1 or values[0].strip(".")[:1].isdigit()


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
