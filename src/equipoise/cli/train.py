"""`equipoise train`: its options, what they start, and what is shown of it."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from equipoise.authors.flags import LOG, add_authors_flags, authors_folder, truth
from equipoise.base.errors import UserError
from equipoise.cli import flags
from equipoise.cli.score import score_checkpoint
from equipoise.config.recipe import Method, Recipe, shipped_recipes

if TYPE_CHECKING:
    from equipoise.base.world import World
    from equipoise.evaluation.score import Run
    from equipoise.training.plan import Plan


def add_train_options(command: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = command.add_argument
    default = f"without one: {flags.DEMO}, or with --data what is recognised there, else {flags.OWN_FOLDER}"
    recipe = f"a shipped recipe ({', '.join(shipped_recipes())}) or a TOML file; {default}"
    add("recipe", nargs="?", metavar="RECIPE", help=recipe)
    add("--out", metavar="FOLDER", help="the run folder [runs/RECIPE-METHOD-TIME]; of --reload, a file for metrics")
    beside = "train this method too, under the same recipe, and show both (the demo: ce)"
    add("--beside", choices=get_args(Method), help=beside)
    flags.add_set(command)
    add_authors_flags(command)
    flags.add_recipe_flags(command, arguments)


def train(options: argparse.Namespace) -> None:
    if options.out == "":
        raise UserError("--out names no folder")
    reload, evaluate = truth("--reload", options.reload), truth("--evaluate", options.evaluate)
    if reload or evaluate:
        _score_resumed(options, "test" if reload else "validation")
        return
    # A process alone refuses bad options before torch is imported.
    chosen = flags.chosen_recipe(options) if "WORLD_SIZE" not in os.environ else None

    from equipoise.base.world import join

    with join() as world, contextlib.redirect_stdout(sys.stdout if world.is_first else io.StringIO()):
        _train(world, options, *(chosen or world.each_makes(lambda: flags.chosen_recipe(options))))


def _train(world: "World", options: argparse.Namespace, recipe: Recipe, remark: str) -> None:
    # The authors' commands name no recipe, and expect the run where their README looks for it.
    authors_style = (remark or options.dataset) and recipe.data.benchmark in ("imagenet-lt", "inat2018")
    root_log = options.root_log or (LOG if authors_style and not options.recipe else None)
    out = options.out or (authors_folder(root_log, recipe) if root_log else None)
    plans = _plans(world, options, recipe, out)
    runs = [_carry_out(plan, remark if plan is plans[0] else "") for plan in plans]
    if not world.is_first:  # the files are rank 0's
        return
    _show(runs)
    if len(runs) > 1:
        from equipoise.report.page import write_report

        print(f"report: {write_report([run.path for run in runs], runs[0].path / 'report.html')}")


def _plans(world: "World", options: argparse.Namespace, recipe: Recipe, out: str | Path | None) -> "list[Plan]":
    """The plan of the run and, where another method is trained beside it, of that one."""
    demo = not (options.recipe or options.dataset or options.resume) and recipe.data.path == "digits"
    if options.beside and options.resume:
        raise UserError("--resume goes on with one run: drop --beside")
    beside = options.beside or ("ce" if demo else None)

    from equipoise.training.plan import prepare

    plans = [prepare(recipe, out, options.resume, world)]
    if beside and beside != recipe.method:
        folder = Path(f"{plans[0].folder.resolve()}-{beside}") if out else None
        plans.append(prepare(replace(recipe, method=beside), folder, None, world))
    return plans


def _carry_out(plan: "Plan", remark: str) -> "Run":
    """Show the plan, once nothing can be refused any more, and train."""
    from equipoise.cli.tables import print_plan
    from equipoise.training.session import start

    with start(plan) as session:
        if remark:
            print(remark)
        print_plan(session.plan.describe())
        return session.run()


def _show(runs: "Sequence[Run]") -> None:
    """The metrics of finished runs side by side, and where the runs are."""
    from equipoise.cli.tables import print_metrics, print_post_hoc, print_unreadable

    part = "test" if runs[0].metrics["test"] else "validation"
    results: list[tuple[str, Any]] = []
    for run in runs:
        for checkpoint in ("last", "best"):
            scored = run.metrics[checkpoint]
            if scored and scored[part]:
                which = f" {checkpoint}" if run.metrics["best"] else ""
                results.append((run.metrics["method"] + which, scored[part]))
    if results:
        print_metrics(results, f"accuracy on the {part} part, percent", runs[0].metrics)
    for run in runs:
        print_post_hoc(run.metrics)
        print(f"run folder: {run.path}")
        print_unreadable(run.metrics)


def _score_resumed(options: argparse.Namespace, part: str) -> None:
    """`--reload True --resume CHECKPOINT` scores the checkpoint and trains nothing."""
    flag = "--reload" if part == "test" else "--evaluate"
    if not options.resume:
        raise UserError(f"{flag} scores a checkpoint: name it with --resume CHECKPOINT")
    if options.beside:
        raise UserError(f"{flag} trains nothing: drop --beside")
    checkpoint, data = Path(options.resume), flags.data_path(options)
    if (options.recipe or options.dataset) and not data:
        from equipoise.runs.checkpoint import recipe_of

        named, own = flags.chosen_recipe(options)[0].name, recipe_of(checkpoint).name
        if named != own:
            raise UserError(f"{checkpoint} was trained by the recipe {own}, not {named}: name other data with --data")
    score_checkpoint(checkpoint, data, part, flags.overrides_of(options), options.out, None)
