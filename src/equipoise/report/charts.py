"""The figures of the report, each from plain values. `None` is "nothing there", as in `metrics.py`.

Shapes: C classes, G shot groups, K bins of a cosine, N images.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from equipoise.evaluation.metrics import FEW_BELOW, GROUPS, MANY_ABOVE, shot_group
from equipoise.report.svg import LINE, PERCENT, Axis, Figure, linear_axis, log_axis, shortened, signed, width_of

Array = npt.NDArray[Any]
Accuracies = Sequence[float | None]
LIMITS = {
    "many": f"more than {MANY_ABOVE}",
    "medium": f"{FEW_BELOW} to {MANY_ABOVE}",
    "few": f"fewer than {FEW_BELOW}",
}
EACH_AS_DOT = 400  # classes; more are drawn as bubbles, each for the classes of one place
_TOGETHER = 60  # classes; the dots of more would hide those of another run
_LABELLED = 12  # classes whose names fit on the map
_BARE = Axis("", 0, 100, ())


class Name(NamedTuple):
    """Of a run: what it is called, and the class (`run0`) that gives it its colour throughout."""

    label: str
    look: str


def _beside(names: Sequence[Name], more: int = 0) -> int:
    """Pixels at the right for labels as long as these and `more` letters."""
    return 14 + round(6.7 * (max(len(name.label) for name in names) + more))


# ---------------------------------------------------------------------------------------------- accuracy


def accuracy_by_count(
    runs: Sequence[tuple[Name, Sequence[int], Accuracies]], class_names: Sequence[str]
) -> list[Markup]:
    """Accuracy of each class against its training images: one figure of all runs, or, of many classes, one a run."""
    axis = log_axis("training images of the class, logarithmic", [count for _, counts, _ in runs for count in counts])
    if len(class_names) <= _TOGETHER:
        return [_by_count(axis, runs, runs, class_names, 320)]
    return [_by_count(axis, [run], runs, class_names, 260) for run in runs]


def _by_count(
    axis: Axis,
    dotted: Sequence[tuple[Name, Sequence[int], Accuracies]],
    runs: Sequence[tuple[Name, Sequence[int], Accuracies]],
    class_names: Sequence[str],
    height: int,
) -> Markup:
    figure = Figure(axis, height, PERCENT, (46, _beside([name for name, _, _ in runs]), 40, 34))
    edges = [axis.low, FEW_BELOW, MANY_ABOVE, axis.high]
    for limit in edges[1:3]:
        if axis.low < limit < axis.high:
            figure.rule(limit, "rule")
    groups = {shot_group(count) for _, counts, _ in runs for count in counts}
    _name_groups(figure, groups, [axis.share(min(max(edge, axis.low), axis.high)) for edge in edges])
    for name, counts, accuracies in dotted:
        known = [(counts[c], 100 * share, class_names[c]) for c, share in enumerate(accuracies) if share is not None]
        if len(known) <= EACH_AS_DOT:
            for count, percent, class_name in known:
                told = f"{class_name}: {count:,} training images, {name.label} {percent:.1f} %"
                figure.dot(count, figure.y(percent), f"{name.look} faint", 4 if len(known) <= _TOGETHER else 3, told)
        else:
            _bubbles(figure, name, known)
    ends: list[tuple[float, str, str]] = []
    for name, counts, accuracies in runs:
        points = [(count, figure.y(percent)) for count, percent in trend(counts, accuracies)]
        if points:
            figure.line(points, name.look if name in [run[0] for run in dotted] else f"{name.look} thin")
            ends.append((points[-1][1], name.label, name.look))
    figure.labels_at_right(ends)
    return figure.svg(
        f"accuracy of each class against its training images: {', '.join(run[0].label for run in dotted)}"
    )


def _name_groups(figure: Figure, groups: Collection[str], edges: Sequence[float]) -> None:
    """Names of the groups that have classes, over the middles of their parts of the axis; a name wider than its part,
    on a phone, goes outwards from it, clear of medium's."""
    size = 12
    medium = (edges[1] + edges[2]) / 2
    for group, outwards, low, high in zip(reversed(GROUPS), (-1, 0, 1), edges[:-1], edges[1:], strict=True):
        if group in groups:
            middle, half = (low + high) / 2, width_of(group, size) / 2
            over_edge = half - (high - low) / 2 * figure.narrowest
            over_medium = half + (width_of("medium", size) + size) / 2 - abs(middle - medium) * figure.narrowest
            figure.word(middle, -8, group, "axis", "middle", outwards * max(0, over_edge, over_medium))


def _bubbles(figure: Figure, name: Name, known: Sequence[tuple[int, float, str]]) -> None:
    """A bubble's area is the number of classes of about this count and accuracy."""
    across, up = 24, 20
    places: dict[tuple[int, int], list[float]] = {}
    for count, percent, _ in known:
        place = (int(figure.x.share(count) * across), round(percent / 100 * up))
        places.setdefault(place, []).append(percent)
    largest = max(len(percents) for percents in places.values())
    for (column, _), percents in places.items():
        middle = figure.x.low * (figure.x.high / figure.x.low) ** ((column + 0.5) / across)
        percent, classes = float(np.mean(percents)), len(percents)
        told = f"{classes:,} classes of about {middle:,.0f} training images and {percent:.0f} %"
        figure.dot(middle, figure.y(percent), f"{name.look} faint", 1 + 8 * math.sqrt(classes / largest), told)


def trend(counts: Sequence[int], accuracies: Accuracies, groups: int = 12) -> list[tuple[float, float]]:
    """(training images, accuracy in percent) from the smallest class to the largest: of each class where there are few,
    else means over `groups` groups of equally many classes (of the counts, the geometric mean)."""
    known = sorted((counts[c], share) for c, share in enumerate(accuracies) if share is not None)
    parts = np.array_split(np.array(known, dtype=float).reshape(-1, 2), min(len(known), groups) or 1)
    return [(float(np.exp(np.log(part[:, 0]).mean())), float(100 * part[:, 1].mean())) for part in parts if len(part)]


def group_bars(runs: Sequence[tuple[Name, Mapping[str, Any]]], classes: Mapping[str, int]) -> Markup:
    """Overall accuracy and that of each shot group, all runs side by side."""
    rows = {"overall": ("top1", f"overall · all {sum(classes.values()):,} classes")}
    for group, limit in LIMITS.items():
        noun = "class" if classes[group] == 1 else "classes"
        rows[group] = (group, f"{group} · {classes[group]:,} {noun} with {limit} images")
    rows = {row: said for row, said in rows.items() if any(figures[said[0]] is not None for _, figures in runs)}
    step = 20
    height = len(rows) * (26 + step * len(runs) + 10)
    figure = Figure(_BARE, height, margins=(4, _beside([name for name, _ in runs], 6), 4, 0))
    y = 0
    for figure_name, said in rows.values():
        figure.word(0, y + 16, said, "row")
        y += 26
        for name, figures in runs:
            share = figures[figure_name]
            if share is not None:
                figure.bar(0, 100, y + step / 2, 14, "track")
                figure.bar(0, 100 * share, y + step / 2, 14, name.look)
                figure.word(1, y + step / 2 + 4, f"{100 * share:.1f}  {name.label}", f"name {name.look}", dx=8)
            y += step
        y += 10
    return figure.svg("accuracy by shot group, percent")


def worst_classes(rows: Sequence[tuple[str, int, str, Sequence[tuple[Name, float | None]]]]) -> Markup:
    """Rows of (class, training images, remark, accuracy of each run) on one axis."""
    step = 64
    figure = Figure(PERCENT, len(rows) * step, margins=(4, 14, 40, 10))
    for number, (class_name, count, remark, values) in enumerate(rows):
        top = number * step
        track = top + 44
        figure.word(0, top + 16, shortened(class_name), "row")
        figure.word(1, top + 16, f"{count:,} images", "axis", "end")
        figure.word(0, top + 31, remark, "axis")
        known = [(name, 100 * value) for name, value in values if value is not None]
        figure.bar(0, 100, track, 2, "track")
        if known:
            figure.bar(min(value for _, value in known), max(value for _, value in known), track, 3, "between")
        for place, (name, value) in enumerate(known):
            # A dot that would hide an earlier one lies below it.
            hidden = sum(abs(value - other) < 1.5 for _, other in known[:place])
            figure.dot(value, track + 7 * hidden, name.look, 5, f"{class_name}: {name.label} {value:.1f} %")
    return figure.svg("the classes of lowest accuracy, percent")


# ---------------------------------------------------------------------------------------------- training


def curves(runs: Sequence[tuple[Name, Sequence[float], Sequence[float]]], label: str, low: float | None) -> Markup:
    """Lines over the epochs; the y axis begins at `low`, if given. `label` is written above, by the page. Of one value,
    as after one epoch, there is no line: it is a dot with its figure."""
    epochs = linear_axis("epoch", [x for _, xs, _ in runs for x in xs], 0)
    whole = tuple(tick for tick in epochs.ticks if tick[0].is_integer())
    if len(whole) > 1:
        epochs = replace(epochs, ticks=whole)
    values = [y for _, _, ys in runs for y in ys]
    if all(len(xs) == 1 for _, xs, _ in runs):
        values.append(0.0)  # one value alone has no range
    told = [
        name if len(ys) > 1 else name._replace(label=f"{name.label} {signed(f'{ys[0]:.3g}')}") for name, _, ys in runs
    ]
    figure = Figure(epochs, 150, linear_axis("", values, low, 4), (12, _beside(told), 40, 44))
    for name, xs, ys in runs:
        parts = np.array_split(np.array([xs, ys], dtype=float).T, min(len(xs), 150))
        figure.line([(float(x), figure.y(float(y))) for x, y in (part.mean(0) for part in parts)], name.look)
        figure.dot(xs[-1], figure.y(ys[-1]), name.look, 2.5 if len(xs) > 1 else 4)
    figure.labels_at_right(
        [(figure.y(ys[-1]), name.label, name.look) for name, (_, _, ys) in zip(told, runs, strict=True)]
    )
    return figure.svg(f"{label} over the epochs")


# ---------------------------------------------------------------------------------------------- calibration, prior


def reliability(name: Name, right_N: Array, confidences: Mapping[str, Array]) -> Markup:
    """Share of right predictions against confidence, in bins of equal width, for each of `confidences` ('before',
    'after'); a dot's area is the bin's share of the images."""
    across = Axis("confidence, percent", 0, 100, PERCENT.ticks)
    figure = Figure(across, 220, PERCENT, (26, 16, 40, 34))
    figure.line([(0, figure.y(0)), (100, figure.y(100))], "diagonal")
    bins = 15
    for look, confidence_N in confidences.items():
        bin_N = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence_N, side="left")
        images = np.bincount(bin_N, minlength=bins)
        filled = images > 0
        mean = 100 * np.bincount(bin_N, confidence_N, bins)[filled] / images[filled]
        accuracy = 100 * np.bincount(bin_N, right_N, bins)[filled] / images[filled]
        for x, y, count in zip(mean, accuracy, images[filled], strict=True):
            radius = 1.5 + 9 * math.sqrt(count / len(right_N))
            told = f"{count:,} images, confidence {x:.1f} %, right {y:.1f} % ({look} scaling)"
            figure.dot(float(x), figure.y(float(y)), f"{name.look} {look}", radius, told)
    return figure.svg(f"accuracy against confidence, {name.label}")


def _percent_axis(values: Sequence[float], ticks: int = 5) -> Axis:
    """Of accuracies, with a point of room: so that a difference of a tenth does not fill the figure, and one value
    alone has an axis within 0 to 100."""
    return linear_axis("accuracy, percent", [max(0.0, min(values) - 1), min(100.0, max(values) + 1)], None, ticks)


def prior_sweep(runs: Sequence[tuple[Name, Sequence[Mapping[str, Any]], float | None]], figure_name: str) -> Markup:
    """A figure over the strength of the post-hoc prior; a ring where validation chose it."""
    # A little room at the left: a ring at 0 would cover the figures of the axis.
    taus = Axis("tau", -0.1, 2, tuple((tau, f"{tau:g}") for tau in (0, 0.5, 1, 1.5, 2)))
    shares = [100 * row[figure_name] for _, rows, _ in runs for row in rows]
    figure = Figure(taus, 150, _percent_axis(shares, 4), (26, _beside([run[0] for run in runs]), 40, 34))
    for name, rows, chosen in runs:
        figure.line([(row["tau"], figure.y(100 * row[figure_name])) for row in rows], name.look)
        for row in rows:
            y = figure.y(100 * row[figure_name])
            told = f"{name.label}, tau {row['tau']:g}: {100 * row[figure_name]:.1f} %"
            figure.dot(row["tau"], y, name.look, 2.5, told)
            if row["tau"] == chosen:
                figure.dot(row["tau"], y, f"{name.look} ring", 7, f"{told}, chosen on validation")
    figure.labels_at_right([(figure.y(100 * rows[-1][figure_name]), name.label, name.look) for name, rows, _ in runs])
    return figure.svg(f"accuracy ({figure_name}) over the strength of the post-hoc prior")


# ---------------------------------------------------------------------------------------------- geometry


def cosines(runs: Sequence[tuple[Name, Array]], classes: int) -> Markup:
    """Histograms of the cosines [G, K] between a class of the group and the other classes; the regular simplex's cosine
    as a line."""
    present = [group for group in range(len(GROUPS)) if any(counts_GK[group].sum() for _, counts_GK in runs)]
    peak_height = 44
    step, top = peak_height + 24, 18  # a line for the group's name above each histogram: it may begin at -1
    axis = Axis("cosine", -1, 1, tuple((value, signed(f"{value:g}")) for value in (-1, -0.5, 0, 0.5, 1)))
    figure = Figure(axis, top + step * len(present), margins=(22, 14, 40, 10))
    for row, group in enumerate(present):
        foot = top + step * (row + 1) - 6
        figure.line([(-1, foot), (1, foot)], "base")
        coarse = max(counts_GK[group].sum() for _, counts_GK in runs) < 2000
        shares = []
        for name, counts_GK in runs:
            heights = counts_GK[group].reshape(40 if coarse else 100, -1).sum(1)
            shares.append((name, heights / max(1, heights.sum())))
        peak = max(share.max() for _, share in shares)
        for name, share in shares:
            if not share.any():
                continue
            outline = _steps(share * (peak_height / peak), foot)
            if len(runs) <= 2:  # more areas over each other show nothing
                figure.area(outline, name.look)
            figure.line(outline, f"{name.look} thin")
        figure.word(0, foot - peak_height - 4, GROUPS[group], "row")
    simplex = -1 / (classes - 1)
    figure.rule(simplex, "simplex")
    figure.word(axis.share(simplex), -6, signed(f"regular simplex {simplex:.2g}"), "axis", "middle")
    return figure.svg("cosines between the classes, by shot group")


def _steps(heights: Array, foot: float) -> list[tuple[float, float]]:
    """The outline of a histogram over -1 to 1 that stands on `foot`, without the empty bins at its ends."""
    edges = np.linspace(-1, 1, len(heights) + 1).tolist()
    filled = np.flatnonzero(heights).tolist()
    first, last = filled[0], filled[-1]
    outline = [(edges[first], foot)]
    for index in range(first, last + 1):
        y = foot - float(heights[index])
        outline += [(edges[index], y), (edges[index + 1], y)]
    return [*outline, (edges[last + 1], foot)]


def spread(runs: Sequence[tuple[Name, Mapping[str, Array]]]) -> Markup:
    """By group: the median over its classes, half of the classes (thick) and nine in ten (thin)."""
    known = [values[~np.isnan(values)] for _, groups in runs for values in groups.values()]
    axis = linear_axis("1 \N{MINUS SIGN} cosine", np.concatenate(known).tolist(), 0)
    step = 20
    present = [group for group in GROUPS if any(np.isfinite(groups[group]).any() for _, groups in runs)]
    figure = Figure(
        axis, len(present) * (34 + step * len(runs)), margins=(4, _beside([name for name, _ in runs], 6), 40, 10)
    )
    y = 0
    for group in present:
        figure.word(0, y + 16, group, "row")
        y += 26
        for name, groups in runs:
            values = groups[group][np.isfinite(groups[group])]
            if len(values):
                low, start, middle, end, high = (
                    float(value) for value in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
                )
                figure.bar(low, high, y + step / 2, 2, name.look)
                figure.bar(start, end, y + step / 2, 7, f"{name.look} faint")
                figure.dot(middle, y + step / 2, name.look, 4.5, f"{name.label}, {group}: median {middle:.3f}")
                figure.word(1, y + step / 2 + 4, f"{middle:.2f}  {name.label}", f"name {name.look}", dx=8)
            y += step
        y += 8
    return figure.svg("spread within classes, by shot group")


def feature_map(
    places_M2: Array, labels_M: Array, predicted_M: Array, groups_C: Array, class_names: Sequence[str]
) -> Markup:
    """Images as dots, coloured by shot group, wrong predictions as rings; a class's name is each dot's title and, of
    few classes, written over its middle."""
    low, high = places_M2.min(0), places_M2.max(0)
    unit_M2 = (places_M2 - low) / np.where(high > low, high - low, 1)
    height = 320
    figure = Figure(Axis("", 0, 1, ()), height, margins=(10, 12, 10, 12))
    points_M2 = np.stack([unit_M2[:, 0], height * (1 - unit_M2[:, 1])], axis=1)
    wrong_M = labels_M != predicted_M
    for row in np.argsort(wrong_M, kind="stable").tolist():  # rings lie on top
        (x, y), true = points_M2[row].tolist(), int(labels_M[row])
        group, title = GROUPS[groups_C[true]], shortened(class_names[true])
        if wrong_M[row]:
            group, title = f"{group} ring", f"{title} taken for {shortened(class_names[int(predicted_M[row])])}"
        figure.dot(x, y, group, 3, title)
    if len(class_names) <= _LABELLED:
        present = [(name, points_M2[labels_M == c]) for c, name in enumerate(class_names) if (labels_M == c).any()]
        _name_places(figure, [(name, *np.median(points, axis=0).tolist()) for name, points in present])
    return figure.svg("a map of the encoder's features in two dimensions")


def _name_places(figure: Figure, names: Sequence[tuple[str, float, float]]) -> None:
    """Names about their places, clear of each other on a phone. One that would cover one before it goes a line up or
    down; where that is taken too it is left out."""
    taken: list[tuple[float, float, float]] = []  # left, right, y
    for name, x, middle in names:
        text = shortened(name, 16)
        width = width_of(text, 13)
        # A long name at a side stays on a phone.
        anchor, before = ("start", 0.0) if x < 0.25 else ("end", 1.0) if x > 0.75 else ("middle", 0.5)
        left = x * figure.narrowest - before * width
        for y in (middle, middle - LINE, middle + LINE):
            beside = [left >= end or left + width <= start or abs(y - other) >= LINE for start, end, other in taken]
            if all(beside) and 0 <= y <= figure.height:
                taken.append((left, left + width, y))
                figure.word(x, y + 5, text, "place", anchor)
                break


# ---------------------------------------------------------------------------------------------- over seeds


def over_seeds(rows: Mapping[str, Sequence[tuple[Name, Mapping[str, Any]]]]) -> Markup:
    """By figure, for each method: its seeds as faint dots and their mean."""
    values = [100 * value for row in rows.values() for _, told in row for value in told["values"]]

    def draw(figure: Figure, name: Name, told: Mapping[str, Any], y: float) -> str:
        for value in told["values"]:
            figure.dot(100 * value, y, f"{name.look} faint", 4, f"{name.label}: {100 * value:.1f} %")
        figure.dot(100 * told["mean"], y, name.look, 5.5)
        return f"{100 * told['mean']:.1f}" + ("" if told["sd"] is None else f" ± {100 * told['sd']:.1f}")

    return _by_method(rows, _percent_axis(values), draw).svg("accuracy over the seeds, percent")


def differences(rows: Mapping[str, Sequence[tuple[Name, Mapping[str, Any]]]]) -> Markup:
    """By figure, for each method: the paired difference to the first and its 95 % interval."""
    told_all = [told["difference"] for row in rows.values() for _, told in row]
    ends = [100 * value for told in told_all for value in told.values() if value is not None]

    def draw(figure: Figure, name: Name, told: Mapping[str, Any], y: float) -> str:
        mean, low, high = (told["difference"][key] for key in ("mean", "low", "high"))
        if low is not None:
            figure.bar(100 * low, 100 * high, y, 3, name.look)
        figure.dot(100 * mean, y, name.look, 5)
        return signed(f"{100 * mean:+.1f}" + ("" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"))

    axis = linear_axis("percentage points", [*ends, 0.0])
    return _by_method(rows, axis, draw).svg("paired differences to the first method, percentage points")


def _by_method(
    rows: Mapping[str, Sequence[tuple[Name, Mapping[str, Any]]]],
    axis: Axis,
    draw: Callable[[Figure, Name, Mapping[str, Any], float], str],
) -> Figure:
    """Of each figure a heading, below it each method: its name, what `draw` says, and below them what it draws."""
    step = 36
    figure = Figure(axis, sum(32 + step * len(row) for row in rows.values()), margins=(4, 14, 40, 10))
    if axis.low < 0 < axis.high:
        figure.rule(0, "rule")
    y = 0
    for heading, row in rows.items():
        figure.word(0, y + 20, heading, "row")
        y += 28
        for name, told in row:
            figure.bar(axis.low, axis.high, y + 22, 1, "track")
            figure.word(0, y + 12, name.label, f"name {name.look}")
            figure.word(1, y + 12, draw(figure, name, told, y + 22), "value", "end")
            y += step
        y += 4
    return figure
