"""The flags of the BCL authors' `main.py` that have another name or another form here, and their run folder.

Most of their flags are fields of a recipe, under their names (`--temp`, `--feat_dim`, `--wd`: see `recipe.py`). The
rest is here: what they mean was read in their code (github.com/FlamieZhu/Balanced-Contrastive-Learning, `main.py`),
and the page docs/authors.md maps them all.
"""

import argparse
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError
from equipoise.config.recipe import Field, Recipe, as_bool, find_field, nearest

LOG = "log"  # their default of --root_log
AUTHORS_BEST, AUTHORS_LAST = "bcl_ckpt.best.pth.tar", "bcl_ckpt.pth.tar"
DATASETS = {
    "imagenet": "imagenet-lt",
    "inat": "inat2018",
    "places": "places-lt",
    "cifar10": "cifar10-lt",
    "cifar100": "cifar100-lt",
}


def add_authors_flags(command: argparse.ArgumentParser) -> None:
    """Add them to `train`. Each takes its value as text; a word that stands alone means true."""
    group = command.add_argument_group("of the authors' command line (docs/authors.md)")
    switch: dict[str, Any] = {"nargs": "?", "const": "true", "metavar": "true|false"}
    group.add_argument("--dataset", metavar="NAME", help=f"the recipe by its data set: {', '.join(DATASETS)}")
    group.add_argument("--use-norm", help="the cosine classifier, or the linear one", **switch)
    group.add_argument("--cos", help="the cosine schedule, or the step schedule", **switch)
    group.add_argument("--gpu", metavar="N", help="train on this GPU: --device cuda:N")
    group.add_argument(
        "--root-log", metavar="FOLDER", help=f"name the run folder as the authors do, inside this one (theirs: {LOG})"
    )
    group.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="go on with this run or from this checkpoint, or score it (see below); auto: the newest unfinished run",
    )
    group.add_argument("--reload", help="score the checkpoint of --resume on the test part; no training", **switch)
    group.add_argument("-e", "--evaluate", help="score it on the validation part; no training", **switch)


def truth(flag: str, text: str | None) -> bool | None:
    """What was said by a switch, or None if it was not there. Raises UserError for any other word."""
    if text is None:
        return None
    said = as_bool(text)
    if said is None:
        raise UserError(f"{flag} must be true or false, not '{text}'")
    return said


def recipe_of_dataset(name: str) -> str:
    """The recipe that `--dataset` names: by the authors' word or by its own."""
    if name in DATASETS:
        return DATASETS[name]
    if name in DATASETS.values():
        return name
    raise UserError(f"--dataset knows no '{name}'{nearest(name, list(DATASETS))}")


def authors_overrides(options: argparse.Namespace) -> list[tuple[Field, Any]]:
    """Recipe fields that the flags stand for. Raises UserError where a flag contradicts one of ours."""
    said: list[tuple[str, str, Any]] = []  # the flag, our field, its value
    use_norm, cos = truth("--use-norm", options.use_norm), truth("--cos", options.cos)
    if use_norm is not None:
        said.append(("--use-norm", "model.classifier", "cosine" if use_norm else "linear"))
    if cos is not None:
        said.append(("--cos", "optim.schedule", "cosine" if cos else "step"))
    if options.gpu is not None:
        if not options.gpu.isdigit():
            raise UserError(f"--gpu takes the number of a GPU, from 0, not '{options.gpu}'")
        said.append(("--gpu", "device", f"cuda:{options.gpu}"))
    for flag, key, value in said:
        other = getattr(options, key, None)
        if key == "optim.schedule":
            other = other[0] if other and not _is_number(other[0]) else None
        if other is not None and other != value:
            raise UserError(
                f"{flag} says {key} = {value}, but --{find_field(key).names[0]} says {other}; drop one of them"
            )
    return [(find_field(key), value) for _, key, value in said]


def milestones_of(options: argparse.Namespace) -> list[tuple[Field, Any]]:
    """`--schedule` with numbers is theirs: the epochs at which the learning rate drops. It means the step schedule,
    unless `--cos True` is there too: then, as in their code, the cosine schedule stands. One word is ours."""
    words = getattr(options, "optim.schedule")
    if words is None:
        return []
    if len(words) == 1 and not _is_number(words[0]):
        return [(find_field("optim.schedule"), words[0])]
    fields: list[tuple[Field, Any]] = [(find_field("optim.milestones"), words)]
    if options.cos is None:
        fields.append((find_field("optim.schedule"), "step"))
    return fields


def _is_number(word: str) -> bool:
    return word[:1].isdigit() or word[:1] == "."


def authors_folder(root_log: str, recipe: Recipe) -> Path:
    """The run folder under the name that the authors' README gives it, and what that leaves out: another method, a
    seed."""
    names = {recipe: dataset for dataset, recipe in DATASETS.items()}
    name = (
        f"{names.get(recipe.name, recipe.name)}_{recipe.model.encoder}_batchsize{recipe.batch_size}"
        f"_epochs_{recipe.epochs}_temp_{recipe.loss.temperature:g}_lr_{recipe.optim.lr:g}_{recipe.views.cl_views}"
    )
    if recipe.method != "bcl":
        name += f"_{recipe.method.replace('+', '-')}"
    return Path(root_log) / (name + f"_seed_{recipe.seed}" * (recipe.seed != 0))
