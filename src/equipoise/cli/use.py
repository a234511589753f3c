"""`equipoise evaluate`, `report`, `predict` and `export`: their options, and the calls that these become."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.base.errors import UserError, reason, several
from equipoise.cli import flags

if TYPE_CHECKING:
    from equipoise.deploy.predict import Predicted

_FORMS = (
    "onnx: one file for ONNX Runtime and the like; safetensors: a folder for a model hub, which equipoise.load() opens "
    "and whose encoder timm loads; torch-export: one file for torch.export.load"
)
_ENDINGS = {"onnx": ".onnx", "safetensors": "-safetensors", "torch-export": ".pt2"}
_CHOSEN = "the best checkpoint where validation chose one, else the last"
_TARGET = f"a run folder ({_CHOSEN}), a checkpoint, or a folder from --to safetensors"
_PASSED_OVER_SHOWN = 20


def add_evaluate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    both = f"on its own data a run's checkpoints are both scored; with --data, --split and the like, {_CHOSEN}"
    target = f"a run folder, a .pt file, or the authors' .pth.tar; {both}"
    add("target", metavar="RUN_OR_CHECKPOINT", help=target)
    add("--data", help="other data of the same classes (default: the run's own)")
    split = "the part to score (default: test, or validation where there is no test)"
    add("--split", choices=("train", "validation", "test"), help=split)
    add("--out", metavar="FILE", help="where to write the metrics (default: beside the checkpoint)")
    add("--logits", metavar="FILE", help="write the logits of every image too, as .npz")
    shift = "show the accuracy where the frequent classes are up to 50 times as frequent as the rare, and the reverse"
    add("--label-shift", action="store_true", help=shift)
    flags.add_fields(command, "data.val_list", "data.test_list", "data.on_bad_image", "data.allow_outside", "device")
    flags.add_set(command)


def evaluate(options: argparse.Namespace) -> None:
    target, overrides = Path(options.target), flags.overrides_of(options)
    other_data = options.data or options.split or any(field.path[-1].endswith("_list") for field, _ in overrides)
    if not target.is_dir() or other_data or options.out or options.logits or options.set or options.label_shift:
        names = options.out, options.logits
        score_checkpoint(target, options.data, options.split, overrides, *names, options.label_shift)
        return

    from equipoise.runs.folder import METRICS

    flags.refuse_unwritable("--out", target / METRICS, ".json")

    from equipoise.base.world import join
    from equipoise.cli.tables import print_calibration, print_metrics, print_post_hoc, print_run, print_unreadable
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
    if results:
        print_metrics(results, f"{metrics['method']}: accuracy, percent", metrics)
        print_calibration(*results[-1])
    print_run(metrics)
    print_post_hoc(metrics)
    print_unreadable(metrics)
    print(f"written: {target / METRICS}")


def score_checkpoint(
    target: Path,
    data: str | None,
    part: str | None,
    overrides: flags.Overrides,
    out: str | None,
    logits: str | None,
    shifted: bool = False,
) -> None:
    """Score one checkpoint (of a run: the chosen one); show and write its metrics. See `evaluate_checkpoint`."""
    from equipoise.runs.folder import METRICS, chosen_checkpoint, write_json

    checkpoint = chosen_checkpoint(target)
    flags.refuse_unwritable("--out", out or checkpoint.with_name(METRICS), ".json")
    flags.refuse_unwritable("--logits", logits, ".npz")

    from equipoise.base.world import join
    from equipoise.cli.tables import print_calibration, print_label_shift, print_metrics, print_unreadable
    from equipoise.evaluation.predictions import to_npz
    from equipoise.evaluation.score import evaluate_checkpoint

    with join() as world:
        metrics, predictions = evaluate_checkpoint(checkpoint, data, part, overrides, bool(logits), shifted, world)
    if not world.is_first:
        return
    scored: str = metrics["split"]
    title = f"{metrics['method']}, {checkpoint.name}, {metrics['checkpoint']}: accuracy, percent"
    print_metrics([(scored, metrics[scored])], title, metrics)
    print_calibration(scored, metrics[scored])
    print_unreadable(metrics)
    if shifted:
        print_label_shift(metrics["label_shift"])
    if metrics["note"]:
        print(f"note: {metrics['note']}")
    if logits:
        arrays = {"logits": predictions.logits_NC, "labels": predictions.labels_N}
        to_npz(Path(logits), {**arrays, "class_names": metrics["class_names"]})
        print(f"written: {logits}")
    of_data = f"-{Path(data).resolve().name}" if data else ""
    stem = checkpoint.name.partition(".pt")[0]
    written = Path(out or checkpoint.with_name(f"metrics-{stem}{of_data}-{scored}.json"))
    write_json(written, metrics)
    print(f"written: {written}")


def add_report_options(command: argparse.ArgumentParser) -> None:
    runs = f"a run folder; one that stopped early will do. Shown: {_CHOSEN}"
    command.add_argument("runs", metavar="RUN", nargs="+", help=runs)
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
    add("paths", metavar="IMAGES_OR_FOLDER", nargs="*", help="image files, and folders of them")
    listed = "a file with one path a line (-: standard input), relative to the working directory"
    add("--list", metavar="FILE", help=listed)
    add("--top", type=int, default=5, metavar="K", help="classes an image, the most probable first [5]")
    written = command.add_mutually_exclusive_group()
    instead = "write a line for each image instead of the table; - is standard output, and all else goes to stderr"
    written.add_argument("--csv", metavar="FILE", help=instead)
    written.add_argument("--json", metavar="FILE", help="the same as JSON, with the files that were passed over")
    explain = "show the N training images nearest to each, by the encoder's features, which are kept in ~/.cache"
    add("--explain", type=int, metavar="N", help=explain)
    prior = (
        "class frequencies where the model is used: equal, as in training, from these images, or a CSV file of weights"
    )
    add("--prior", default="uniform", metavar="uniform|train|estimate|FILE", help=f"{prior} [uniform]")
    recipe = "whose views a checkpoint of the BCL authors' was trained with [imagenet-lt]"
    add("--recipe", default="imagenet-lt", metavar="RECIPE", help=recipe)
    flags.add_fields(command, "device")
    command.epilog = "Exit code: 0 where every file was predicted, 1 where some were passed over, 2 where all were."


def predict(options: argparse.Namespace) -> int:
    """1 where files were passed over."""
    for option, number in ("--top", options.top), ("--explain", options.explain):
        if number is not None and number < 1:
            raise UserError(f"{option} must be at least 1, not {number}")
    for option, file, suffix in (("--csv", options.csv, ".csv"), ("--json", options.json, ".json")):
        if file != "-":
            flags.refuse_unwritable(option, file, suffix)
    paths = [*options.paths, *(_listed(options.list) if options.list else ())]
    if not paths:
        raise UserError("no images are named: name files, folders, or a list of them with --list FILE")

    from rich.console import Console
    from rich.progress import Progress

    from equipoise.cli.tables import largest_changes, print_predictions
    from equipoise.deploy.predict import as_csv, as_json, load
    from equipoise.runs.checkpoint import described

    classifier = load(options.target, options.device or "auto", options.recipe)
    if options.explain:
        with contextlib.redirect_stdout(sys.stderr):  # it may take minutes, and shows its own progress
            _ = classifier.train
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("predicting", total=None)

        def show(done: int, files: int) -> None:
            progress.update(task, completed=done, total=files)

        predicted = classifier.predict(paths, options.top, options.prior, show, options.explain or 0)
    _say_passed_over(predicted)
    written = options.csv or options.json
    if not written:
        print_predictions(predicted)
    else:
        _write(written, as_csv(predicted) if options.csv else as_json(predicted, classifier, options.prior))
    said = sys.stderr if written == "-" else sys.stdout
    print(f"{classifier.origin}, {described(classifier.origin, classifier.checkpoint)}", file=said)
    print(f"class prior: {options.prior}; {classifier.calibration}", file=said)
    if predicted.estimated:
        print(largest_changes(predicted.estimated, classifier.checkpoint.class_counts), file=said)
    passed_over = f", {len(predicted.errors):,} passed over" if predicted.errors else ""
    print(f"{several(len(predicted), 'image')} predicted{passed_over}", file=said)
    return 1 if predicted.errors else 0


def _listed(file: str) -> list[str]:
    """The paths in a list, one a line."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"--list {file} cannot be read ({reason(error)}); name a file with one path a line") from None
    from equipoise.data.lists import text_lines

    paths = [os.fsdecode(line) for line in (line.rstrip(b"\r\n") for line in text_lines(content)) if line]
    if not paths:
        raise UserError(f"--list {file} is empty; it should have one path a line")
    return paths


def _say_passed_over(predicted: "Predicted") -> None:
    """Name the first files that could not be read. Raises UserError where no other was."""
    errors = predicted.errors
    for error in errors[:_PASSED_OVER_SHOWN]:
        print(f"passed over: {error}", file=sys.stderr)
    if len(errors) > _PASSED_OVER_SHOWN:
        print(f"and {len(errors) - _PASSED_OVER_SHOWN:,} more", file=sys.stderr)
    if not len(predicted):
        raise UserError(f"nothing was predicted: {several(len(errors), 'file')} passed over")


def _write(out: str, content: bytes) -> None:
    """Write `content` to the file `out`, or for '-' to standard output."""
    from equipoise.base.files import atomic_file

    if out == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return
    with atomic_file(Path(out)) as file:
        file.write(content)
    print(f"written: {out}")


def add_export_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("target", metavar="RUN_OR_CHECKPOINT", help=_TARGET)
    add("--to", choices=tuple(_ENDINGS), required=True, help=_FORMS)
    add("--out", metavar="FILE", help="what to write (default: beside the checkpoint)")


def export(options: argparse.Namespace) -> None:
    from equipoise.deploy.export import export_file
    from equipoise.deploy.hub import write_hub_folder
    from equipoise.deploy.predict import load
    from equipoise.runs.checkpoint import described

    form = options.to
    classifier = load(options.target, "cpu")
    print(f"{classifier.origin}, {described(classifier.origin, classifier.checkpoint)}")
    origin = classifier.origin.resolve()
    out = Path(options.out or origin.with_name(origin.name.partition(".pt")[0] + _ENDINGS[form]))
    if form == "safetensors":
        write_hub_folder(out, classifier.checkpoint, classifier.temperature, classifier.metrics)
    else:
        flags.refuse_unwritable("--out", out, _ENDINGS[form])
        print(export_file(classifier, form, out))
    print(f"written: {out}")
