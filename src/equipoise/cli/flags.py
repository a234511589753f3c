"""Options that several commands have, and how they become a recipe, whose checks and messages are the recipe's own."""

import argparse
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from equipoise.authors.flags import DATASETS, Schedule
from equipoise.base.errors import UserError
from equipoise.config.reading import load_recipe, shipped_recipes
from equipoise.config.recipe import Field, Recipe, field_value, find_field, override_all, recipe_fields

DEMO = "digits-lt"
OWN_FOLDER = "frozen"  # where nothing else is chosen: see training/sizing.py
# The recipe for what `sources.recognise` returns, where it has another name.
FITTING = {"": OWN_FOLDER, "digits": DEMO, "cifar10": "cifar10-lt", "cifar100": "cifar100-lt"}


def refuse_unwritable(option: str, file: str | Path | None, suffix: str) -> None:
    """Raise UserError, before the work, where the file of an option cannot be written or is of another kind."""
    if file in (None, "-"):
        return
    path = Path(file).resolve()
    if path.is_dir() or not os.access(path.parent, os.W_OK) or (path.exists() and path.suffix != suffix):
        raise UserError(f"{option} must be a new file or a {suffix} file, in a folder that may be written, not {file}")


def add_set(command: argparse.ArgumentParser, *keys: str) -> None:
    """`--set`, and flags for these fields of a recipe."""
    help = "set any field of the recipe"
    command.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=help)
    for key in keys:
        add_field(command, find_field(key))


def add_recipe_flags(command: argparse.ArgumentParser, arguments: Sequence[str], without: str = "") -> None:
    """`--set`, and a flag for every field of a recipe; the help shows the values of the one that is named."""
    add_set(command)
    default = OWN_FOLDER if "--data" in arguments else DEMO
    named = next((argument for argument in arguments if argument in shipped_recipes()), default)
    shown = load_recipe(named) if {"-h", "--help"} & set(arguments) else Recipe()
    for section, fields in groupby(recipe_fields(), lambda field: field.path[0] if len(field.path) == 2 else "run"):
        group = command.add_argument_group(f"{section} (shown: {named})")
        for field in fields:
            if field.key not in ("name", "summary", without):
                add_field(group, field, field_value(shown, field))


def add_field(group: Any, field: Field, default: Any = None) -> None:
    """A flag for a field of a recipe; its help shows the default, where there is one."""
    # One letter works with one dash or two: the authors' README writes `--p`.
    flags = [flag for name in field.names for flag in ([f"-{name}", f"--{name}"] if len(name) == 1 else [f"--{name}"])]
    arguments: dict[str, Any] = {"metavar": field.path[-1].upper()}
    if get_origin(field.type) is Literal:
        arguments["metavar"] = "|".join(choice for choice in get_args(field.type) if choice)
        if field.key == "optim.schedule":
            arguments |= {"nargs": "+", "action": Schedule}
    elif field.type is bool:
        arguments |= {"metavar": "true|false", "nargs": "?", "const": "true"}
    elif get_origin(field.type) is tuple:
        arguments["nargs"] = "+"
        default = " ".join(f"{number:g}" for number in default)
    text = (field.help + ("" if default is None else f" [{default}]")).replace("%", "%%")
    group.add_argument(*flags, dest=field.key, default=None, help=text, **arguments)


def overrides_of(options: argparse.Namespace) -> list[tuple[Field, Any]]:
    """Fields set on the command line; where `--set` and a flag set one field, the flag counts."""
    settings: list[tuple[Field, Any]] = []
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set takes SECTION.FIELD=VALUE, not '{text}'")
        settings.append((find_field(key.strip()), value.strip()))
    given = [(field, getattr(options, field.key, None)) for field in recipe_fields()]
    return [*settings, *((field, value) for field, value in given if value is not None)]


def with_overrides(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    return override_all(recipe, overrides_of(options))


def chosen_recipe(options: argparse.Namespace) -> tuple[Recipe, str, bool]:
    """The recipe with its overrides, a remark where neither it nor its data set was named, and whether one is to be
    chosen in its place: the data are no published data set."""
    path, name, resume, remark = data_path(options), options.recipe or options.dataset, options.resume, ""
    if resume == "auto" and not (name or path or options.out):
        raise UserError("--resume auto goes on with a recipe's newest run: name the recipe or --data, or --resume RUN")
    moved = not options.out and Path(resume or "", "recipe.toml").is_file()  # of a run that goes on in its folder
    if resume and resume != "auto" and not name and (moved or not path):
        from equipoise.runs.checkpoint import recipe_of

        return with_overrides(recipe_of(Path(resume)), options), "", False
    from equipoise.data.sources import recognise

    found = recognise(path) if path else ("" if name else "digits")
    fitting = FITTING.get(found, found)
    is_own = bool(path) and not (name or found) and resume in (None, "auto")
    if name is None:
        name = fitting
        remark = f"no recipe named: taking '{name}' (equipoise recipes lists them all)"
    elif found and name != fitting and name in DATASETS.values():
        raise UserError(f"the recipe {name} is not for {path}: take {fitting}, or name another folder")
    return with_overrides(load_recipe(name), options), remark, is_own


def recipe_of_method(options: argparse.Namespace, method: str) -> Recipe:
    """What `chosen_recipe` gives with that method."""
    return chosen_recipe(argparse.Namespace(**{**vars(options), "method": method}))[0]


def seconds(duration: str) -> float:
    """'90s', '30m', '2h' or '1.5h' in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|m|min|h)", duration.strip())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be a time as 30m or 2h, not '{duration}'")
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]


def data_path(options: argparse.Namespace) -> str | None:
    """The data that the command line names, by `--data` or `--set`."""
    return {field.key: value for field, value in overrides_of(options)}.get("data.path")
