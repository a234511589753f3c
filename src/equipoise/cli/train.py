"""`equipoise data`, `pack`, `train`, `retune`, `init` and `compare`."""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from equipoise.authors.flags import LOG, authors_folder
from equipoise.base.errors import UserError, one_line, own_command, quoted, several
from equipoise.base.files import atomic_file
from equipoise.base.progress import say
from equipoise.base.world import World, join
from equipoise.cli import flags
from equipoise.cli.tables import print_data, print_doubts, print_metrics, print_plan, print_run, print_unreadable
from equipoise.cli.use import score_checkpoint
from equipoise.config.reading import explained_toml, load_recipe
from equipoise.config.recipe import Recipe
from equipoise.data.packed import pack as write_packed_parts
from equipoise.data.sources import as_recognised, find_parts, recognise, survey
from equipoise.evaluation import labels
from equipoise.evaluation.score import Run
from equipoise.report.data_page import write_data_page
from equipoise.report.page import write_report
from equipoise.training.compare import compare as train_all
from equipoise.training.compare import markdown
from equipoise.training.plan import FREE, Plan, differing, newest_run, prepare, with_absolute_paths
from equipoise.training.retune import second_stage
from equipoise.training.session import start
from equipoise.training.sizing import Choice, choose
from equipoise.views.loader import worker_count


def data(options: argparse.Namespace) -> int:
    """1 where `--check` has found bad images, copies between parts or classes, or what training refuses."""
    flags.refuse_unwritable("--report", options.report, ".html")
    meant = flags.with_overrides(Recipe(), options).data
    path = Path(meant.path)
    if path.is_file() and path.suffix in (".txt", ".lst", ".json"):
        meant = replace(meant, path=str(path.absolute().parent), train_list=str(path))
    found, problems, bad, inspection = survey(meant, options.check or options.report is not None)
    copies = inspection.problems() if inspection else []
    recognised, doubts = recognise(meant.path), None
    recipe = load_recipe(flags.FITTING.get(recognised, recognised))
    print_data(meant.path, found, [*problems, *copies], bad, inspection is not None, recipe)
    if options.check_labels:
        doubts = labels.doubtful_labels(
            {part: images for part, images in found.parts.items() if part not in found.faults}
        )
        print_doubts(doubts)
    if inspection is None:
        return 0
    for what, rows in inspection.odd.items():
        first = inspection.places[rows[0]].name
        print(one_line(f"{several(len(rows), 'image')} {what} (first: {first})"))
    if inspection.too_alike:
        print("many images resemble others so closely that only exact copies could be told from them")
    if options.report:
        print(f"report: {write_data_page(meant.path, found, inspection, Path(options.report), doubts)}")
    pairs = inspection.copies
    return 1 if problems or bad or pairs["parts"] or pairs["labels"] else 0


def pack(options: argparse.Namespace) -> None:
    if options.short_side < 8:
        raise UserError(f"--short-side must be at least 8 pixels, not {options.short_side}")
    meant = flags.with_overrides(Recipe(), options)
    out, workers = Path(os.path.expanduser(options.out)), worker_count(meant.workers)
    print(write_packed_parts(find_parts(as_recognised(meant.data)), out, options.short_side, workers))
    print(f"train on it: {own_command()} train --data {quoted(out)}")


def train(options: argparse.Namespace) -> None:
    if options.reload or options.evaluate:
        data, part = flags.data_path(options), "test" if options.reload else "validation"
        if not options.resume:
            raise UserError("--reload and --evaluate score a checkpoint: name it with --resume CHECKPOINT")
        if (options.recipe or options.dataset) and not data:
            raise UserError("a checkpoint is scored on its own data, whatever the recipe; name other data with --data")
        score_checkpoint(options, Path(options.resume), data, part)
        return
    with join() as world, contextlib.redirect_stdout(sys.stdout if world.is_first else io.StringIO()):
        _train(world, options, *world.each_makes(lambda: flags.chosen_recipe(options)))


def _choose(options: argparse.Namespace, recipe: Recipe, is_own: bool, ranks: int = 1) -> Choice:
    """The recipe for these pictures and this machine."""
    if not is_own:
        raise UserError(f"a recipe is only chosen for own pictures; take {recipe.name}, and set its --epochs")
    say("looking at the pictures and timing some batches: up to a minute …")
    return choose(flags.overrides_of(options), options.budget, options.out, ranks)


def _sized(world: World, options: argparse.Namespace, recipe: Recipe, is_own: bool) -> tuple[Recipe, dict[str, str]]:
    """The recipe that is chosen, and why. What `--resume auto`, or torchrun after a failure, goes on with has one: it
    was chosen then, and all is in it as it is set now."""

    def meant(before: Recipe) -> bool:
        return not differing(before, with_absolute_paths(flags.with_overrides(before, options)), FREE)

    out = Path(options.out) if options.out else None
    run = newest_run(meant, out, world if world.restarted else None) if options.resume or world.restarted else None
    if run:
        return flags.with_overrides(load_recipe(run), options), {}
    choice = _choose(options, recipe, is_own, world.size)
    return choice.recipe, choice.describe()


def _train(world: World, options: argparse.Namespace, recipe: Recipe, remark: str, is_own: bool) -> None:
    demo = not (options.recipe or options.dataset or options.resume) and recipe.data.path == "digits"
    beside, chosen = options.beside or ("ce" if demo else None), dict[str, str]()
    if options.budget is not None or is_own:
        if world.size > 1 and "://" in recipe.data.path:  # else rank 0 alone would copy all, while the others wait
            world.each_makes(lambda: find_parts(recipe.data))
        recipe, chosen = world.first_makes(lambda: _sized(world, options, recipe, is_own))
        remark = ""
    # The authors' commands name no recipe, and expect the run where their README looks for it.
    authors_style = (remark or options.dataset) and recipe.data.benchmark in ("imagenet-lt", "inat2018")
    root_log = options.root_log or (LOG if authors_style and not options.recipe else None)
    out = options.out or (authors_folder(root_log, recipe) if root_log else None)
    plans = [prepare(recipe, out, options.resume, world)]
    if options.resume == "auto" and not plans[0].place.resumes:
        say("no unfinished run of this recipe was found: a new one begins")
    if beside and beside != recipe.method:
        of = flags.recipe_of_method(options, beside)
        other = replace(recipe, method=of.method, loss=of.loss, views=replace(recipe.views, mix=of.views.mix))
        plans.append(prepare(other, Path(f"{plans[0].folder.resolve()}-{beside}") if out else None, None, world))
    runs = [_carry_out(plan, remark if plan is plans[0] else "", chosen) for plan in plans]
    if not world.is_first:  # the files are rank 0's
        return
    _show(runs)
    if len(runs) > 1:
        print(f"report: {write_report([run.path for run in runs], runs[0].path / 'report.html')}")


def _carry_out(plan: Plan, remark: str, chosen: Mapping[str, str]) -> Run:
    """Show the plan, once nothing can be refused any more, and train. `chosen`: what was chosen for it, and why."""
    with start(plan) as session:
        if remark:
            say(remark)
        print_plan({**session.plan.describe(), **chosen})
        begun = time.monotonic()
        run = session.run()
        if chosen:
            say(f"took {time.monotonic() - begun:,.0f} s")
        return run


def retune(options: argparse.Namespace) -> None:
    _refuse_torchrun("retune")
    plan = second_stage(Path(options.target), options.stage, options.out, flags.overrides_of(options))
    _show([_carry_out(plan, plan.recipe.summary, {})])


def _refuse_torchrun(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{command} trains in one process: start it without torchrun")


def init(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.exists():
        raise UserError(f"{out} is there already; name another file with --out")
    flags.refuse_unwritable("--out", out, ".toml")
    recipe, _, is_own = flags.chosen_recipe(options)
    choice = _choose(options, recipe, is_own)
    with atomic_file(out) as file:
        file.write(explained_toml(choice.recipe, choice.reasons).encode())
    print_plan(choice.describe())
    print(f"written: {out}; then: {own_command()} train {quoted(out)}")


def _show(runs: Sequence[Run]) -> None:
    """The metrics of finished runs side by side, and where the runs are."""
    part = "test" if runs[0].metrics["test"] else "validation"
    results: list[tuple[str, Any]] = [
        (run.metrics["method"] + (f" {checkpoint}" if run.metrics["best"] else ""), scored[part])
        for run, checkpoint in product(runs, ("last", "best"))
        if (scored := run.metrics[checkpoint]) and scored[part]
    ]
    if results:
        print_metrics(results, f"accuracy on the {part} part, percent", runs[0].metrics)
    for run in runs:
        print_run(run.metrics)
        print(f"run folder: {run.path}")
        print_unreadable(run.metrics)


def compare(options: argparse.Namespace) -> None:
    _refuse_torchrun("compare")
    if options.method is not None:
        raise UserError("compare trains the methods of --methods; drop --method")
    of_methods = [flags.recipe_of_method(options, method) for method in options.methods.split(",")]
    out = Path(options.out or Path("runs") / f"compare-{of_methods[0].name}")
    with contextlib.redirect_stdout(sys.stderr if options.markdown else sys.stdout) as said:
        result = train_all(of_methods, options.seeds, out)
        say("")
    print(markdown(result), end="")
    print(f"\nwritten: {out / 'compare.json'}, {out / 'compare.md'}", file=said)
    of_first_seed = [out / name for name in list(result["runs"].values())[: len(result["methods"])]]
    print(f"report: {write_report(of_first_seed, out / 'report.html', result)}", file=said)
