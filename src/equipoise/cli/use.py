"""`equipoise evaluate`, `report`, `predict` and `export`."""

import argparse
import contextlib
import os
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from equipoise.base import progress as shown
from equipoise.base.errors import UserError, reason, several
from equipoise.base.files import atomic_file
from equipoise.base.world import join
from equipoise.cli import flags, tables
from equipoise.cli.options import ENDINGS
from equipoise.data.lists import text_lines
from equipoise.deploy.export import export_file
from equipoise.deploy.hub import write_hub_folder
from equipoise.deploy.predict import Predicted, as_csv, as_json, load
from equipoise.evaluation.predictions import to_npz
from equipoise.evaluation.score import evaluate_checkpoint, evaluate_run
from equipoise.report.page import write_report
from equipoise.runs.checkpoint import described
from equipoise.runs.folder import METRICS, chosen_checkpoint, write_json

_PASSED_OVER_SHOWN = 20


def evaluate(options: argparse.Namespace) -> None:
    target, overrides = Path(options.target), flags.overrides_of(options)
    other_data = options.data or options.split or any(field.path[-1].endswith("_list") for field, _ in overrides)
    other_figures = options.logits or options.label_shift or options.none_of_these
    if not target.is_dir() or other_data or options.out or options.set or other_figures:
        score_checkpoint(options, target, options.data, options.split)
        return
    flags.refuse_unwritable("--out", target / METRICS, ".json")
    with join() as world:
        metrics = evaluate_run(target, device=options.device or "auto", world=world, overrides=overrides)
    if not world.is_first:
        return
    results = [
        (f"{part} {checkpoint}", figures)
        for part, checkpoint in product(("validation", "test"), ("last", "best"))
        if (scored := metrics[checkpoint]) and (figures := scored[part])
    ]
    if results:
        tables.print_metrics(results, f"{metrics['method']}: accuracy, percent", metrics)
        tables.print_calibration(*results[-1])
    tables.print_run(metrics)
    tables.print_post_hoc(metrics)
    tables.print_unreadable(metrics)
    print(f"written: {target / METRICS}")


def score_checkpoint(options: argparse.Namespace, target: Path, data: str | None, part: str | None) -> None:
    """Score one checkpoint (of a run: the chosen one); show and write its metrics. See `evaluate_checkpoint`."""
    overrides, logits, shifted = flags.overrides_of(options), options.logits, options.label_shift
    checkpoint = chosen_checkpoint(target)
    flags.refuse_unwritable("--out", options.out or checkpoint.with_name(METRICS), ".json")
    flags.refuse_unwritable("--logits", logits, ".npz")
    further = bool(logits), shifted, options.none_of_these
    with join() as world:
        metrics, predictions = evaluate_checkpoint(checkpoint, data, part, overrides, *further, world)
    if not world.is_first:
        return
    scored: str = metrics["split"]
    title = f"{metrics['method']}, {checkpoint.name}, {metrics['checkpoint']}: accuracy, percent"
    tables.print_metrics([(scored, metrics[scored])], title, metrics)
    tables.print_calibration(scored, metrics[scored])
    tables.print_unreadable(metrics)
    if shifted:
        tables.print_label_shift(metrics["label_shift"])
    if "none_of_these" in metrics:
        tables.print_none_of_these(scored, metrics["none_of_these"])
    if metrics["note"]:
        print(f"note: {metrics['note']}")
    if logits:
        arrays = {"logits": predictions.logits_NC, "labels": predictions.labels_N}
        to_npz(Path(logits), {**arrays, "class_names": metrics["class_names"]})
        print(f"written: {logits}")
    of_data = f"-{Path(data).resolve().name}" if data else ""
    stem = checkpoint.name.partition(".pt")[0]
    written = Path(options.out or checkpoint.with_name(f"metrics-{stem}{of_data}-{scored}.json"))
    write_json(written, metrics)
    print(f"written: {written}")


def report(options: argparse.Namespace) -> None:
    runs = [Path(run) for run in options.runs]
    out = Path(options.out or runs[0] / "report.html")
    if options.out or runs[0].is_dir():
        flags.refuse_unwritable("--out", out, ".html")
    print(f"report: {write_report(runs, out)}")


def predict(options: argparse.Namespace) -> int:
    """1 where files were passed over."""
    for option, number in ("--top", options.top), ("--explain", options.explain):
        if number is not None and number < 1:
            raise UserError(f"{option} must be at least 1, not {number}")
    flags.refuse_unwritable("--csv", options.csv, ".csv")
    flags.refuse_unwritable("--json", options.json, ".json")
    paths = [*options.paths, *(_listed(options.list) if options.list else ())]
    if not paths:
        raise UserError("no images are named: name files, folders, or a list of them with --list FILE")
    classifier = load(options.target, options.device or "auto", options.recipe)
    if options.explain:
        with contextlib.redirect_stdout(sys.stderr):  # it may take minutes, and shows its own progress
            _ = classifier.train
    unseen = shown.quiet or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=unseen) as progress:
        task = progress.add_task("predicting", total=None)

        def show(done: int, files: int) -> None:
            progress.update(task, completed=done, total=files)

        predicted = classifier.predict(paths, options.top, options.prior, show, options.explain or 0)
    _say_passed_over(predicted)
    written = options.csv or options.json
    if written:
        content = as_csv(predicted) if options.csv else as_json(predicted, classifier, options.prior)
        with contextlib.nullcontext(sys.stdout.buffer) if written == "-" else atomic_file(Path(written)) as file:
            file.write(content)
        print("" if written == "-" else f"written: {written}\n", end="", flush=True)
    else:
        tables.print_predictions(predicted)
    said = sys.stderr if written == "-" else sys.stdout
    print(f"{classifier.origin}, {described(classifier.origin, classifier.checkpoint)}", file=said)
    print(f"class prior: {options.prior}; {classifier.calibration}", file=said)
    if predicted.estimated:
        print(tables.largest_changes(predicted.estimated, classifier.checkpoint.class_counts), file=said)
    told = f"{several(sum(map(bool, predicted.strange)), 'image')}, by the likeness to the classes"
    print(f"none of these: {told if classifier.known else 'this model cannot tell'}", file=said)
    passed_over = f", {len(predicted.errors):,} passed over" if predicted.errors else ""
    print(f"{several(len(predicted), 'image')} predicted{passed_over}", file=said)
    return 1 if predicted.errors else 0


def _listed(file: str) -> list[str]:
    """The paths in a list, one a line."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"--list {file} cannot be read ({reason(error)}); name a file with one path a line") from None
    paths = [os.fsdecode(line) for line in (line.rstrip(b"\r\n") for line in text_lines(content)) if line]
    if not paths:
        raise UserError(f"--list {file} is empty; it should have one path a line")
    return paths


def _say_passed_over(predicted: Predicted) -> None:
    """Name the first files that could not be read. Raises UserError where no other was."""
    errors = predicted.errors
    for error in errors[:_PASSED_OVER_SHOWN]:
        print(f"passed over: {error}", file=sys.stderr)
    if len(errors) > _PASSED_OVER_SHOWN:
        print(f"and {len(errors) - _PASSED_OVER_SHOWN:,} more", file=sys.stderr)
    if not len(predicted):
        raise UserError(f"nothing was predicted: {several(len(errors), 'file')} passed over")


def serve(options: argparse.Namespace) -> None:
    if not (find_spec("fastapi") and find_spec("uvicorn")):
        raise UserError("serve needs FastAPI and uvicorn: pip install fastapi uvicorn")
    if options.explain < 0:
        raise UserError(f"--explain must be at least 0, not {options.explain}")
    from equipoise.deploy import serve

    with serve.listen(options.port) as opened:  # before the model is read: a port may be taken
        classifier = load(options.target, options.device or "auto", options.recipe)
        print(f"{classifier.origin}, {described(classifier.origin, classifier.checkpoint)}")
        serve.serve(classifier, options.explain, opened)


def export(options: argparse.Namespace) -> None:
    form, classifier = options.to, load(options.target, "cpu")
    print(f"{classifier.origin}, {described(classifier.origin, classifier.checkpoint)}")
    origin = classifier.origin.resolve()
    out = Path(options.out or origin.with_name(origin.name.partition(".pt")[0] + ENDINGS[form]))
    if form == "safetensors":
        write_hub_folder(out, classifier.checkpoint, classifier.temperature, classifier.metrics, classifier.known)
    else:
        flags.refuse_unwritable("--out", out, ENDINGS[form])
        print(export_file(classifier, form, out))
    print(f"written: {out}")
