"""Words of `equipoise predict` and `equipoise export` become calls."""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from equipoise.base.errors import UserError, one_line, several
from equipoise.base.files import real_path

_FORMS = {
    "authors": "the layout of the BCL authors' code",
    "onnx": "one file for ONNX Runtime and the like",
    "safetensors": "a folder for a model hub, which equipoise.load() opens and whose encoder timm loads",
    "torch-export": "one file for torch.export.load",
}
_TARGET = "a run folder (its best checkpoint, or else its last), a checkpoint, or a folder from --to safetensors"
_ERRORS_SHOWN = 20


def add_predict_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="RUN", help=_TARGET)
    command.add_argument("paths", metavar="IMAGES_OR_FOLDER", nargs="+", help="image files, and folders of them")
    command.add_argument(
        "--top", type=int, default=5, metavar="K", help="classes an image, the most probable first [5]"
    )
    written = command.add_mutually_exclusive_group()
    written.add_argument("--csv", metavar="FILE", help="write a line an image instead of showing a table")
    written.add_argument("--json", metavar="FILE", help="the same as JSON, with the files that were passed over")
    command.add_argument(
        "--prior",
        default="uniform",
        metavar="uniform|train|FILE",
        help="how frequent the classes are where the model is used: all the same (the default), as in training, or as "
        "a CSV or JSON file of class names and weights says",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def predict(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise UserError(f"--top must be at least 1, not {options.top}")
    refuse_unwritable({"--csv": options.csv, "--json": options.json})

    from rich.console import Console
    from rich.progress import Progress

    from equipoise.cli.tables import print_predictions
    from equipoise.deploy.predict import NoFileError, load, predictions_table, write_csv
    from equipoise.runs.folder import write_json

    classifier = load(options.target, options.device)
    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("predicting", total=None)
        predicted = classifier.predict(
            options.paths,
            options.top,
            options.prior,
            lambda done, files: progress.update(task, completed=done, total=files),
        )
    seconds = time.monotonic() - start
    no_files = [error for error in predicted.errors if isinstance(error, NoFileError)]
    said = [str(error) for error in predicted.errors if not isinstance(error, NoFileError)]
    if no_files:
        what = "pipes, sockets, devices and links to nothing"
        said.insert(0, f"{what}: {len(no_files):,} (first: {no_files[0].args[0]}); remove them")
    for line in said[:_ERRORS_SHOWN]:
        print(f"passed over: {one_line(line)}", file=sys.stderr)
    if len(said) > _ERRORS_SHOWN:
        print(f"passed over: {len(said) - _ERRORS_SHOWN:,} more", file=sys.stderr)
    if not len(predicted):
        raise UserError("nothing was predicted: no image could be read")
    if options.csv:
        write_csv(Path(options.csv), predicted)
    elif options.json:
        write_json(Path(options.json), predictions_table(predicted, classifier, options.prior))
    else:
        print_predictions(predicted, len(predicted))
    if options.csv or options.json:
        print(f"written: {options.csv or options.json}")
    calibrated = (
        f"calibrated (temperature {classifier.temperature:.3g})"
        if classifier.temperature
        else "not calibrated: plain softmax, since there is no validation part, or it fits no temperature"
    )
    print(f"{classifier.origin}, epoch {classifier.checkpoint.epoch}; class prior: {options.prior}; {calibrated}")
    passed_over = f", {len(predicted.errors):,} passed over" if predicted.errors else ""
    rate = len(predicted) / seconds
    print(f"{several(len(predicted), 'image')} predicted in {seconds:.1f} s ({rate:,.0f} a second){passed_over}")


def add_export_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="RUN_OR_CHECKPOINT", help=_TARGET)
    command.add_argument(
        "--to", choices=tuple(_FORMS), required=True, help="; ".join(f"{form}: {what}" for form, what in _FORMS.items())
    )
    command.add_argument("--out", metavar="FILE", help="what to write (default: beside the checkpoint)")
    command.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGES_OR_FOLDER",
        help="onnx, torch-export: images to check the file with (default: 16 of the run's own)",
    )


def export(options: argparse.Namespace) -> None:
    target = Path(options.target)
    if options.images and options.to not in ("onnx", "torch-export"):
        raise UserError(f"--images goes with --to onnx or torch-export, not with {options.to}")
    if options.to == "authors":
        from equipoise.runs.checkpoint import export_to_authors
        from equipoise.runs.folder import AUTHORS_NAMES, LAST, chosen_checkpoint

        checkpoint = chosen_checkpoint(target)
        out = Path(options.out or checkpoint.with_name(AUTHORS_NAMES.get(checkpoint.name, AUTHORS_NAMES[LAST])))
        export_to_authors(checkpoint, out)
        print(f"written: {out}")
        return

    from equipoise.deploy.export import export_onnx, export_torch
    from equipoise.deploy.hub import write_hub_folder
    from equipoise.deploy.predict import load

    classifier = load(target, "cpu")
    origin = classifier.origin
    beside = origin.absolute() if origin.is_dir() else origin.with_name(origin.name.partition(".pt")[0])
    ending = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": "-safetensors"}[options.to]
    out = Path(options.out or beside.with_name(beside.name + ending))
    if options.to == "safetensors":
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out must be in a folder that is there, not {out}")
        write_hub_folder(out, classifier.checkpoint, classifier.temperature, classifier.figures)
    else:
        refuse_unwritable({"--out": str(out)})
        pictures = [Path(path) for path in options.images]
        print((export_onnx if options.to == "onnx" else export_torch)(classifier, out, pictures))
    print(f"written: {out}")


# What a command writes again; anything else that is there (a model, a picture, a recipe) is named by mistake.
_REPLACED = (".csv", ".json", ".npz", ".npy", ".html", ".onnx", ".pt2", ".txt")
_OF_OTHERS = ("run.json", "metrics.json", "bad-images.json", "observed.npz", "compare.json", "config.json")


def refuse_unwritable(files: Mapping[str, str | None]) -> None:
    """Raise UserError for a flag whose file could not be written, or is in use: better now than after the work."""
    for flag, file in files.items():
        if file is None:
            continue
        path = real_path(Path(file))
        if not path.parent.is_dir() or (path.exists() and not path.is_file()):
            raise UserError(f"{flag} must be a file in a folder that is there, not {file}")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{flag} must be a file in a folder that may be written, not {file}")
        if path.is_file() and (path.suffix not in _REPLACED or path.name in _OF_OTHERS):
            raise UserError(f"{flag} would replace {file}, which is something else; name another file")
