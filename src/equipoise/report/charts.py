"""The figures of the report, each drawn from plain values. `None` is "there is nothing to average", as in `metrics.py`.

Shapes: C classes, G shot groups, K bins of a cosine, M images of the map, N images.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from equipoise.evaluation.metrics import FEW_BELOW, GROUP_LIMITS, GROUPS, MANY_ABOVE, percent, shot_group
from equipoise.report import svg
from equipoise.report.svg import PERCENT, Axis, ByHeading, Figure, Name, Point, row_figure, shortened, signed

EACH_AS_DOT = 400  # classes; more are drawn as bubbles, each for all classes of about one count and accuracy
_TOGETHER = 60  # classes; the dots of more would hide those of another run
_NAMED = 12  # classes whose names fit on the map

Array = npt.NDArray[Any]
Curve = tuple[Name, Sequence[Point]]
PerClass = tuple[Name, Sequence[int], Sequence[float | None]]  # training images of each class, and a value


def _room(runs: Sequence[tuple[Name, *tuple[Any, ...]]], more: int = 0) -> int:
    """The right margin, in pixels, for labels as long as those of the runs and `more` letters."""
    return 14 + round(6.7 * (max(len(run[0].label) for run in runs) + more))


def accuracy_by_count(runs: Sequence[PerClass], class_names: Sequence[str]) -> list[Markup]:
    """Accuracy of each class against its training images: one figure of all runs or, of many classes, one a run, each
    with the trends of all runs."""
    together = len(class_names) <= _TOGETHER
    counts = {count for _, of_run, _ in runs for count in of_run}
    axis = svg.log_axis("training images of the class, logarithmic", counts)
    trends = [(name, trend(of_run, shares)) for name, of_run, shares in runs]
    figures: list[Markup] = []
    for dotted in [runs] if together else [[run] for run in runs]:
        figure = Figure(axis, 320 if together else 260, (60, _room(runs), 40, 34), PERCENT)
        _name_groups(figure, {shot_group(count) for count in counts})
        for run in dotted:
            _dot_classes(figure, run, class_names)
        names = [name for name, *_ in dotted]
        for name, points in trends:
            figure.path(points, f"line {name.look}" if name in names else f"line {name.look} thin")
        figure.labels([(points[-1][1], name) for name, points in trends])
        figures.append(figure.svg("accuracy of each class against its training images"))
    return figures


def _name_groups(figure: Figure, groups: Collection[str]) -> None:
    """Lines between the shot groups, and the names of those that have classes: few and many beside the lines, medium a
    line of text higher, since there may be little room between the two."""
    axis = figure.x
    for limit in (FEW_BELOW, MANY_ABOVE):
        if axis.low < limit < axis.high:
            figure.rule(limit, "rule")
    few, many = (axis.share(min(max(limit, axis.low), axis.high)) for limit in (FEW_BELOW, MANY_ABOVE))
    middle = (few + many) / 2
    places = {"few": (few, -10, "end", -6), "medium": (middle, -24, "middle", 0), "many": (many, -10, "start", 6)}
    for group, (share, y, anchor, dx) in places.items():
        if group in groups:
            figure.text(share, y, group, "axis", anchor, dx)


def _dot_classes(figure: Figure, run: PerClass, class_names: Sequence[str]) -> None:
    """A dot for each class; of many classes bubbles, whose area is the number of classes of about this count and
    accuracy."""
    name, counts, shares = run
    look, axis = f"{name.look} faint", figure.x
    known = [(counts[c], 100 * share, class_names[c]) for c, share in enumerate(shares) if share is not None]
    if len(known) <= EACH_AS_DOT:
        for count, y, class_name in known:
            figure.dot(count, y, look, 4, f"{class_name}: {count:,} training images, {name.label} {y:.1f} %")
        return
    across, step = 24, 5  # columns, and percent of a row
    cells = Counter((int(axis.share(count) * across), step * round(y / step)) for count, y, _ in known)
    for (column, y), classes in cells.items():
        count = axis.low * (axis.high / axis.low) ** ((column + 0.5) / across)
        title = f"{classes:,} classes of about {count:,.0f} training images and {y} %"
        figure.dot(count, y, look, 1 + 8 * math.sqrt(classes / max(cells.values())), title)


def trend(counts: Sequence[int], accuracies: Sequence[float | None], groups: int = 12) -> list[Point]:
    """(training images, accuracy in percent) from the smallest class to the largest: of each class where there are few,
    else means over `groups` groups of equally many classes (of the counts, the geometric mean)."""
    known = sorted((count, share) for count, share in zip(counts, accuracies, strict=True) if share is not None)
    parts = np.array_split(np.array(known, dtype=float), min(len(known), groups))
    return [(float(np.exp(np.log(part[:, 0]).mean())), float(100 * part[:, 1].mean())) for part in parts]


def group_bars(runs: Sequence[tuple[Name, Mapping[str, Any]]], classes: Mapping[str, int]) -> Markup:
    """Overall accuracy and that of each shot group, all runs side by side; `classes` counts those of each group."""
    headings = {"top1": f"overall · all {sum(classes.values()):,} classes"}
    for group, limit in GROUP_LIMITS.items():
        noun = "class" if classes[group] == 1 else "classes"
        headings[group] = f"{group} · {classes[group]:,} {noun} with {limit} images"
    rows = {heading: [(name, scores[key]) for name, scores in runs] for key, heading in headings.items()}
    rows = {heading: row for heading, row in rows.items() if all(share is not None for _, share in row)}
    figure, places = row_figure(Axis("", 0, 100), rows, 20, (4, _room(runs, 6), 4, 0))
    for y, _, name, share in places:
        figure.bar(0, 100, y + 10, 14, "track")
        figure.bar(0, 100 * share, y + 10, 14, name.look)
        figure.label(y + 10, name, f"{percent(share)}  ")
    return figure.svg("accuracy by shot group, percent")


def worst_classes(rows: Sequence[tuple[str, int, str, Sequence[tuple[Name, float | None]]]]) -> Markup:
    """Rows of (class, training images, remark, accuracy of each run) on one axis."""
    figure = Figure(PERCENT, 64 * len(rows), (4, 14, 40, 10))
    for top, (class_name, count, remark, accuracies) in zip(range(0, figure.height, 64), rows, strict=True):
        track = top + 44
        figure.text(0, top + 16, shortened(class_name), "row")
        figure.text(1, top + 16, f"{count:,} images", "axis", "end")
        figure.text(0, top + 31, remark, "axis")
        figure.bar(0, 100, track, 2, "track")
        known = [(name, 100 * share) for name, share in accuracies if share is not None]
        values = [value for _, value in known]
        figure.bar(min(values), max(values), track, 3, "between")
        for place, (name, value) in enumerate(known):
            hidden = sum(abs(value - other) < 1.5 for other in values[:place])  # dots that this one would hide
            figure.dot(value, track + 7 * hidden, name.look, 5, f"{class_name}: {name.label} {value:.1f} %")
    return figure.svg("the classes of lowest accuracy, percent")


def curves(runs: Sequence[Curve], heading: str, low: float | None) -> Markup:
    """Lines over the epochs, and a dot at the last value; the y axis begins at `low`, if given."""
    epochs = svg.linear_axis("epoch", [x for _, points in runs for x, _ in points], 0)
    axis = svg.linear_axis("", [y for _, points in runs for _, y in points], low, 4)
    figure = Figure(epochs, 150, (12, _room(runs), 40, 44), axis)
    for name, points in runs:
        parts = np.array_split(np.array(points, dtype=float), min(len(points), 150))
        figure.path([part.mean(0).tolist() for part in parts], f"line {name.look}")
        figure.dot(*points[-1], name.look, 2.5, f"{name.label} {points[-1][1]:.3g}")
    figure.labels([(points[-1][1], name) for name, points in runs])
    return figure.svg(f"{heading} over the epochs")


def reliability(name: Name, right_N: Array, confidences: Mapping[str, Array]) -> Markup:
    """Share of right predictions against confidence, in bins of equal width, for each of `confidences` ('before',
    'after'); a dot's area is the bin's share of the images."""
    figure = Figure(replace(PERCENT, label="confidence, percent"), 220, (26, 16, 40, 34), PERCENT)
    figure.path([(0, 0), (100, 100)], "line diagonal")
    edges = np.linspace(0, 1, 16)[1:-1]
    for look, confidence_N in confidences.items():
        bin_N = np.searchsorted(edges, confidence_N, side="left")
        for inside_N in (bin_N == number for number in np.unique(bin_N)):
            x, y = 100 * float(confidence_N[inside_N].mean()), 100 * float(right_N[inside_N].mean())
            count = int(inside_N.sum())
            title = f"{count:,} images, confidence {x:.1f} %, right {y:.1f} % ({look} scaling)"
            figure.dot(x, y, f"{name.look} {look}", 1.5 + 9 * math.sqrt(count / len(right_N)), title)
    return figure.svg(f"accuracy against confidence, {name.label}")


def _accuracy_axis(values: Sequence[float], ticks: int = 5) -> Axis:
    """An axis over accuracies with a point of room, within 0 to 100: a difference of a tenth must not fill the figure,
    and one value alone has no range."""
    return svg.linear_axis("accuracy, percent", [max(0.0, min(values) - 1), min(100.0, max(values) + 1)], None, ticks)


def prior_sweep(runs: Sequence[tuple[Name, Sequence[Point], float | None]], key: str) -> Markup:
    """An accuracy (percent) over tau, the strength of the post-hoc prior, and a ring at the tau that validation chose,
    if any."""
    # A little room at the left: a ring at 0 would cover the numbers of the axis.
    taus = Axis("tau", -0.1, 2, tuple((tau, f"{tau:g}") for tau in (0, 0.5, 1, 1.5, 2)))
    axis = _accuracy_axis([y for _, points, _ in runs for _, y in points], 4)
    figure = Figure(taus, 150, (26, _room(runs), 40, 34), axis)
    for name, points, chosen in runs:
        figure.path(points, f"line {name.look}")
        for tau, y in points:
            title = f"{name.label}, tau {tau:g}: {y:.1f} %"
            figure.dot(tau, y, name.look, 2.5, title)
            if tau == chosen:
                figure.dot(tau, y, f"{name.look} ring", 7, f"{title}, chosen on validation")
    figure.labels([(points[-1][1], name) for name, points, _ in runs])
    return figure.svg(f"accuracy ({key}) over the strength of the post-hoc prior")


def cosines(runs: Sequence[tuple[Name, Array]], classes: int) -> Markup:
    """Histograms of the cosines [G, K] between a class of the group and the other classes; the regular simplex's cosine
    as a line."""
    present = [group for group in range(len(GROUPS)) if any(counts_GK[group].any() for _, counts_GK in runs)]
    peak, step, top = 44, 68, 18  # pixels; above each histogram, which may begin at -1, a line for the group's name
    axis = Axis("cosine", -1, 1, tuple((value, signed(f"{value:g}")) for value in (-1, -0.5, 0, 0.5, 1)))
    figure = Figure(axis, top + step * len(present), (22, 14, 40, 10))
    for row, group in enumerate(present, 1):
        foot = top + step * row - 6
        figure.path([(-1, foot), (1, foot)], "line base")
        bins = 40 if max(counts_GK[group].sum() for _, counts_GK in runs) < 2000 else 100
        counts = [(name, counts_GK[group].reshape(bins, -1).sum(1)) for name, counts_GK in runs]
        shares = [(name, count / count.sum()) for name, count in counts if count.any()]
        scale = peak / max(share.max() for _, share in shares)
        for name, share in shares:
            figure.path(_outline(share * scale, foot), f"line {name.look} thin area")
        figure.text(0, foot - peak - 4, GROUPS[group], "row")
    simplex = -1 / (classes - 1)
    figure.rule(simplex, "simplex")
    figure.text(axis.share(simplex), -6, signed(f"regular simplex {simplex:.2g}"), "axis", "middle")
    return figure.svg("cosines between the classes, by shot group")


def _outline(heights: Array, foot: float) -> list[Point]:
    """The outline of a histogram over -1 to 1 that stands on `foot`, without the empty bins at its ends."""
    filled = np.flatnonzero(heights)
    first, end = filled[0], filled[-1] + 1
    xs = np.linspace(-1, 1, len(heights) + 1)[first : end + 1].repeat(2)
    return list(zip(xs.tolist(), (foot - np.pad(heights[first:end].repeat(2), 1)).tolist(), strict=True))


def spread(runs: Sequence[tuple[Name, Sequence[str], Array]]) -> Markup:
    """By shot group: the median of the values [C] of its classes, half of the classes (thick) and nine in ten (thin).
    A run gives the shot group of each class and its value; NaN is a class without a value."""
    rows: dict[str, list[tuple[Name, Array]]] = {}
    for group in GROUPS:
        row = [(name, values_C[np.isfinite(values_C) & (np.array(groups) == group)]) for name, groups, values_C in runs]
        if any(len(values) for _, values in row):
            rows[group] = row
    values = np.concatenate([values for row in rows.values() for _, values in row])
    axis = svg.linear_axis("1 \N{MINUS SIGN} cosine", values.tolist(), 0)
    figure, places = row_figure(axis, rows, 20, (4, _room(runs, 6), 40, 10))
    for y, group, name, values in places:
        if len(values):
            low, start, middle, end, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
            figure.bar(low, high, y + 10, 2, name.look)
            figure.bar(start, end, y + 10, 7, f"{name.look} faint")
            figure.dot(middle, y + 10, name.look, 4.5, f"{name.label}, {group}: median {middle:.3f}")
            figure.label(y + 10, name, f"{middle:.2f}  ")
    return figure.svg("spread within classes, by shot group")


def feature_map(
    places_M2: Array, labels_M: Array, predicted_M: Array, groups: Sequence[str], class_names: Sequence[str]
) -> Markup:
    """Images as dots, coloured by shot group, wrong predictions as rings; a class's name is each dot's title and, of
    few classes, written over its middle."""
    figure = Figure(Axis("", 0, 1), 320, (10, 12, 10, 12))
    points_M2 = (places_M2 - places_M2.min(0)) / np.maximum(np.ptp(places_M2, axis=0), 1e-9)
    points_M2[:, 1] = figure.height * (1 - points_M2[:, 1])
    wrong_M = labels_M != predicted_M
    for row in np.argsort(wrong_M, kind="stable"):  # rings lie on top
        true, said = int(labels_M[row]), int(predicted_M[row])
        look, title = groups[true], shortened(class_names[true])
        if wrong_M[row]:
            look, title = f"{look} ring", f"{title} taken for {shortened(class_names[said])}"
        figure.dot(float(points_M2[row, 0]), float(points_M2[row, 1]), look, 3, title)
    for c, class_name in enumerate(class_names if len(class_names) <= _NAMED else ()):
        of_class_M = labels_M == c
        if of_class_M.any():
            x, y = np.median(points_M2[of_class_M], axis=0).tolist()
            anchor = "start" if x < 0.25 else "end" if x > 0.75 else "middle"  # a long name stays on a phone
            figure.text(x, y + 5, shortened(class_name, 16), "place", anchor)
    return figure.svg("a map of the encoder's features in two dimensions")


def over_seeds(rows: ByHeading) -> Markup:
    """For each method its seeds as faint dots, their mean and, below it, the paired difference to the first method with
    its 95 % interval (none with one seed). The rows' values are those of `compare.json`."""
    axis = _accuracy_axis([100 * value for row in rows.values() for _, result in row for value in result["values"]])
    figure, places = row_figure(axis, rows, 52, (4, 14, 40, 10))
    for y, _, name, result in places:
        figure.bar(axis.low, axis.high, y + 20, 1, "track")
        figure.text(0, y + 10, name.label, f"name {name.look}")
        for value in result["values"]:
            figure.dot(100 * value, y + 20, f"{name.look} faint", 4, f"{name.label}: {percent(value)} %")
        figure.dot(100 * result["mean"], y + 20, name.look, 5.5)
        sd = "" if result["sd"] is None else f" ± {percent(result['sd'])}"
        figure.text(1, y + 10, percent(result["mean"]) + sd, "value", "end")
        if "difference" in result:
            mean, low, high = (result["difference"][key] for key in ("mean", "low", "high"))
            interval = "" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
            figure.text(1, y + 38, signed(f"difference {100 * mean:+.1f}{interval}"), "value", "end")
    return figure.svg("accuracy over the seeds, percent")
