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
from equipoise.config.recipe import Field, Recipe, field_value, find_field, override, override_all, recipe_fields

Overrides = list[tuple[Field, Any]]  # fields of a recipe, and their values as text

DEMO = "digits-lt"
OWN_FOLDER = "frozen"  # where nothing else is chosen: see training/sizing.py
# The recipe for what `sources.recognise` returns, where it has another name.
_RECIPES = {"": OWN_FOLDER, "digits": DEMO, "cifar10": "cifar10-lt", "cifar100": "cifar100-lt"}


def refuse_unwritable(option: str, file: str | Path | None, suffix: str) -> None:
    """Raise UserError where the file of an option cannot be written, or is a file of another kind, named by mistake:
    before the work, not after it."""
    if file is None:
        return
    path = Path(file).resolve()
    if path.is_dir() or not os.access(path.parent, os.W_OK) or (path.exists() and path.suffix != suffix):
        raise UserError(f"{option} must be a new file or a {suffix} file, in a folder that may be written, not {file}")


def add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="set any field of the recipe"
    )


def add_fields(command: argparse.ArgumentParser, *keys: str) -> None:
    """Flags for fields of a recipe."""
    for key in keys:
        _add_field(command, find_field(key))


def add_recipe_flags(command: argparse.ArgumentParser, arguments: Sequence[str], without: str = "") -> None:
    """A flag for every field of a recipe, grouped by section. The help shows the values of the recipe that the command
    line names."""
    default = OWN_FOLDER if "--data" in arguments else DEMO
    named = next((argument for argument in arguments if argument in shipped_recipes()), default)
    shown = load_recipe(named) if {"-h", "--help"} & set(arguments) else Recipe()
    for section, fields in groupby(recipe_fields(), lambda field: field.path[0] if len(field.path) == 2 else "run"):
        group = command.add_argument_group(f"{section} (shown: {named})")
        for field in fields:
            if field.key not in ("name", "summary", without):
                _add_field(group, field, field_value(shown, field))


def _add_field(group: Any, field: Field, default: Any = None) -> None:
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


def overrides_of(options: argparse.Namespace) -> Overrides:
    """Fields set on the command line. Raises UserError where `--set` and a flag set one field to different values."""
    settings: Overrides = []
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set takes SECTION.FIELD=VALUE, not '{text}'")
        settings.append((find_field(key.strip()), value.strip()))
    given = [(field, getattr(options, field.key, None)) for field in recipe_fields()]
    flags = [(field, value) for field, value in given if value is not None]
    for field, value in flags:
        for other, text in settings:
            if other == field and override(Recipe(), field, text) != override(Recipe(), field, value):
                said = " ".join(map(str, value)) if isinstance(value, list) else value
                raise UserError(f"--set {field.key}={text}, but a flag says {said}; drop one of them")
    return [*settings, *flags]


def with_overrides(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    return override_all(recipe, overrides_of(options))


def chosen_recipe(options: argparse.Namespace) -> tuple[Recipe, str, bool]:
    """The recipe with its overrides, a remark where neither it nor its data set was named, and whether one is to be
    chosen in its place: the data are no published data set."""
    of_run = _resumed_recipe(options)
    if of_run:
        return of_run, "", False
    path, name, remark = data_path(options), options.recipe or options.dataset, ""
    if options.dataset not in (None, name):
        raise UserError(f"--dataset means the recipe {options.dataset}, not {name}; drop one of them")

    from equipoise.data.sources import recognise

    found = recognise(path) if path else ("" if name else "digits")
    fitting = fitting_recipe(found)
    is_own = bool(path) and not (name or found) and options.resume in (None, "auto")
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


def fitting_recipe(recognised: str) -> str:
    """The recipe for what `sources.recognise` returns."""
    return _RECIPES.get(recognised, recognised)


def data_path(options: argparse.Namespace) -> str | None:
    """The data that the command line names, by `--data` or `--set`."""
    return {field.key: value for field, value in overrides_of(options)}.get("data.path")


def _resumed_recipe(options: argparse.Namespace) -> Recipe | None:
    """The run's own recipe, for `--resume` without a recipe and without data; with data too if the run goes on in its
    folder, since then the data have moved."""
    named = options.recipe or options.dataset
    if options.resume == "auto" and not (named or data_path(options) or options.out):
        raise UserError("--resume auto goes on with a recipe's newest run: name the recipe or --data, or --resume RUN")
    if not options.resume or options.resume == "auto" or named:
        return None
    moved = not options.out and Path(options.resume, "recipe.toml").is_file()
    if data_path(options) and not moved:
        return None

    from equipoise.runs.checkpoint import recipe_of

    return with_overrides(recipe_of(Path(options.resume)), options)
