"""`equipoise data`, `pack`, `train` and `compare`: their options, and the calls that these become."""

import argparse
import contextlib
import io
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from equipoise.authors.flags import LOG, add_authors_flags, authors_folder
from equipoise.base.errors import UserError, one_line, own_command, several
from equipoise.cli import flags
from equipoise.cli.use import score_checkpoint
from equipoise.config.reading import load_recipe, shipped_recipes
from equipoise.config.recipe import PUBLISHED, Method, Recipe, field_value, find_field, override_all, recipe_fields
from equipoise.config.second_stages import SECOND_STAGES

if TYPE_CHECKING:
    from equipoise.base.world import World
    from equipoise.evaluation.score import Run
    from equipoise.training.plan import Plan
    from equipoise.training.sizing import Choice

_BUDGET = "time limit for own pictures, as 30m or 2h, within which a recipe is chosen"


def add_data_options(command: argparse.ArgumentParser) -> None:
    data = "a data set, as for train: a folder, Parquet, a CIFAR archive, 'digits'; a list file in its folder"
    command.add_argument("data.path", metavar="PATH", help=data)
    check = "decode every image; exit code 1 for bad ones, copies between parts or classes, or what `train` refuses"
    command.add_argument("--check", action="store_true", help=check)
    report = "the same, and a page with the copies, sizes and odd images in pictures"
    command.add_argument("--report", metavar="FILE.html", help=report)
    labels = "the labels that are most probably wrong: in minutes, by a pretrained encoder; they are no failure"
    command.add_argument("--check-labels", action="store_true", help=labels)
    of_data = [field.key for field in recipe_fields() if field.path[0] == "data" and field.key != "data.path"]
    flags.add_fields(command, *of_data)
    flags.add_set(command)


def data(options: argparse.Namespace) -> int:
    """1 where `--check` has found bad images, copies that make figures too good or labels doubtful, or what training
    refuses."""
    flags.refuse_unwritable("--report", options.report, ".html")
    meant = flags.with_overrides(Recipe(), options).data

    from equipoise.cli.tables import print_data, print_doubts
    from equipoise.data.sources import recognise, survey

    path = Path(meant.path)
    if path.is_file() and path.suffix in (".txt", ".lst", ".json"):
        meant = replace(meant, path=str(path.absolute().parent), train_list=str(path))
    found, problems, bad, inspection = survey(meant, options.check or options.report is not None)
    copies = inspection.problems() if inspection else []
    recipe = load_recipe(flags.fitting_recipe(recognise(meant.path)))
    print_data(str(path), found, [*problems, *copies], bad, inspection is not None, recipe)
    doubts = None
    if options.check_labels:
        from equipoise.evaluation.labels import doubtful_labels

        doubts = doubtful_labels({part: images for part, images in found.parts.items() if part not in found.faults})
        print_doubts(doubts)
    if inspection is None:
        return 0
    for what, rows in inspection.odd.items():
        first = inspection.places[rows[0]].name
        print(one_line(f"{several(len(rows), 'image')} {what} (first: {first})"))
    if inspection.too_alike:
        print("many images resemble others so closely that only exact copies could be told from them")
    if options.report:
        from equipoise.report.data_page import write_data_page

        print(f"report: {write_data_page(str(path), found, inspection, Path(options.report), doubts)}")
    pairs = inspection.copies
    return 1 if problems or bad or pairs["parts"] or pairs["labels"] else 0


def add_pack_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data.path", metavar="DATA", help="any data that `train` takes as files of images")
    add("--out", metavar="FOLDER", required=True, help="then: equipoise train --data FOLDER")
    help = "larger images are resized to it, and become JPEG [256: for training at 224 pixels]"
    add("--short-side", type=int, default=256, metavar="PIXELS", help=help)
    add("--workers", type=int, default=-1, help="threads (default: one for each core)")
    flags.add_fields(command, "data.train_list", "data.val_list", "data.test_list")
    flags.add_set(command)


def pack(options: argparse.Namespace) -> None:
    if options.short_side < 8:
        raise UserError(f"--short-side must be at least 8 pixels, not {options.short_side}")
    meant = flags.with_overrides(Recipe(), options).data

    from equipoise.data.packed import pack as write_packed_parts
    from equipoise.data.sources import as_recognised, find_parts
    from equipoise.views.loader import worker_count

    out, workers = Path(os.path.expanduser(options.out)), worker_count(options.workers)
    lines = write_packed_parts(find_parts(as_recognised(meant)), out, options.short_side, workers)
    print("\n".join([*lines, f"train on it: {own_command()} train --data {shlex.quote(str(out))}"]))


def add_train_options(command: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = command.add_argument
    default = f"without one: {flags.DEMO}, or with --data what is recognised there, else one sized to data and machine"
    recipe = f"a shipped recipe ({', '.join(shipped_recipes())}) or a TOML file; {default}"
    add("recipe", nargs="?", metavar="RECIPE", help=recipe)
    add("--out", metavar="FOLDER", help="the run folder [runs/RECIPE-METHOD-TIME]; of --reload, a file for metrics")
    beside = "train this method too, under the same recipe, and show both (the demo: ce)"
    add("--budget", metavar="TIME", type=flags.seconds, help=_BUDGET)
    add("--beside", choices=get_args(Method), help=beside)
    flags.add_set(command)
    add_authors_flags(command)
    flags.add_recipe_flags(command, arguments)


def train(options: argparse.Namespace) -> None:
    if options.out == "":
        raise UserError("--out names no folder")
    for flag, given, part in (("--reload", options.reload, "test"), ("--evaluate", options.evaluate, "validation")):
        if given:
            data = flags.data_path(options)
            if not options.resume:
                raise UserError(f"{flag} scores a checkpoint: name it with --resume CHECKPOINT")
            if (options.recipe or options.dataset) and not data:
                own = "scores on the checkpoint's own data, whatever the recipe"
                raise UserError(f"{flag} {own}; name other data with --data")
            score_checkpoint(Path(options.resume), data, part, flags.overrides_of(options), options.out, None)
            return
    # A process alone refuses bad options before torch is imported.
    chosen = flags.chosen_recipe(options) if "WORLD_SIZE" not in os.environ else None

    from equipoise.base.world import join

    with join() as world, contextlib.redirect_stdout(sys.stdout if world.is_first else io.StringIO()):
        _train(world, options, *(chosen or world.each_makes(lambda: flags.chosen_recipe(options))))


def _choose(options: argparse.Namespace, recipe: Recipe, is_own: bool, ranks: int = 1) -> "Choice":
    """The recipe for these pictures and this machine."""
    from equipoise.training.sizing import choose

    if not is_own:
        raise UserError(f"a recipe is only chosen for own pictures; take {recipe.name}, and set its --epochs")
    if options.budget is not None and getattr(options, "beside", None):
        raise UserError("--budget is that of one run: drop --beside")
    print("looking at the pictures and timing some batches: up to a minute …", flush=True)
    return choose(flags.overrides_of(options), options.budget, options.out, ranks)


def _unfinished(world: "World", options: argparse.Namespace) -> Recipe | None:
    """What `--resume auto`, or torchrun after a failure, goes on with: the recipe that was chosen then, in which all
    is as it is set now."""
    from equipoise.training.place import FREE, differing, newest_run
    from equipoise.training.plan import with_absolute_paths

    def meant(before: Recipe) -> bool:
        return not differing(before, with_absolute_paths(flags.with_overrides(before, options)), FREE)

    out = Path(options.out) if options.out else None
    run = newest_run(meant, out, world if world.restarted else None) if options.resume or world.restarted else None
    return flags.with_overrides(load_recipe(run), options) if run else None


def _train(world: "World", options: argparse.Namespace, recipe: Recipe, remark: str, is_own: bool) -> None:
    choice = None
    if options.budget is not None or is_own:
        before = world.first_makes(lambda: _unfinished(world, options))
        choice = None if before else world.first_makes(lambda: _choose(options, recipe, is_own, world.size))
        recipe, remark = before or (choice and choice.recipe) or recipe, ""
    # The authors' commands name no recipe, and expect the run where their README looks for it.
    authors_style = (remark or options.dataset) and recipe.data.benchmark in ("imagenet-lt", "inat2018")
    root_log = options.root_log or (LOG if authors_style and not options.recipe else None)
    out = options.out or (authors_folder(root_log, recipe) if root_log else None)
    plans = _plans(world, options, recipe, out)
    described = choice.describe() if choice else {}
    runs = [_carry_out(plan, remark if plan is plans[0] else "", described) for plan in plans]
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
    if options.resume == "auto" and not plans[0].place.resumes:
        print("no unfinished run of this recipe was found: a new one begins")
    if beside and beside != recipe.method:
        folder = Path(f"{plans[0].folder.resolve()}-{beside}") if out else None
        of = flags.recipe_of_method(options, beside)
        brought = [(find_field(key), field_value(of, find_field(key))) for key in PUBLISHED.get(beside, {})]
        other = override_all(replace(recipe, method=beside, loss=of.loss), brought)
        plans.append(prepare(other, folder, None, world))
    return plans


def _carry_out(plan: "Plan", remark: str, chosen: Mapping[str, str]) -> "Run":
    """Show the plan, once nothing can be refused any more, and train. `chosen`: what was chosen for it, and why."""
    from equipoise.cli.tables import print_plan
    from equipoise.training.session import start

    with start(plan) as session:
        if remark:
            print(remark)
        print_plan({**session.plan.describe(), **chosen})
        begun = time.monotonic()
        run = session.run()
        if chosen:
            print(f"took {time.monotonic() - begun:,.0f} s")
        return run


def add_retune_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("target", metavar="RUN", help="a run folder (its best checkpoint, or else the last), or a checkpoint")
    stages = (
        "anew with classes drawn alike (crt), label smoothing 0.98 (los) or balanced softmax; a scale for each class, "
        "learned (lws) or a power of its weights' norm, which validation chooses (tau-norm); nearest class mean (ncm)"
    )
    add("--with", dest="stage", choices=tuple(SECOND_STAGES), required=True, help=stages)
    add("--out", metavar="FOLDER", help="the run folder [runs/RECIPE-STAGE-METHOD-TIME]")
    flags.add_set(command)


def retune(options: argparse.Namespace) -> None:
    _refuse_torchrun("retune")
    from equipoise.training.retune import second_stage

    plan = second_stage(Path(options.target), options.stage, options.out, flags.overrides_of(options))
    _show([_carry_out(plan, plan.recipe.summary, {})])


def _refuse_torchrun(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{command} trains in one process: start it without torchrun")


def add_init_options(command: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    command.add_argument("data.path", metavar="FOLDER", help="own pictures, as for train")
    command.add_argument("--budget", metavar="TIME", type=flags.seconds, help=_BUDGET)
    command.add_argument("--out", metavar="FILE.toml", default="recipe.toml", help="the recipe's file [%(default)s]")
    command.set_defaults(recipe=None, dataset=None, resume=None)
    flags.add_set(command)
    flags.add_recipe_flags(command, arguments, without="data.path")


def init(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.exists():
        raise UserError(f"{out} is there already; name another file with --out")
    flags.refuse_unwritable("--out", out, ".toml")
    recipe, _, is_own = flags.chosen_recipe(options)

    from equipoise.base.files import atomic_file
    from equipoise.cli.tables import print_plan
    from equipoise.config.writing import explained_toml

    choice = _choose(options, recipe, is_own)
    with atomic_file(out) as file:
        file.write(explained_toml(choice.recipe, choice.reasons).encode())
    print_plan(choice.describe())
    print(f"written: {out}; then: {own_command()} train {shlex.quote(str(out))}")


def _show(runs: "Sequence[Run]") -> None:
    """The metrics of finished runs side by side, and where the runs are."""
    from equipoise.cli.tables import print_metrics, print_run, print_unreadable

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
        print_run(run.metrics)
        print(f"run folder: {run.path}")
        print_unreadable(run.metrics)


def add_compare_options(command: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = command.add_argument
    add("recipe", metavar="RECIPE", help="a shipped recipe, a TOML file, or a run folder")
    methods = "separated by commas; differences are to the first [%(default)s]"
    add("--methods", default="bcl,ce,logit-adjusted", help=methods)
    add("--seeds", type=int, default=3, help="how many, from --seed on [%(default)s]")
    add("--out", metavar="FOLDER", help="for the run folders; finished runs are kept (default: runs/compare-RECIPE)")
    add("--markdown", action="store_true", help="print what compare.md holds, and all else to stderr")
    command.set_defaults(dataset=None, resume=None)  # options of `train` that it does not have
    flags.add_set(command)
    flags.add_recipe_flags(command, arguments)


def compare(options: argparse.Namespace) -> None:
    _refuse_torchrun("compare")
    if options.method is not None:
        raise UserError("compare trains the methods of --methods; drop --method")
    of_methods = [flags.recipe_of_method(options, method) for method in options.methods.split(",")]
    out = Path(options.out or Path("runs") / f"compare-{of_methods[0].name}")

    from equipoise.report.page import write_report
    from equipoise.training.compare import compare as train_all
    from equipoise.training.compare import markdown

    with contextlib.redirect_stdout(sys.stderr if options.markdown else sys.stdout) as said:
        result = train_all(of_methods, options.seeds, out)
        print()
    print(markdown(result), end="")
    print(f"\nwritten: {out / 'compare.json'}, {out / 'compare.md'}", file=said)
    of_first_seed = [out / name for name in list(result["runs"].values())[: len(result["methods"])]]
    print(f"report: {write_report(of_first_seed, out / 'report.html', result)}", file=said)
