"""`equipoise predict` and `equipoise export`: their options, and the calls that these become."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.base.errors import UserError, several
from equipoise.cli import flags

if TYPE_CHECKING:
    from equipoise.deploy.predict import Classifier

_FORMS = {
    "onnx": "one file for ONNX Runtime and the like",
    "safetensors": "a folder for a model hub, which equipoise.load() opens and whose encoder timm loads",
    "torch-export": "one file for torch.export.load",
}
_ENDINGS = {"onnx": ".onnx", "safetensors": "-safetensors", "torch-export": ".pt2"}
_TARGET = "a run folder (its best checkpoint, or else its last), a checkpoint, or a folder from --to safetensors"


def add_predict_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("target", metavar="RUN", help=_TARGET)
    add("paths", metavar="IMAGES_OR_FOLDER", nargs="+", help="image files, and folders of them")
    add("--top", type=int, default=5, metavar="K", help="classes an image, the most probable first [5]")
    written = command.add_mutually_exclusive_group()
    written.add_argument("--csv", metavar="FILE", help="write a line an image instead of showing a table")
    written.add_argument("--json", metavar="FILE", help="the same as JSON, with the files that were passed over")
    prior = "class frequencies where the model is used: equal, as in training, or weights of classes in CSV or JSON"
    add("--prior", default="uniform", metavar="uniform|train|FILE", help=f"{prior} [uniform]")
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

    classifier = load(options.target, options.device)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("predicting", total=None)

        def show(done: int, files: int) -> None:
            progress.update(task, completed=done, total=files)

        predicted = classifier.predict(options.paths, options.top, options.prior, show)
    for error in predicted.errors:
        print(f"passed over: {error}", file=sys.stderr)
    if not len(predicted):
        raise UserError("nothing was predicted: no image could be read")
    if options.csv:
        write_csv(Path(options.csv), predicted)
    elif options.json:
        write_json(Path(options.json), predictions_table(predicted, classifier, options.prior))
    else:
        print_predictions(predicted)
    if options.csv or options.json:
        print(f"written: {options.csv or options.json}")
    epoch = classifier.checkpoint.epoch
    print(f"{classifier.origin}, epoch {epoch}; class prior: {options.prior}; {_calibration(classifier)}")
    passed_over = f", {len(predicted.errors):,} passed over" if predicted.errors else ""
    print(f"{several(len(predicted), 'image')} predicted{passed_over}")


def _calibration(classifier: "Classifier") -> str:
    if classifier.temperature:
        return f"calibrated (temperature {classifier.temperature:.3g})"
    if not classifier.metrics:
        return "not calibrated"
    why = "no temperature fits" if classifier.metrics["validation"] else "there is no validation part"
    return f"not calibrated: {why}"


def add_export_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("target", metavar="RUN_OR_CHECKPOINT", help=_TARGET)
    forms = "; ".join(f"{form}: {what}" for form, what in _FORMS.items())
    add("--to", choices=tuple(_FORMS), required=True, help=forms)
    add("--out", metavar="FILE", help="what to write (default: beside the checkpoint)")
    images = "onnx, torch-export: images to check the file with (default: 16 of the run's own)"
    add("--images", nargs="+", default=[], metavar="IMAGES_OR_FOLDER", help=images)


def export(options: argparse.Namespace) -> None:
    target, form = Path(options.target), options.to
    if options.images and form not in ("onnx", "torch-export"):
        raise UserError(f"--images goes with --to onnx or torch-export, not with {form}")

    from equipoise.deploy.export import export_file
    from equipoise.deploy.hub import write_hub_folder
    from equipoise.deploy.predict import load

    classifier = load(target, "cpu")
    origin = classifier.origin.resolve()
    out = Path(options.out or origin.with_name(origin.name.partition(".pt")[0] + _ENDINGS[form]))
    if form == "safetensors":
        write_hub_folder(out, classifier.checkpoint, classifier.temperature, classifier.metrics)
    else:
        flags.refuse_unwritable("--out", out, _ENDINGS[form])
        print(export_file(classifier, form, out, [Path(path) for path in options.images]))
    print(f"written: {out}")
