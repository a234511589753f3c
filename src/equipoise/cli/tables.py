"""What the command line shows: plans, data sets, metrics and predictions as tables in the terminal."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from equipoise.base.errors import one_line
from equipoise.data.decode import BadImageError
from equipoise.data.images import Found, ImageList, imbalance_factor
from equipoise.evaluation.metrics import FURTHER, GROUP_LIMITS, percent, shot_group

if TYPE_CHECKING:
    from equipoise.deploy.predict import Predicted

_ROWS_SHOWN = 40
_BAR = 30  # letters
_BAD_SHOWN = 5


def print_plan(plan: Mapping[str, str]) -> None:
    """What a run is about to do."""
    table = Table.grid(padding=(0, 2))
    for name, value in plan.items():
        table.add_row(f"[bold]{name}[/bold]", _plain(value))
    Console().print(table)


def print_metrics(results: Sequence[tuple[str, Mapping[str, Any]]], title: str, run: Mapping[str, Any]) -> None:
    """Accuracy of one or more models side by side, in percent: overall, by shot group, and of each class.

    `results`: a heading, and the metrics of one part as in `metrics.json`. `run` gives the names of the classes and
    their training images, none where the training data are not known.
    """
    names, counts = run["class_names"], run["train_counts"]
    table = Table(box=SIMPLE, title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("training\nimages", justify="right", no_wrap=True)
    for heading, _ in results:
        table.add_column(heading.replace(" ", "\n"), justify="right")

    def add_row(label: str | Text, images: str, field: str) -> None:
        table.add_row(label, images, *(percent(metrics[field]) for _, metrics in results))

    add_row("overall (top-1)", f"{sum(counts):,}" if counts else "?", "top1")
    for group, limits in GROUP_LIMITS.items():
        classes = sum(count > 0 and shot_group(count) == group for count in counts)
        if classes:
            add_row(f"{group} ({classes:,} {'class' if classes == 1 else 'classes'})", limits, group)
    table.add_section()
    for label, field in FURTHER.items():
        if any(metrics[field] is not None for _, metrics in results):
            add_row(label, "", field)
    table.add_section()
    console = Console()
    # In a narrow terminal the names of the classes are cut, not the numbers.
    room = max(24, console.width - 20 - sum(2 + max(5, *map(len, heading.split(" "))) for heading, _ in results))
    scored = [any(metrics["per_class"][label] is not None for _, metrics in results) for label in range(len(names))]
    shown = [label for label in range(len(names)) if scored[label] or len(names) <= _ROWS_SHOWN]
    for position in _ends([counts[label] if counts else 0 for label in shown]):
        if position is None:
            table.add_row("…")
            continue
        label = shown[position]
        name = Text(one_line(str(names[label])))
        name.truncate(room, overflow="ellipsis")
        shares = (percent(metrics["per_class"][label]) for _, metrics in results)
        table.add_row(name, f"{counts[label]:,}" if counts else "?", *shares)
    console.print(table)
    if not counts:
        console.print("(the data has no training part: many, medium and few are not known)")
    if len(shown) > _ROWS_SHOWN:
        console.print(f"({_ROWS_SHOWN} of {len(names):,} classes; all of them are in the file)")


def print_post_hoc(metrics: Mapping[str, Any]) -> None:
    """A line about the post-hoc prior that the validation part chose, where it changes anything."""
    for checkpoint in ("last", "best"):
        chosen = metrics[checkpoint] and metrics[checkpoint]["post_hoc"]
        if chosen and chosen["tau"] > 0:
            part = "test" if "test" in chosen else "validation"
            before, after = (percent(of["mean_per_class"]) for of in (metrics[checkpoint][part], chosen[part]))
            _print_line(
                f"{metrics['method']}, {checkpoint} checkpoint: subtracting {chosen['tau']:g} x log prior from the "
                f"logits (chosen on validation) moves the mean over classes on {part} from {before} to {after}"
            )


def print_unreadable(metrics: Mapping[str, Any]) -> None:
    """How many images could not be read, and the first of them."""
    for part, bad in metrics["bad_images"].items():
        count, were = (f"{len(bad):,} images", "were") if len(bad) > 1 else ("1 image", "was")
        if part == "train":
            said = f"{count} could not be read and {were} replaced by others of the same class"
        else:
            said = f"{count} of the {part} part could not be read and {were} left out of its metrics"
        first = "; ".join(f"{name} ({reason})" for name, reason in islice(bad.items(), _BAD_SHOWN))
        more = f"; and {len(bad) - _BAD_SHOWN:,} more" if len(bad) > _BAD_SHOWN else ""
        _print_line(f"{said}: {first}{more}")


def print_data(
    path: str, found: Found, problems: Sequence[str], bad: Sequence[BadImageError], checked: bool = False
) -> None:
    """The data at `path`: format, parts, a bar for each class, imbalance factor, problems. `checked`: every image was
    decoded; then all bad images are shown."""
    console = Console()
    console.print(f"[bold]{_plain(path)}[/bold]: {found.kind}", highlight=False)
    for line in found.described:
        _print_line(line)
    for part, images in found.parts.items():
        _print_counts(console, part, images)
    faults = [error.fault for error in bad]
    _print_some("problems", problems if checked else [*problems, *faults], _ROWS_SHOWN)
    if checked:
        _print_some("bad images", faults, len(faults))
    if not problems and not bad:
        read = "every image was decoded" if checked else "images were not decoded: --check does it"
        console.print(f"\nno problems found ({read})")


def _print_counts(console: Console, part: str, images: ImageList) -> None:
    counts = images.class_counts
    filled = [count for count in counts if count]
    factor = f", imbalance factor {imbalance_factor(filled):.4g}" if filled else ""
    console.print(f"\n[bold]{part}[/bold]: {len(images):,} images, {len(counts):,} classes{factor}", highlight=False)
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    for label in _ends(counts):
        if label is None:
            table.add_row("…")
            continue
        length = counts[label] / max(counts) * _BAR
        # A class with images has a bar, however short.
        bar = "█" * int(length) + ("▌" if length % 1 >= 0.5 or 0 < length < 1 else "")
        table.add_row(_plain(images.class_names[label]), f"{counts[label]:,}", bar)
    console.print(table)


def _print_some(what: str, lines: Sequence[str], most: int) -> None:
    if lines:
        Console().print(f"\n[bold]{what} ({len(lines):,})[/bold]")
    for line in lines[:most]:
        _print_line(f"- {line}")
    if len(lines) > most:
        _print_line(f"… and {len(lines) - most:,} more")


def print_predictions(predicted: "Predicted") -> None:
    """A line an image: its file, then classes with their probabilities in percent, the most probable first."""
    table = Table(box=SIMPLE)
    for heading in ("file", "class", "percent", "next"):
        table.add_column(heading, justify="right" if heading == "percent" else "left", overflow="fold")
    for file, ((name, share), *others) in islice(predicted, _ROWS_SHOWN):
        further = ", ".join(f"{other} {percent(of_other)}" for other, of_other in others)
        table.add_row(*(_plain(" ".join(cell.split())) for cell in (file, name, percent(share), further)))
    Console().print(table)
    if len(predicted) > _ROWS_SHOWN:
        _print_line(f"({_ROWS_SHOWN} of {len(predicted):,} images; --csv FILE or --json FILE writes all of them)")


def _ends(counts: Sequence[int]) -> list[int | None]:
    """Which classes to show: all, or the largest and the smallest with a gap (None) between them."""
    if len(counts) <= _ROWS_SHOWN:
        return list(range(len(counts)))
    by_size = sorted(range(len(counts)), key=lambda label: -counts[label])
    return [*by_size[: _ROWS_SHOWN // 2], None, *by_size[-_ROWS_SHOWN // 2 :]]


def _print_line(text: str) -> None:
    """A message on one line, however long: names of files and classes may hold anything."""
    Console().print(_plain(text), highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    return escape(one_line(text))
