"""What the command line shows: plans, data sets, metrics and predictions as tables in the terminal.

In a narrow terminal names give way, figures never; what is no terminal (a pipe, a file) is as wide as it must be.
"""

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, get_args

from rich.bar import Bar
from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from equipoise.base import progress
from equipoise.base.errors import one_line, several
from equipoise.config.recipe import Method, Recipe
from equipoise.data.decode import BadImageError
from equipoise.data.images import Found, ImageList, imbalance_factor
from equipoise.evaluation.metrics import FURTHER, GROUP_LIMITS, percent, shot_group
from equipoise.method.methods import remedies

if TYPE_CHECKING:
    from equipoise.deploy.predict import Predicted
    from equipoise.evaluation.labels import Doubt
    from equipoise.runs.records import NoneOfThese, ShiftRow

_ROWS_SHOWN = 40
_FEW_SHOWN = 5  # in a line
_DOUBTS_SHOWN = 20
_NAME_WIDTH = 6  # characters that are left of a name in the narrowest terminal
_BALANCED = 1.5  # below this imbalance factor nothing has to be done


def print_plan(plan: Mapping[str, str]) -> None:
    """What a run is about to do, unless all shall be quiet."""
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold", min_width=_NAME_WIDTH), padding=(0, 2))
    for name, value in plan.items():
        table.add_row(Text(name, "bold"), _plain(value))
    if not progress.quiet:
        _print(table)


def print_metrics(results: Sequence[tuple[str, Mapping[str, Any]]], title: str, run: Mapping[str, Any]) -> None:
    """Accuracy of one or more models side by side, in percent: overall, by shot group, and of each class. `results`: a
    heading, and the metrics of one part; `run`: class names, and training counts where they are known."""
    names, counts = run["class_names"], run["train_counts"]
    figures = [{**of, **dict(enumerate(of["per_class"]))} for _, of in results]  # a class by its label
    bounds = [{**of.get("intervals", {}), **dict(enumerate(of.get("per_class_intervals", ())))} for of in figures]
    with_intervals = len(results) <= 2 and all(bounds) and _console().width >= 50 + 25 * len(results)  # or they fold

    def row(key: str | int) -> Iterator[str]:
        for of, interval in zip(figures, bounds, strict=True):
            yield percent(of.get(key))
            if with_intervals:
                yield "-".join(map(percent, interval.get(key) or ()))

    of_runs = [(heading.replace(" ", "\n"), *["95 % over\nimages"] * with_intervals) for heading, _ in results]
    headings = ["training\nimages", *chain.from_iterable(of_runs)]
    columns = (Column(heading, justify="right", overflow="fold") for heading in headings)
    table = Table(*_names(""), *columns, box=SIMPLE)
    table.add_row("overall (top-1)", f"{sum(counts):,}" if counts else "?", *row("top1"))
    for group, limits in GROUP_LIMITS.items():
        if classes := sum(count > 0 and shot_group(count) == group for count in counts):
            table.add_row(f"{group} ({several(classes, 'class')})", limits, *row(group))
    table.add_section()
    for label, field in FURTHER.items():
        if any(of.get(field) is not None for of in figures):
            table.add_row(label, "", *row(field))
    table.add_section()
    # A class that no image was scored of has no row.
    scored = [label for label in range(len(names)) if any(of[label] is not None for of in figures)]
    for label in _ends(scored, counts):
        table.add_row(_cut(str(names[label])), f"{counts[label]:,}" if counts else "?", *row(label))
    _print(table, f" {title}")
    if not counts:
        print("(the data has no training part: many, medium and few are not known)")
    if len(scored) > _ROWS_SHOWN:
        print(f"({_ROWS_SHOWN} of {len(names):,} classes; all of them are in the file)")


def print_run(metrics: Mapping[str, Any]) -> None:
    """Which of a run's checkpoints is which, which one speaks for the run, and what training cost."""
    last, best, method = metrics["last"], metrics["best"], metrics["method"]
    if best:
        which = f"last is the checkpoint after epoch {last['epoch']}, best the one after epoch {best['epoch']}"
        print(f"{method}: {which}, which validation chose: it speaks for the run, in predict, export and report too")
    else:
        print(f"{method}: the last checkpoint (epoch {last['epoch']}) speaks for the run: no other was chosen")
    if cost := metrics.get("cost"):
        seconds = cost["seconds"]
        took = "" if seconds is None else f" in {seconds:,.{0 if seconds >= 10 else 1}f} s of steps"
        network = f"{cost['parameters']:,} parameters ({cost['trained_parameters']:,} trained)"
        cost_of_use = f"{cost['multiply_adds']:,} multiply-adds an image"
        print(f"{method}, training: {cost['images_seen']:,} images{took}; {network}, {cost_of_use}")


def print_post_hoc(metrics: Mapping[str, Any]) -> None:
    """A line about the post-hoc prior that the validation part chose, where it changes anything."""
    for checkpoint in ("last", "best"):
        chosen = metrics[checkpoint] and metrics[checkpoint]["post_hoc"]
        if chosen and chosen["tau"] > 0:
            part = "test" if "test" in chosen else "validation"
            before, after = (percent(of["mean_per_class"]) for of in (metrics[checkpoint][part], chosen[part]))
            changed = f"subtracting {chosen['tau']:g} x log prior from the logits (chosen on validation) moves"
            moves = f"{changed} the mean over classes on {part} from {before} to {after}"
            print(f"{metrics['method']}, {checkpoint} checkpoint: {moves}")


def print_calibration(part: str, metrics: Mapping[str, Any]) -> None:
    """How well the probabilities fit, for all classes and for each shot group."""
    headings = "mean over classes", "class-wise\nECE, percent", "negative\nlog-likelihood", "Brier\nscore"
    rows = [
        (group, f"{100 * of['classwise_ece']:.2f}", f"{of['nll']:.3f}", f"{of['brier']:.3f}")
        for group, of in metrics["calibration"].items()
    ]
    _print_figures(f"calibration on {part}, by the softmax of the raw logits", headings, rows)


def print_label_shift(rows: "Sequence[ShiftRow]") -> None:
    """Accuracy under other class priors; the Dirichlet draws together."""
    drawn = [row for row in rows if row["prior"].startswith("draw ")]
    shown = [(row["prior"], row["unknown"], row["known"]) for row in rows if row not in drawn]
    for name, of in ("mean", statistics.mean), ("lowest", min):
        shown.append((f"{len(drawn)} draws, {name}", of(r["unknown"] for r in drawn), of(r["known"] for r in drawn)))
    cells = [(name, percent(unknown), percent(known)) for name, unknown, known in shown]
    headings = "class prior", "prior\nunknown", "prior\nknown"
    _print_figures("accuracy under other class priors, percent", headings, cells)
    print("(forward 50: the class with the most training images is 50 times as frequent as the one with the fewest)")


def print_none_of_these(part: str, told: "NoneOfThese") -> None:
    """How well pictures of no class are told from those of a part."""
    shares = percent(told["refused"]), percent(told["kept"]), percent(told["auroc"]), percent(told["fpr95"])
    number = several(told["images"], "strange picture")
    line = "none of these: {0} % of {4} refused, {1} % of {5} kept (mean over classes), by the threshold of validation"
    print(line.format(*shares, number, part))
    print("AUROC {2}, false positive rate at 95 % {3}, percent".format(*shares))
    if told["passed_over"]:
        print(f"passed over beside them: {several(told['passed_over'], 'file')} that cannot be read")


def print_unreadable(metrics: Mapping[str, Any]) -> None:
    """How many images could not be read, and the first of them."""
    for part, bad in metrics["bad_images"].items():
        then = "replaced by others of the same class" if part == "train" else "left out of the metrics"
        first = "; ".join(f"{name} ({reason})" for name, reason in islice(bad.items(), _FEW_SHOWN))
        more = f"; and {len(bad) - _FEW_SHOWN:,} more" if len(bad) > _FEW_SHOWN else ""
        print(one_line(f"{part} part: {several(len(bad), 'image')} could not be read, {then}: {first}{more}"))


def print_data(
    path: str, found: Found, problems: Sequence[str], bad: Sequence[BadImageError], checked: bool, recipe: Recipe
) -> None:
    """The data at `path`. `checked`: every image was decoded. `recipe`: the one that training would take."""
    _console().print(Text.assemble((one_line(path), "bold"), f": {found.kind}"))
    for line in found.described:
        print(one_line(line))
    for part, images in found.parts.items():
        _print_counts(part, images)
        if part == "train" and not checked:
            _print_remedies(images.class_counts, recipe)
    faults = [*problems, *(error.fault for error in bad)]
    shown = faults if checked else faults[:_ROWS_SHOWN]
    for title, lines, number in (("notes", found.notes, len(found.notes)), ("problems", shown, len(faults))):
        if lines:
            _console().print(Text(f"\n{title} ({number:,})", "bold"))
            print("\n".join(one_line(f"- {line}") for line in lines))
    if len(faults) > len(shown):
        print(f"… and {len(faults) - len(shown):,} more: --check shows all")
    if not faults:
        read = "every image was decoded" if checked else "images were not decoded: --check does it"
        _console().print(Text(f"\nno problems found ({read})"))


def _print_counts(part: str, images: ImageList) -> None:
    counts = images.class_counts
    number = f"{len(images):,} images, {len(counts):,} classes, imbalance factor {imbalance_factor(counts):.4g}"
    _console().print(Text.assemble("\n", (part, "bold"), f": {number}"))
    table = Table.grid(Column(min_width=_NAME_WIDTH), Column(justify="right"), Column(min_width=4), padding=(0, 1))
    for label in _ends(range(len(counts)), counts):
        # A file on Windows may have no blocks.
        bar = Bar(max(counts), 0, counts[label], width=30) if _console().encoding.startswith("utf") else ""
        table.add_row(_cut(images.class_names[label]), f"{counts[label]:,}", bar)
    _print(table)
    if len(counts) > _ROWS_SHOWN:
        print(f"({_ROWS_SHOWN} of {len(counts):,} classes, the largest and the smallest)")


def _print_remedies(counts: Sequence[int], recipe: Recipe) -> None:
    """What each usual remedy against imbalance would do, and which one training takes; nothing where none is needed."""
    if min(counts) == 0 or imbalance_factor(counts) <= _BALANCED:
        return
    ends = counts.index(max(counts)), counts.index(min(counts))
    images = " and ".join(f"{counts[label]:,}" for label in ends)
    _console().print(Text(f"\nwhat usual remedies do to the largest class and the rarest ({images} images):"))
    table = Table.grid(Column(), Column(justify="right"), Column(justify="right"), Column(), padding=(0, 2))
    for remedy, figures_C, meaning in remedies(counts):
        table.add_row(remedy, *(f"{figures_C[label]:.3g}" for label in ends), meaning)
    _print(table)
    others = ", ".join(method for method in get_args(Method) if method != recipe.method)
    line = f"`train` takes the recipe {recipe.name}, method {recipe.method}; --method takes another: {others}"
    _console().print(_plain(line))


def print_predictions(predicted: "Predicted") -> None:
    """A line an image: its file, then classes with their probabilities in percent, the most probable first."""
    file, name, further = _names("file", "class", "next")
    table = Table(file, name, Column("percent", justify="right", overflow="fold"), further, box=SIMPLE)
    explained = zip(predicted, predicted.neighbours, predicted.strange, strict=True)
    for (file, classes), neighbours, strange in islice(explained, _ROWS_SHOWN):
        (name, share), *others = [("none of these", None), *classes] if strange else classes
        further = ", ".join(f"{other} {percent(of_other)}" for other, of_other in others)
        table.add_row(*(_plain(" ".join(cell.split())) for cell in (file, name, percent(share), further)))
        for near, of_near, cosine, _ in neighbours:
            table.add_row(_plain(f"  near {near}"), _plain(of_near), "", f"cosine {cosine:.3f}")
    _print(table)
    if len(predicted) > _ROWS_SHOWN:
        print(f"({_ROWS_SHOWN} of {len(predicted):,} images; --csv FILE or --json FILE writes all of them)")


def largest_changes(estimated: Mapping[str, float], train_counts: Sequence[int]) -> str:
    """A line about the classes whose estimated share differs most from that in training, else from an equal one."""
    counts, before = (train_counts, "training") if train_counts else ([1] * len(estimated), "equal")
    rows = [(name, share, count / sum(counts)) for (name, share), count in zip(estimated.items(), counts, strict=True)]
    rows.sort(key=lambda row: -abs(row[1] - row[2]))
    changes = [f"{name} {percent(share)} ({percent(was)})" for name, share, was in rows[:_FEW_SHOWN]]
    return one_line(f"estimated class shares in percent, {before} in brackets: {', '.join(changes)}")


def print_doubts(doubts: "Sequence[Doubt]") -> None:
    """The images whose labels are probably wrong, with the probabilities of their label and of the likeliest class."""
    image, label, rather = _names("image", "label", "rather")
    table = Table(image, label, Column("percent", justify="right", overflow="fold"), rather, box=SIMPLE)
    for place, share, likely, of_likely in doubts[:_DOUBTS_SHOWN]:
        cells = (place.name, place.class_name, percent(share), f"{likely} {percent(of_likely)}")
        table.add_row(*map(_plain, cells))
    heading = f"labels to look at ({len(doubts):,}), by a pretrained encoder and a classifier trained on other images"
    _print(table, heading)
    if len(doubts) > _DOUBTS_SHOWN:
        print(f"… and {len(doubts) - _DOUBTS_SHOWN:,} more")


def _print_figures(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(headings[0], *(Column(heading, justify="right") for heading in headings[1:]), box=SIMPLE)
    for row in rows:
        table.add_row(*row)
    _print(table, f" {title}")


def _names(*headings: str) -> list[Column]:
    """Columns of names, which give way."""
    return [Column(heading, overflow="fold", min_width=_NAME_WIDTH) for heading in headings]


def _ends(labels: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
    """Which classes to show: all, or the largest and the smallest."""
    if len(labels) <= _ROWS_SHOWN:
        return labels
    by_size = sorted(labels, key=lambda label: -counts[label]) if counts else labels
    return [*by_size[: _ROWS_SHOWN // 2], *by_size[-_ROWS_SHOWN // 2 :]]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 10_000)


def _print(table: Table, title: str = "") -> None:
    """Columns on the right hold figures, none of which is broken or cut. A table that cannot be so narrow is wider than
    the terminal."""
    for column in table.columns:
        if column.justify == "right":
            column.min_width = max((cell_len(word) for cell in column.cells for word in str(cell).split()), default=0)
    if title:
        _console().print(Text(f"\n{one_line(title)}", "bold"))
    if table.rows:
        _console().print(table, crop=False)


def _cut(name: str) -> Text:
    """A name on one line, which ends in an ellipsis where there is no room for all of it."""
    return Text(one_line(name), no_wrap=True, overflow="ellipsis")


def _plain(text: str) -> Text:
    """Any text as it is, on one line."""
    return Text(one_line(text))
