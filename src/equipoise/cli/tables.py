"""What the command line shows: plans, data sets and figures as tables in the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from equipoise.base.errors import one_line
from equipoise.data.decode import BadImageError
from equipoise.data.images import Found, ImageList, PackedImages, imbalance_factor
from equipoise.evaluation.metrics import FURTHER, shot_group

_ROWS_SHOWN = 40
_BAR = 30
_BAD_SHOWN = 5


def print_plan(plan: Mapping[str, str]) -> None:
    """What a run is about to do."""
    table = Table.grid(padding=(0, 2))
    for name, value in plan.items():
        table.add_row(f"[bold]{name}[/bold]", _plain(value))
    Console().print(table)


def print_figures(results: Sequence[tuple[str, Mapping[str, Any]]], title: str, metrics: Mapping[str, Any]) -> None:
    """Accuracy of one or more models side by side, in percent: overall, by shot group, and of each class.

    `results` pairs a heading with figures as in `metrics.json`; `metrics` gives the class names and training counts.
    """
    table = Table(box=SIMPLE, title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("training\nimages", justify="right", no_wrap=True)
    for heading, _ in results:
        table.add_column(heading.replace(" ", "\n"), justify="right")
    console = Console()
    # Where the line is short, the names of the classes are cut, not the figures.
    room = max(24, console.width - 20 - sum(2 + max(5, *map(len, heading.split(" "))) for heading, _ in results))

    names, counts = metrics["class_names"], metrics["train_counts"]  # no counts: what was trained on is not known

    def add_row(label: str, images: str, figure_name: str) -> None:
        table.add_row(label, images, *(_percent(figure[figure_name]) for _, figure in results))

    add_row("overall (top-1)", f"{sum(counts):,}" if counts else "?", "top1")
    limits = {"many": "more than 100", "medium": "20 to 100", "few": "fewer than 20"}
    for group, limit in limits.items():
        classes = sum(count > 0 and shot_group(count) == group for count in counts)
        if classes:
            add_row(f"{group} ({classes:,} {'class' if classes == 1 else 'classes'})", limit, group)
    table.add_section()
    for label, figure_name in FURTHER.items():
        if any(figure[figure_name] is not None for _, figure in results):
            add_row(label, "", figure_name)
    table.add_section()
    scored = [any(figure["per_class"][index] is not None for _, figure in results) for index in range(len(names))]
    shown = [index for index in range(len(names)) if scored[index] or len(names) <= _ROWS_SHOWN]
    for position in _shown([counts[index] if counts else 0 for index in shown]):
        index = None if position is None else shown[position]
        if index is None:
            table.add_row("…", "", *("" for _ in results))
        else:
            shares = (_percent(figure["per_class"][index]) for _, figure in results)
            name = Text(one_line(str(names[index])))
            name.truncate(room, overflow="ellipsis")
            table.add_row(name, f"{counts[index]:,}" if counts else "?", *shares)
    console.print(table)
    if not counts:
        console.print("(the data has no training part: many, medium and few are not known)")
    if len(shown) > _ROWS_SHOWN:
        console.print(f"({_ROWS_SHOWN} of {len(names):,} classes; all of them are in the file)")


def print_post_hoc(metrics: Mapping[str, Any]) -> None:
    """The post-hoc prior that the validation part chose, in one line, where there is one and it changes something."""
    for checkpoint in ("last", "best"):
        chosen = metrics[checkpoint] and metrics[checkpoint]["post_hoc"]
        if chosen and chosen["tau"] > 0:
            part = "test" if "test" in chosen else "validation"
            before, after = metrics[checkpoint][part], chosen[part]
            Console().print(
                f"{metrics['method']}, {checkpoint} checkpoint: subtracting {chosen['tau']:g} x log prior from the "
                f"logits (chosen on validation) moves the mean over classes on {part} from "
                f"{_percent(before['mean_per_class'])} to {_percent(after['mean_per_class'])}",
                highlight=False,
                soft_wrap=True,
            )


def print_unreadable(metrics: Mapping[str, Any]) -> None:
    """What could not be read, and what was done about it: a best checkpoint; how many images, and the first few of
    them. Nothing if all could."""
    if lost := metrics.get("best_lost"):
        said = f"{_plain(lost)}: the figures are of the last checkpoint"
        Console().print(said, highlight=False, soft_wrap=True)
    for part, bad in metrics["bad_images"].items():
        count, were = (f"{len(bad):,} images", "were") if len(bad) > 1 else ("1 image", "was")
        if part == "train":
            said = f"{count} could not be read and {were} replaced by others of the same class"
        else:
            said = f"{count} of the {part} part could not be read and {were} left out of its figures"
        first = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:_BAD_SHOWN])
        more = f"; and {len(bad) - _BAD_SHOWN:,} more" if len(bad) > _BAD_SHOWN else ""
        Console().print(f"{said}: {_plain(first)}{more}", highlight=False, soft_wrap=True)


def print_data(
    path: str, found: Found, problems: Sequence[str], bad: Sequence[BadImageError], checked: bool = False
) -> None:
    """What lies at `path`: format, parts, a bar for each class, imbalance factor, problems. Of the bad images all are
    shown if every image was decoded (`checked`)."""
    console = Console()
    console.print(f"[bold]{_plain(path)}[/bold]: {found.kind}", highlight=False)
    for line in found.described:
        console.print(_plain(line), highlight=False, soft_wrap=True)
    for part, images in found.parts.items():
        _print_counts(console, part, images)
    of_images = [error.fault for error in bad]
    _print_some(console, "problems", [*problems, *([] if checked else of_images)], _ROWS_SHOWN)
    if checked:
        _print_some(console, "bad images", of_images, len(of_images))
    if problems or bad:
        return
    packed = any(isinstance(part.images, PackedImages) for part in found.parts.values())
    headers = "the header of every image was read, its pixels were not"
    looked_at = "the index was checked, the images were not" if packed else headers
    console.print(f"\nno problems found ({'every image was decoded' if checked else looked_at})")


def _print_some(console: Console, what: str, lines: Sequence[str], most: int) -> None:
    if lines:
        console.print(f"\n[bold]{what} ({len(lines):,})[/bold]")
    for line in lines[:most]:
        console.print(f"- {_plain(line)}", soft_wrap=True, highlight=False)
    if len(lines) > most:
        console.print(f"… and {len(lines) - most:,} more")


def print_predictions(rows: Iterable[tuple[str, Sequence[tuple[str, float]]]], total: int) -> None:
    """A line an image: its file, then classes with their probabilities in percent, the most probable first."""
    table = Table(box=SIMPLE)
    for heading in ("file", "class", "percent", "next"):
        table.add_column(heading, justify="right" if heading == "percent" else "left", overflow="fold")
    for file, ((name, share), *others) in islice(rows, _ROWS_SHOWN):
        further = ", ".join(f"{other} {_percent(of_other)}" for other, of_other in others)
        table.add_row(*(_plain(" ".join(cell.split())) for cell in (file, name, _percent(share), further)))
    console = Console()
    console.print(table)
    if total > _ROWS_SHOWN:
        console.print(f"({_ROWS_SHOWN} of {total:,} images; --csv FILE or --json FILE writes all of them)")


def _print_counts(console: Console, part: str, images: ImageList) -> None:
    counts = images.class_counts
    filled = [count for count in counts if count]
    factor = f", imbalance factor {imbalance_factor(filled):.4g}" if filled else ""
    console.print(f"\n[bold]{part}[/bold]: {len(images):,} images, {len(counts):,} classes{factor}", highlight=False)
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for index in _shown(counts):
        if index is None:
            table.add_row("…", "", "")
            continue
        length = counts[index] / max(counts) * _BAR
        # A class that has images has a bar, however short.
        bar = "█" * int(length) + ("▌" if length % 1 >= 0.5 or 0 < length < 1 else "")
        table.add_row(_plain(images.class_names[index]), f"{counts[index]:,}", bar)
    console.print(table)


def _shown(counts: Sequence[int]) -> list[int | None]:
    """Which classes to show: all, or the largest and the smallest with a gap (None) between them."""
    if len(counts) <= _ROWS_SHOWN:
        return list(range(len(counts)))
    by_size = sorted(range(len(counts)), key=lambda index: -counts[index])
    return [*by_size[: _ROWS_SHOWN // 2], None, *by_size[-_ROWS_SHOWN // 2 :]]


def _plain(text: str) -> str:
    """A name or a message as it is, on one line: whatever a file or a class is called."""
    return escape(one_line(text))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
