"""Words of `equipoise evaluate`, `compare` and `report` become calls."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from equipoise.base.errors import UserError
from equipoise.cli.deploy import refuse_unwritable
from equipoise.cli.flags import add_field, add_list_flags, add_recipe_flags, add_set, chosen_recipe, overrides_of
from equipoise.config.recipe import Field, Method, find_field


def add_evaluate_words(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "target", metavar="RUN_OR_CHECKPOINT", help="a run folder, a .pt file, or the authors' .pth.tar"
    )
    command.add_argument("--data", help="other data of the same classes (default: the run's own)")
    command.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="the part to score (default: test, or validation where there is no test)",
    )
    add_list_flags(command, ("val", "test"))
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    command.add_argument("--out", metavar="FILE", help="where to write the figures (default: beside the checkpoint)")
    command.add_argument("--logits", metavar="FILE", help="write the logits of every image too, as .npz")
    for key in ("data.on_bad_image", "data.allow_outside"):
        add_field(command, find_field(key))
    add_set(command)


def evaluate(options: argparse.Namespace) -> None:
    target = Path(options.target)
    overrides = overrides_of(options)
    other_data = options.data or options.split or any(field.path[-1].endswith("_list") for field, _ in overrides)
    if not target.is_dir() or other_data or options.out or options.logits or options.set:
        overrides.append((find_field("device"), options.device))
        score_checkpoint(target, options.data, options.split, overrides, options.out, options.logits)
        return

    from equipoise.base.world import join
    from equipoise.cli.tables import print_figures, print_post_hoc, print_unreadable
    from equipoise.evaluation.score import evaluate_run
    from equipoise.runs.folder import METRICS

    with join() as world:
        world.first_makes(lambda: _refuse_read_only(target))
        metrics = evaluate_run(target, device=options.device, world=world, overrides=overrides)
    if not world.is_first:
        return
    results = [
        (f"{part} {checkpoint}", figures)
        for part in ("validation", "test")
        for checkpoint in ("last", "best")
        if (scored := metrics[checkpoint]) and (figures := scored[part])
    ]
    print_figures(results, f"{metrics['method']}: accuracy, percent", metrics)
    print_post_hoc(metrics)
    print_unreadable(metrics)
    print(f"written: {target / METRICS}")


def _refuse_read_only(folder: Path, what: str = "the figures") -> None:
    """Raise UserError where `what` would be written into a folder that takes none: better now than after the work."""
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise UserError(f"{what} cannot be written into {folder}; name a file elsewhere with --out FILE")


def score_checkpoint(
    target: Path,
    data: str | None,
    part: str | None,
    overrides: Sequence[tuple[Field, Any]],
    out: str | None,
    logits: str | None = None,
    shows: bool = False,
) -> None:
    """Score one checkpoint (of a run: the last), show and write its figures. `shows`: they are not written where its
    folder takes no files."""
    from equipoise.base.world import join
    from equipoise.cli.tables import print_figures, print_unreadable
    from equipoise.evaluation.score import evaluate_checkpoint, write_logits
    from equipoise.runs.folder import LAST, find_checkpoint, write_json

    checkpoint = target / LAST if target.is_dir() else find_checkpoint(target)
    refuse_unwritable({"--out": out, "--logits": logits})
    with join() as world:
        if out is None and not shows:
            world.first_makes(lambda: _refuse_read_only(checkpoint.parent))
        metrics, predictions = evaluate_checkpoint(
            checkpoint, data, part, overrides, keep_logits=logits is not None, world=world
        )
    if not world.is_first:
        return
    scored: str = metrics["split"]
    print_figures([(scored, metrics[scored])], f"{metrics['method']}, {checkpoint.name}: accuracy, percent", metrics)
    print_unreadable(metrics)
    if logits is not None:
        write_logits(Path(logits), predictions, metrics["class_names"])
        print(f"written: {logits}")
    of_data = f"-{Path(data).resolve().name}" if data else ""
    stem = checkpoint.name.partition(".pt")[0]
    written = Path(out or checkpoint.with_name(f"metrics-{stem}{of_data}-{scored}.json"))
    if shows and not os.access(written.parent, os.W_OK):
        print(f"not written: {written.parent} takes no files")
        return
    write_json(written, metrics)
    print(f"written: {written}")


def add_compare_words(command: argparse.ArgumentParser, words: list[str]) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a shipped recipe, a TOML file, or a run folder")
    command.add_argument(
        "--methods",
        default=",".join(get_args(Method)),
        help="which, separated by commas; differences are to the first [%(default)s]",
    )
    command.add_argument("--seeds", type=int, default=3, help="how many, from --seed on [%(default)s]")
    command.add_argument(
        "--out",
        metavar="FOLDER",
        help="one run folder a method and seed; what is there is kept (default: runs/compare-RECIPE)",
    )
    command.set_defaults(dataset=None, use_norm=None, cos=None, gpu=None)  # flags of `train` that it does not have
    add_set(command)
    add_recipe_flags(command, words)


def compare(options: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare trains one run after the other in one process: start it without torchrun")
    recipe, _ = chosen_recipe(options)
    if options.method is not None:
        raise UserError("compare trains the methods of --methods; drop --method")
    out = Path(options.out or Path("runs") / f"compare-{recipe.name}")

    from equipoise.training.compare import compare as train_all
    from equipoise.training.compare import markdown

    result = train_all(recipe, options.methods.split(","), options.seeds, out)
    print(f"\n{markdown(result)}")
    print(f"written: {out / 'compare.json'}, {out / 'compare.md'}")

    from equipoise.report.page import write_report

    of_first_seed = [out / name for name in list(result["runs"].values())[: len(result["methods"])]]
    print(f"report: {write_report(of_first_seed, out / 'report.html', result)}")


def add_report_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", nargs="+", help="a run folder; one that stopped early will do")
    command.add_argument(
        "--out", metavar="FILE", help="where to write it (default: report.html in the first run folder)"
    )


def report(options: argparse.Namespace) -> None:
    from equipoise.report.page import write_report

    refuse_unwritable({"--out": options.out})
    runs = [Path(run) for run in options.runs]
    if not options.out:
        _refuse_read_only(runs[0], "the report")
    print(f"report: {write_report(runs, Path(options.out) if options.out else runs[0] / 'report.html')}")
