"""Words become calls, and exceptions one clear line.

Nothing heavy is imported before it is needed: `equipoise --help` knows of no torch. Recipe fields are flags under
their own names; their checks, and so the messages, are the recipe's.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from equipoise.errors import UserError
from equipoise.recipe import (
    Field,
    Method,
    Recipe,
    field_value,
    find_field,
    load_recipe,
    nearest,
    override,
    recipe_fields,
    shipped_recipes,
)

_DEMO = "digits-lt"
_OWN_FOLDER = "pictures"

_DESCRIPTION = """\
Train image classifiers on long-tailed data with Balanced Contrastive Learning (BCL, CVPR 2022).

  equipoise train                          the demo: digits with a long tail, BCL beside plain cross-entropy
  equipoise train --data FOLDER            your own pictures: one sub-folder a class
  equipoise train cifar10-lt --data FOLDER a recipe of the literature
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words` (default: this process's) and return its exit code: 2 for what the user must put
    right, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be no valid text
    try:
        return _run(list(sys.argv[1:] if words is None else words))
    except UserError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `equipoise recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # no permission, no space, a file where a folder is needed
        where = f": {error.filename}" if error.filename else ""
        print(f"equipoise: {(error.strerror or str(error)).lower()}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("equipoise: interrupted", file=sys.stderr)
        return 130


def _run(words: list[str]) -> int:
    words = [_dashed(word) for word in words]
    parser = _parser(words)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse_unknown(unknown[0], options.parser)
    options.call(options)
    return 0


def _dashed(word: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: the authors' spelling of flags is as good."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _refuse_unknown(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    if not word.startswith("-"):
        raise UserError(f"'{word}' is one word too many (see {parser.prog} --help)")
    flag = word.partition("=")[0]
    valid = [option for option in parser._option_string_actions if option.startswith("--")]  # pyright: ignore[reportPrivateUsage]
    raise UserError(f"no option is called {flag}{nearest(flag, valid)} (see {parser.prog} --help)")


def _parser(words: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        "equipoise",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"equipoise {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands, words)
    _add_evaluate(commands)
    _add_command(commands, "recipes", "the recipes that come with the package", _recipes)
    data = _add_command(commands, "data", "what lies in a folder: classes, counts, problems", _data)
    data.add_argument("path", metavar="PATH", help="folder of class folders, Parquet file or folder, or 'digits'")
    _add_set(data)
    return parser


def _version() -> str:
    from importlib.metadata import version

    return version("equipoise")


def _add_command(
    commands: Any, name: str, summary: str, call: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(call=call, parser=command)
    return command


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="set any field of the recipe",
    )


# ---------------------------------------------------------------------------------------------- train


def _add_train(commands: Any, words: list[str]) -> None:
    command = _add_command(commands, "train", "train a classifier from a recipe", _train)
    command.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help=f"a shipped recipe ({', '.join(shipped_recipes())}) or a TOML file; "
        f"without one: {_DEMO}, or {_OWN_FOLDER} where --data names a folder",
    )
    command.add_argument("--out", metavar="FOLDER", help="the run folder (default: runs/RECIPE-METHOD-TIME)")
    command.add_argument(
        "--beside",
        choices=get_args(Method),
        help="train this method too, under the same recipe, and show both (the demo: ce)",
    )
    _add_set(command)
    # Defaults are shown as the recipe on the command line has them.
    default = _OWN_FOLDER if "--data" in words else _DEMO
    named = next((word for word in words if word in shipped_recipes()), default)
    shown = load_recipe(named) if {"-h", "--help"} & set(words) else Recipe()
    groups: dict[str, Any] = {}
    for field in recipe_fields():
        if field.key in ("name", "summary"):
            continue
        section = field.path[0] if len(field.path) == 2 else "run"
        if section not in groups:
            groups[section] = command.add_argument_group(f"{section} (shown: {named})")
        _add_field(groups[section], field, field_value(shown, field))


def _add_field(group: Any, field: Field, default: Any) -> None:
    flags = [f"-{name}" if len(name) == 1 else f"--{name}" for name in field.names]
    arguments: dict[str, Any] = {"metavar": field.path[-1].upper()}
    if get_origin(field.type) is Literal:
        arguments["metavar"] = "|".join(get_args(field.type))
    elif field.type is bool:
        arguments |= {"metavar": "true|false", "nargs": "?", "const": "true"}
    elif get_origin(field.type) is tuple:
        arguments["nargs"] = "+"
        default = " ".join(f"{number:g}" for number in default)
    text = f"{field.setting.help} [{default}]".replace("%", "%%")
    group.add_argument(*flags, dest=field.key, default=None, help=text, **arguments)


def _overrides(options: argparse.Namespace) -> list[tuple[Field, Any]]:
    """Fields set on the command line: those of `--set` first, so that a flag wins."""
    settings: list[tuple[Field, Any]] = []
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set takes SECTION.FIELD=VALUE, not '{text}'")
        settings.append((find_field(key.strip()), value.strip()))
    for field in recipe_fields():
        value = getattr(options, field.key, None)
        if value is not None:
            settings.append((field, value))
    return settings


def _chosen_recipe(options: argparse.Namespace) -> tuple[Recipe, str]:
    """The recipe with its overrides, and a remark where it was not named."""
    overrides = _overrides(options)
    data = {field.key: value for field, value in overrides}.get("data.path", "digits")
    name, remark = options.recipe, ""
    if name is None:
        name = _DEMO if data == "digits" else _OWN_FOLDER
        remark = f"no recipe named: taking '{name}' (equipoise recipes lists them all)"
    recipe = load_recipe(name)
    for field, value in overrides:
        recipe = override(recipe, field, value)
    return recipe, remark


def _train(options: argparse.Namespace) -> None:
    if options.out == "":
        raise UserError("--out names no folder")
    recipe, remark = _chosen_recipe(options)
    demo = options.recipe is None and recipe.data.path == "digits"
    beside = options.beside or ("ce" if demo else None)
    if beside == recipe.method:
        beside = None

    from equipoise.tables import print_figures, print_plan
    from equipoise.training import fit, prepare

    plans = [prepare(recipe, options.out)]
    if beside:
        folder = plans[0].folder
        plans.append(
            prepare(
                replace(recipe, method=beside),
                Path(f"{folder.resolve()}-{beside}") if options.out else None,
            )
        )
    if remark:
        print(remark)
    runs: list[Any] = []
    for plan in plans:
        print_plan(plan.describe())
        runs.append(fit(plan))
    part = "test" if runs[0].metrics["test"] else "validation"
    results: list[tuple[str, Any]] = []
    for run in runs:
        for checkpoint in ("last", "best"):
            if run.metrics[checkpoint] and run.metrics[checkpoint][part]:
                heading = run.metrics["method"] + (f" {checkpoint}" if run.metrics["best"] else "")
                results.append((heading, run.metrics[checkpoint][part]))
    if results:
        print_figures(results, f"accuracy on the {part} part, percent", runs[0].metrics)
    for run in runs:
        print(f"run folder: {run.path}")


# ---------------------------------------------------------------------------------------------- the others


def _add_evaluate(commands: Any) -> None:
    command = _add_command(commands, "evaluate", "score a run or a checkpoint", _evaluate)
    command.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a .pt file")
    command.add_argument("--data", help="other data of the same classes (default: the run's own)")
    command.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="the part to score (default: test, or validation where there is no test)",
    )
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    command.add_argument("--out", metavar="FILE", help="where to write the figures (default: beside the checkpoint)")


def _evaluate(options: argparse.Namespace) -> None:
    target = Path(options.target)
    if not target.exists():
        raise UserError(f"there is no run folder or checkpoint at {target}")

    from equipoise.run import LAST, METRICS, evaluate_checkpoint, evaluate_run, write_json
    from equipoise.tables import print_figures

    if target.is_dir() and not (options.data or options.split or options.out):
        metrics = evaluate_run(target, device=options.device)
        results = [
            (f"{part} {checkpoint}", metrics[checkpoint][part])
            for part in ("validation", "test")
            for checkpoint in ("last", "best")
            if metrics[checkpoint] and metrics[checkpoint][part]
        ]
        written = target / METRICS
    else:
        checkpoint = target / LAST if target.is_dir() else target
        metrics = evaluate_checkpoint(checkpoint, options.data, options.split, options.device)
        part = metrics["split"]
        results = [(part, metrics[part])]
        of_data = f"-{Path(options.data).resolve().name}" if options.data else ""
        written = Path(options.out or checkpoint.with_name(f"metrics-{checkpoint.stem}{of_data}-{part}.json"))
        if not written.parent.is_dir() or written.is_dir():
            raise UserError(f"--out must be a file in a folder that is there, not {written}")
        write_json(written, metrics)
    print_figures(results, f"{metrics['method']}: accuracy, percent", metrics)
    print(f"written: {written}")


def _recipes(_: argparse.Namespace) -> None:
    for name in shipped_recipes():
        print(f"{name:<12}  {load_recipe(name).summary}")


def _data(options: argparse.Namespace) -> None:
    recipe = Recipe()
    for field, value in _overrides(options):
        recipe = override(recipe, field, value)

    from equipoise.lists import find_parts, training_problems
    from equipoise.pixels import unreadable
    from equipoise.tables import print_data

    found = find_parts(options.path, recipe.data.image_column, recipe.data.label_column)
    problems = list(found.notes)
    if "train" in found.parts:
        problems += training_problems(found.parts["train"])
    for part in found.parts.values():
        problems += [str(error) for error in unreadable(part)]
    print_data(options.path, found, problems)


if __name__ == "__main__":
    raise SystemExit(main())
