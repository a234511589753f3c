"""Words become calls, and exceptions one clear line.

Nothing heavy is imported before it is needed: `equipoise --help` knows of no torch.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from equipoise import __version__
from equipoise.authors.flags import LOG, add_authors_flags, authors_folder, truth
from equipoise.base.errors import SaidError, SharedError, Stopped, UserError, in_words, one_line, out_of_memory
from equipoise.cli.data import add_data_words, add_pack_words, data, pack
from equipoise.cli.deploy import add_export_words, add_predict_words, export, predict
from equipoise.cli.flags import (
    DEMO,
    OWN_FOLDER,
    add_recipe_flags,
    add_set,
    chosen_recipe,
    overrides_of,
    refuse_swallowed_recipe,
    resumed_recipe,
)
from equipoise.cli.score import (
    add_compare_words,
    add_evaluate_words,
    add_report_words,
    compare,
    evaluate,
    report,
    score_checkpoint,
)
from equipoise.config.recipe import Method, Recipe, load_recipe, nearest, shipped_recipes

if TYPE_CHECKING:
    from equipoise.base.world import World

_DESCRIPTION = """\
Train image classifiers on long-tailed data with Balanced Contrastive Learning (BCL, CVPR 2022).

  equipoise train                          the demo: digits with a long tail, BCL beside plain cross-entropy
  equipoise train --data FOLDER            your own pictures: one sub-folder a class; or ImageNet, iNaturalist 2018,
                                           CIFAR, which are recognised
  equipoise train cifar10-lt --data FOLDER a recipe of the literature
  equipoise predict RUN IMAGES_OR_FOLDER   the classes of images, with probabilities
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words` (default: this process's) and return its exit code: 1 where `data --check` found bad
    images, 2 for what the user must put right, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be no valid text
    _wait_for_run_to_save()
    try:
        return _run(list(sys.argv[1:] if words is None else words))
    except UserError as error:
        once = isinstance(error, SharedError) and os.environ.get("LOCAL_RANK", "0") != "0"
        if not once and not isinstance(error, SaidError):
            print(f"equipoise: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"equipoise: {stopped}", file=sys.stderr)
        return stopped.code
    except BrokenPipeError:  # `equipoise recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # no permission, no space, a file where a folder is needed
        print(f"equipoise: {one_line(in_words(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("equipoise: interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"equipoise: {in_words(error)}", file=sys.stderr)
        return 2


def _wait_for_run_to_save() -> None:
    """SIGUSR1 asks a run to save; before there is one, which takes seconds, it must not end the process."""
    if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _run(words: list[str]) -> int:
    words = [_dashed(word) for word in words]
    parser = _parser(words)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse_unknown(unknown[0], options.parser)
    return options.call(options) or 0


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
    parser.add_argument("--version", action="version", version=f"equipoise {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands, words)
    trained = _add_command(commands, "compare", "train several methods under one recipe and several seeds", compare)
    add_compare_words(trained, words)
    add_evaluate_words(_add_command(commands, "evaluate", "score a run or a checkpoint", evaluate))
    add_report_words(_add_command(commands, "report", "write runs as one HTML page, side by side", report))
    _add_command(commands, "recipes", "the recipes that come with the package", _recipes)
    add_data_words(_add_command(commands, "data", "what lies in a folder: classes, counts, problems", data))
    add_pack_words(_add_command(commands, "pack", "re-encode images once, smaller, into one file a part", pack))
    add_predict_words(_add_command(commands, "predict", "name the classes of images", predict))
    add_export_words(_add_command(commands, "export", "write a run in another layout", export))
    return parser


def _add_command(
    commands: Any, name: str, summary: str, call: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(call=call, parser=command)
    return command


# ---------------------------------------------------------------------------------------------- train


def _add_train(commands: Any, words: list[str]) -> None:
    command = _add_command(commands, "train", "train a classifier from a recipe", _train)
    command.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help=f"a shipped recipe ({', '.join(shipped_recipes())}) or a TOML file; "
        f"without one: {DEMO}, or where --data names a folder, what is recognised there, else {OWN_FOLDER}",
    )
    command.add_argument("--out", metavar="FOLDER", help="the run folder (default: runs/RECIPE-METHOD-TIME)")
    command.add_argument(
        "--beside",
        choices=get_args(Method),
        help="train this method too, under the same recipe, and show both (the demo: ce)",
    )
    add_set(command)
    add_authors_flags(command)
    add_recipe_flags(command, words)


def _train(options: argparse.Namespace) -> None:
    if options.out == "":
        raise UserError("--out names no folder")
    refuse_swallowed_recipe(options)
    reload, evaluate = truth("--reload", options.reload), truth("--evaluate", options.evaluate)
    if reload or evaluate:
        _score_resumed(options, "test" if reload else "validation")
        return
    # Of one process alone, words are refused before torch is imported.
    chosen = _recipe_of_run(options) if "WORLD_SIZE" not in os.environ else None

    from equipoise.base.world import join

    with join() as world, _silent_unless(world.is_first):
        _train_in(world, options, *(chosen or world.each_makes(lambda: _recipe_of_run(options))))


def _recipe_of_run(options: argparse.Namespace) -> tuple[Recipe, str, bool]:
    """The recipe, a remark where it was not named, and whether it is that of the run that goes on."""
    of_run = resumed_recipe(options)
    return (of_run, "", True) if of_run else (*chosen_recipe(options), False)


@contextlib.contextmanager
def _silent_unless(speaks: bool) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        if not speaks:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def _train_in(world: "World", options: argparse.Namespace, recipe: Recipe, remark: str, of_run: bool) -> None:
    demo = not (options.recipe or options.dataset or options.resume) and recipe.data.path == "digits"
    if options.beside and options.resume:
        raise UserError("--resume goes on with one run: drop --beside")
    beside = options.beside or ("ce" if demo else None)
    if beside == recipe.method:
        beside = None
    # The seed's commands name no recipe and expect their run where the authors' README looks for it.
    unnamed = not (options.recipe or of_run)
    authors_style = unnamed and recipe.data.benchmark in ("imagenet-lt", "inat2018")
    root_log = options.root_log or (LOG if authors_style else None)
    out = options.out or (authors_folder(root_log, recipe) if root_log else None)

    from equipoise.base.files import real_path
    from equipoise.cli.tables import print_figures, print_plan, print_post_hoc, print_unreadable
    from equipoise.runs.folder import AUTHORS_NAMES
    from equipoise.training.plan import prepare
    from equipoise.training.session import start

    plans = [prepare(recipe, out, options.resume, world)]
    if beside:
        folder = plans[0].folder
        other = replace(recipe, method=beside)
        plans.append(prepare(other, Path(f"{real_path(folder)}-{beside}") if out else None, None, world))
    stale: list[Path] = []
    runs: list[Any] = []
    for plan in plans:
        with start(plan) as session:
            if remark and plan is plans[0]:
                print(remark)
            print_plan(session.plan.describe())
            if world.is_first:
                for name in AUTHORS_NAMES.values():  # of the run as it was; written anew when it ends
                    if (session.plan.folder / name).exists():
                        (session.plan.folder / name).unlink()
                        stale.append(session.plan.folder / name)
            runs.append(session.run())
    if not world.is_first:  # the files are rank 0's
        return
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
        print_post_hoc(run.metrics)
    for run in runs:
        print(f"run folder: {run.path}")
    for run in runs:
        print_unreadable(run.metrics)
    if stale or (root_log and not options.out):
        _export_for_authors(runs[0].path)
    if beside:
        from equipoise.report.page import write_report

        print(f"report: {write_report([run.path for run in runs], runs[0].path / 'report.html')}")


def _export_for_authors(run: Path) -> None:
    """The run's checkpoints under the authors' names and in their layout, where a run can be written so."""
    from equipoise.runs.checkpoint import export_to_authors
    from equipoise.runs.folder import AUTHORS_NAMES

    for ours, theirs in AUTHORS_NAMES.items():
        if (run / ours).is_file():
            try:
                export_to_authors(run / ours, run / theirs)
            except UserError as error:  # a method or an encoder that their model does not have
                print(f"not written in the authors' layout: {error}")
                return
            print(f"written: {run / theirs}")


def _score_resumed(options: argparse.Namespace, part: str) -> None:
    """`--reload True --resume CHECKPOINT`: score it, train nothing."""
    flag = "--reload" if part == "test" else "--evaluate"
    if not options.resume:
        raise UserError(f"{flag} scores a checkpoint: name it with --resume CHECKPOINT")
    if options.beside or options.out:
        raise UserError(f"{flag} trains nothing: drop {'--beside' if options.beside else '--out'}")
    overrides = overrides_of(options)
    data = {field.key: value for field, value in overrides}.get("data.path")
    if data or options.recipe or options.dataset:
        _refuse_other_data(Path(options.resume), data, chosen_recipe(options)[0])
    score_checkpoint(Path(options.resume), data, part, overrides, None, shows=True)


def _refuse_other_data(checkpoint: Path, data: str | None, named: Recipe) -> None:
    """Raise UserError where a recipe is named without data and the checkpoint, which would be scored on its own, has
    another one."""
    from equipoise.runs.checkpoint import recipe_of

    own = named.name if data else recipe_of(checkpoint).name
    if own != named.name:
        raise UserError(
            f"{checkpoint} was trained by the recipe {own}, not {named.name}: name other data to score it on with "
            "--data FOLDER"
        )


def _recipes(_: argparse.Namespace) -> None:
    for name in shipped_recipes():
        print(f"{name:<12}  {load_recipe(name).summary}")


if __name__ == "__main__":
    raise SystemExit(main())
