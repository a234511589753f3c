"""`equipoise evaluate`, `compare` and `report`: their options, and the calls that these become."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from equipoise.base.errors import UserError
from equipoise.cli import flags
from equipoise.config.recipe import Method


def add_evaluate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("target", metavar="RUN_OR_CHECKPOINT", help="a run folder, a .pt file, or the authors' .pth.tar")
    add("--data", help="other data of the same classes (default: the run's own)")
    split = "the part to score (default: test, or validation where there is no test)"
    add("--split", choices=("train", "validation", "test"), help=split)
    add("--out", metavar="FILE", help="where to write the metrics (default: beside the checkpoint)")
    add("--logits", metavar="FILE", help="write the logits of every image too, as .npz")
    flags.add_fields(command, "data.val_list", "data.test_list", "data.on_bad_image", "data.allow_outside")
    flags.add_device(command)
    flags.add_set(command)


def evaluate(options: argparse.Namespace) -> None:
    target = Path(options.target)
    overrides = flags.overrides_of(options)
    other_data = options.data or options.split or any(field.path[-1].endswith("_list") for field, _ in overrides)
    if not target.is_dir() or other_data or options.out or options.logits or options.set:
        score_checkpoint(target, options.data, options.split, overrides, options.out, options.logits)
        return

    from equipoise.runs.folder import METRICS

    flags.refuse_unwritable("--out", target / METRICS, ".json")

    from equipoise.base.world import join
    from equipoise.cli.tables import print_metrics, print_post_hoc, print_unreadable
    from equipoise.evaluation.score import evaluate_run

    with join() as world:
        metrics = evaluate_run(target, device=options.device, world=world, overrides=overrides)
    if not world.is_first:
        return
    results = [
        (f"{part} {checkpoint}", figures)
        for part in ("validation", "test")
        for checkpoint in ("last", "best")
        if (scored := metrics[checkpoint]) and (figures := scored[part])
    ]
    print_metrics(results, f"{metrics['method']}: accuracy, percent", metrics)
    print_post_hoc(metrics)
    print_unreadable(metrics)
    print(f"written: {target / METRICS}")


def score_checkpoint(
    target: Path, data: str | None, part: str | None, overrides: flags.Overrides, out: str | None, logits: str | None
) -> None:
    """Score one checkpoint (of a run: the last); show and write its metrics. See `evaluate_checkpoint`."""
    from equipoise.runs.folder import LAST, METRICS, find_checkpoint, write_json

    checkpoint = target / LAST if target.is_dir() else find_checkpoint(target)
    flags.refuse_unwritable("--out", out or checkpoint.with_name(METRICS), ".json")
    flags.refuse_unwritable("--logits", logits, ".npz")

    from equipoise.base.world import join
    from equipoise.cli.tables import print_metrics, print_unreadable
    from equipoise.evaluation.score import evaluate_checkpoint, write_logits

    with join() as world:
        metrics, predictions = evaluate_checkpoint(
            checkpoint, data, part, overrides, keep_logits=logits is not None, world=world
        )
    if not world.is_first:
        return
    scored: str = metrics["split"]
    print_metrics([(scored, metrics[scored])], f"{metrics['method']}, {checkpoint.name}: accuracy, percent", metrics)
    print_unreadable(metrics)
    if metrics["note"]:
        print(f"note: {metrics['note']}")
    if logits is not None:
        write_logits(Path(logits), predictions, metrics["class_names"])
        print(f"written: {logits}")
    of_data = f"-{Path(data).resolve().name}" if data else ""
    stem = checkpoint.name.partition(".pt")[0]
    written = Path(out or checkpoint.with_name(f"metrics-{stem}{of_data}-{scored}.json"))
    write_json(written, metrics)
    print(f"written: {written}")


def add_compare_options(command: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = command.add_argument
    add("recipe", metavar="RECIPE", help="a shipped recipe, a TOML file, or a run folder")
    methods = "separated by commas; differences are to the first [%(default)s]"
    add("--methods", default=",".join(get_args(Method)), help=methods)
    add("--seeds", type=int, default=3, help="how many, from --seed on [%(default)s]")
    add("--out", metavar="FOLDER", help="for the run folders; finished runs are kept (default: runs/compare-RECIPE)")
    # Options of `train` that it does not have.
    command.set_defaults(dataset=None, resume=None, use_norm=None, cos=None, gpu=None)
    flags.add_set(command)
    flags.add_recipe_flags(command, arguments)


def compare(options: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare trains one run after the other in one process: start it without torchrun")
    recipe, _ = flags.chosen_recipe(options)
    if options.method is not None:
        raise UserError("compare trains the methods of --methods; drop --method")
    out = Path(options.out or Path("runs") / f"compare-{recipe.name}")

    from equipoise.report.page import write_report
    from equipoise.training.compare import compare as train_all
    from equipoise.training.compare import markdown

    result = train_all(recipe, options.methods.split(","), options.seeds, out)
    print(f"\n{markdown(result)}")
    print(f"written: {out / 'compare.json'}, {out / 'compare.md'}")
    of_first_seed = [out / name for name in list(result["runs"].values())[: len(result["methods"])]]
    print(f"report: {write_report(of_first_seed, out / 'report.html', result)}")


def add_report_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", nargs="+", help="a run folder; one that stopped early will do")
    command.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run folder)")


def report(options: argparse.Namespace) -> None:
    runs = [Path(run) for run in options.runs]
    out = Path(options.out or runs[0] / "report.html")
    if options.out or runs[0].is_dir():
        flags.refuse_unwritable("--out", out, ".html")

    from equipoise.report.page import write_report

    print(f"report: {write_report(runs, out)}")
