"""`equipoise evaluate`, `report`, `predict` and `export`: their options, and the calls that these become."""

import argparse
import sys
from pathlib import Path

from equipoise.base.errors import UserError, several
from equipoise.cli import flags

_FORMS = (
    "onnx: one file for ONNX Runtime and the like; safetensors: a folder for a model hub, which equipoise.load() opens "
    "and whose encoder timm loads; torch-export: one file for torch.export.load"
)
_ENDINGS = {"onnx": ".onnx", "safetensors": "-safetensors", "torch-export": ".pt2"}
_TARGET = "a run folder (its best checkpoint, or else its last), a checkpoint, or a folder from --to safetensors"
_PASSED_OVER_SHOWN = 20


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
    target, overrides = Path(options.target), flags.overrides_of(options)
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
        metrics = evaluate_run(target, device=options.device or "auto", world=world, overrides=overrides)
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
        metrics, predictions = evaluate_checkpoint(checkpoint, data, part, overrides, bool(logits), world)
    if not world.is_first:
        return
    scored: str = metrics["split"]
    print_metrics([(scored, metrics[scored])], f"{metrics['method']}, {checkpoint.name}: accuracy, percent", metrics)
    print_unreadable(metrics)
    if metrics["note"]:
        print(f"note: {metrics['note']}")
    if logits:
        write_logits(Path(logits), predictions, metrics["class_names"])
        print(f"written: {logits}")
    of_data = f"-{Path(data).resolve().name}" if data else ""
    stem = checkpoint.name.partition(".pt")[0]
    written = Path(out or checkpoint.with_name(f"metrics-{stem}{of_data}-{scored}.json"))
    write_json(written, metrics)
    print(f"written: {written}")


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


def add_predict_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("target", metavar="RUN", help=_TARGET)
    add("paths", metavar="IMAGES_OR_FOLDER", nargs="+", help="image files, and folders of them")
    add("--top", type=int, default=5, metavar="K", help="classes an image, the most probable first [5]")
    written = command.add_mutually_exclusive_group()
    written.add_argument("--csv", metavar="FILE", help="write a line an image instead of showing a table")
    written.add_argument("--json", metavar="FILE", help="the same as JSON, with the files that were passed over")
    prior = "class frequencies where the model is used: equal, as in training, or a CSV file of classes and weights"
    add("--prior", default="uniform", metavar="uniform|train|FILE", help=f"{prior} [uniform]")
    recipe = "whose views a checkpoint of the BCL authors' was trained with [imagenet-lt]"
    add("--recipe", default="imagenet-lt", metavar="RECIPE", help=recipe)
    flags.add_device(command)


def predict(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise UserError(f"--top must be at least 1, not {options.top}")
    flags.refuse_unwritable("--csv", options.csv, ".csv")
    flags.refuse_unwritable("--json", options.json, ".json")

    from rich.console import Console
    from rich.progress import Progress

    from equipoise.cli.tables import print_predictions
    from equipoise.deploy.predict import load, predictions_table, write_csv
    from equipoise.runs.folder import write_json

    classifier = load(options.target, options.device or "auto", options.recipe)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("predicting", total=None)

        def show(done: int, files: int) -> None:
            progress.update(task, completed=done, total=files)

        predicted = classifier.predict(options.paths, options.top, options.prior, show)
    errors = predicted.errors
    for error in errors[:_PASSED_OVER_SHOWN]:
        print(f"passed over: {error}", file=sys.stderr)
    if len(errors) > _PASSED_OVER_SHOWN:
        print(f"and {len(errors) - _PASSED_OVER_SHOWN:,} more", file=sys.stderr)
    if not len(predicted):
        raise UserError(f"nothing was predicted: {several(len(errors), 'file')} passed over")
    if options.csv:
        write_csv(Path(options.csv), predicted)
    elif options.json:
        write_json(Path(options.json), predictions_table(predicted, classifier, options.prior))
    else:
        print_predictions(predicted)
    if options.csv or options.json:
        print(f"written: {options.csv or options.json}")
    heat, epoch = classifier.temperature, classifier.checkpoint.epoch
    calibration = f"calibrated (temperature {heat:.3g})" if heat else "not calibrated: no temperature was fitted"
    print(f"{classifier.origin}, epoch {epoch}; class prior: {options.prior}; {calibration}")
    print(f"{several(len(predicted), 'image')} predicted" + (f", {len(errors):,} passed over" if errors else ""))


def add_export_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("target", metavar="RUN_OR_CHECKPOINT", help=_TARGET)
    add("--to", choices=tuple(_ENDINGS), required=True, help=_FORMS)
    add("--out", metavar="FILE", help="what to write (default: beside the checkpoint)")
    images = "onnx, torch-export: images to check the file with (default: 16 of the run's own)"
    add("--images", nargs="+", default=[], metavar="IMAGES_OR_FOLDER", help=images)


def export(options: argparse.Namespace) -> None:
    from equipoise.deploy.export import export_file
    from equipoise.deploy.hub import write_hub_folder
    from equipoise.deploy.predict import load

    form = options.to
    if options.images and form == "safetensors":
        raise UserError("--images goes with --to onnx or torch-export")
    classifier = load(options.target, "cpu")
    origin = classifier.origin.resolve()
    out = Path(options.out or origin.with_name(origin.name.partition(".pt")[0] + _ENDINGS[form]))
    if form == "safetensors":
        write_hub_folder(out, classifier.checkpoint, classifier.temperature, classifier.metrics)
    else:
        flags.refuse_unwritable("--out", out, _ENDINGS[form])
        print(export_file(classifier, form, out, options.images))
    print(f"written: {out}")
