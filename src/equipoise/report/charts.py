"""The figures of the report, each drawn from plain values. `None` is "there is nothing to average", as in `metrics.py`.

Shapes: C classes, G shot groups, K bins of a cosine, M images of the map, N images, P pairs of classes.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from equipoise.base.errors import UserError, several
from equipoise.data.decode import decode
from equipoise.data.images import ImageList
from equipoise.evaluation.metrics import FEW_BELOW, GROUP_LIMITS, GROUPS, MANY_ABOVE, percent, shot_group
from equipoise.report import svg
from equipoise.report.svg import PERCENT, Axis, ByHeading, Figure, Name, Point, row_figure, shortened, signed

EACH_AS_DOT = 100  # classes; more are drawn as bubbles, each for all classes of about one count and accuracy

Array = npt.NDArray[Any]
PerClass = tuple[Name, Sequence[int], Sequence[float | None]]  # training images of each class, and a value


def accuracy_by_count(runs: Sequence[PerClass], class_names: Sequence[str]) -> list[Markup]:
    """Classes against their training images: one figure or, of many, one a run with the trends of all runs. Lines lie
    between the shot groups, and beside them the names of those that have classes."""
    counts = {count for _, of_run, _ in runs for count in of_run}
    axis, groups = svg.log_axis("training images of the class, logarithmic", counts), set(map(shot_group, counts))
    trends = [(name, trend(of_run, shares)) for name, of_run, shares in runs]
    beside = {"few": (FEW_BELOW, "end", -6), "medium": (MANY_ABOVE, "end", -6), "many": (MANY_ABOVE, "start", 6)}
    figures: list[Markup] = []
    for dotted in [runs] if len(class_names) <= EACH_AS_DOT else [[run] for run in runs]:
        figure = Figure(axis, 300, (46, 40, 34), PERCENT)
        for limit in (FEW_BELOW, MANY_ABOVE):
            if axis.low < limit < axis.high:
                figure.rule(limit, "rule")
        for group, (limit, anchor, dx) in beside.items():
            if group in groups:
                figure.text(axis.share(min(max(limit, axis.low), axis.high)), -10, group, "axis", anchor, dx)
        for run in dotted:
            _dot_classes(figure, run, class_names)
        names = [name for name, *_ in dotted]
        for name, points in trends:
            figure.path(points, f"line {name.look}" if name in names else f"line {name.look} thin")
        figure.labels(trends)
        figures.append(figure.svg("accuracy of each class against its training images"))
    return figures


def _dot_classes(figure: Figure, run: PerClass, class_names: Sequence[str]) -> None:
    """A dot for each class, or of many classes bubbles whose area is the number of classes of about one place."""
    name, counts, shares = run
    look, axis = f"{name.look} faint", figure.x
    known = [(counts[c], 100 * share, class_names[c]) for c, share in enumerate(shares) if share is not None]
    if len(class_names) <= EACH_AS_DOT:
        for count, y, class_name in known:
            figure.dot(count, y, look, 4, f"{class_name}: {count:,} training images, {name.label} {y:.1f} %")
        return
    across, step = 24, 5  # columns, and percent of a row
    cells = Counter((int(axis.share(count) * across), step * round(y / step)) for count, y, _ in known)
    for (column, y), classes in cells.items():
        count = axis.low * (axis.high / axis.low) ** ((column + 0.5) / across)
        title = f"{classes:,} classes of about {count:,.0f} training images and {y} %"
        figure.dot(count, y, look, 1 + 8 * math.sqrt(classes / max(cells.values())), title)


def trend(counts: Sequence[int], accuracies: Sequence[float | None]) -> list[Point]:
    """(training images, accuracy in percent) from the smallest class to the largest: of each class where there are few,
    else means over twelve groups of equally many classes (of the counts, the geometric mean)."""
    known = sorted((count, share) for count, share in zip(counts, accuracies, strict=True) if share is not None)
    parts = np.array_split(np.array(known, dtype=float), min(len(known), 12))
    return [(float(np.exp(np.log(part[:, 0]).mean())), float(100 * part[:, 1].mean())) for part in parts]


def group_bars(runs: Sequence[tuple[Name, Mapping[str, Any]]], classes: Mapping[str, int]) -> Markup:
    """Overall accuracy and that of each shot group, all runs side by side; `classes` counts those of each group."""
    headings = {"top1": f"overall · all {sum(classes.values()):,} classes"}
    for group, limit in GROUP_LIMITS.items():
        headings[group] = f"{group} · {several(classes[group], 'class')} with {limit} images"
    rows = {heading: [(name, scores[key]) for name, scores in runs] for key, heading in headings.items()}
    rows = {heading: row for heading, row in rows.items() if all(share is not None for _, share in row)}
    figure, places = row_figure(Axis("", 0, 100), rows, 20, (4, 4, 0))
    for y, _, name, share in places:
        figure.bar(0, 100, y + 10, 14, "track")
        figure.bar(0, 100 * share, y + 10, 14, name.look)
        figure.label(y + 10, f"{percent(share)}  {name.label}", f"name {name.look}")
    return figure.svg("accuracy by shot group, percent")


def worst_classes(rows: Sequence[tuple[str, int, str, Sequence[tuple[Name, float | None]]]]) -> Markup:
    """Rows of (class, training images, remark, accuracy of each run) on one axis."""
    figure = Figure(PERCENT, 64 * len(rows), (4, 40, 10))
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


def curves(runs: Sequence[tuple[Name, Sequence[Point]]], heading: str, low: float | None) -> Markup:
    """Lines over the epochs, and a dot at the last value; the y axis begins at `low`, if given."""
    epochs = svg.linear_axis("epoch", [x for _, points in runs for x, _ in points], 0)
    axis = svg.linear_axis("", [y for _, points in runs for _, y in points], low)
    figure = Figure(epochs, 150, (12, 40, 44), axis)
    for name, points in runs:
        parts = np.array_split(np.array(points, dtype=float), min(len(points), 150))
        figure.path([part.mean(0).tolist() for part in parts], f"line {name.look}")
        figure.dot(*points[-1], name.look, 2.5, f"{name.label} {points[-1][1]:.3g}")
    figure.labels(runs)
    return figure.svg(f"{heading} over the epochs")


def reliability(name: Name, right_N: Array, confidences: Mapping[str, Array]) -> Markup:
    """Share of right predictions in bins of confidence, 'before' and 'after'; a dot's area is the number of images."""
    figure = Figure(replace(PERCENT, label="confidence, percent"), 220, (26, 40, 34), PERCENT)
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


def _accuracy_axis(values: Sequence[float]) -> Axis:
    """With a point of room, within 0 to 100: a difference of a tenth must not fill the figure."""
    return svg.linear_axis("accuracy, percent", [max(0.0, min(values) - 1), min(100.0, max(values) + 1)])


def prior_sweep(runs: Sequence[tuple[Name, Sequence[Point], float | None]], key: str) -> Markup:
    """An accuracy (percent) over tau, the strength of the post-hoc prior; a ring at the tau that validation chose."""
    # A little room at the left: a ring at 0 would cover the numbers of the axis.
    taus = Axis("tau", -0.1, 2, tuple((tau, f"{tau:g}") for tau in (0, 0.5, 1, 1.5, 2)))
    axis = _accuracy_axis([y for _, points, _ in runs for _, y in points])
    figure = Figure(taus, 150, (26, 40, 34), axis)
    for name, points, chosen in runs:
        figure.path(points, f"line {name.look}")
        for tau, y in points:
            title = f"{name.label}, tau {tau:g}: {y:.1f} %"
            figure.dot(tau, y, name.look, 2.5, title)
            if tau == chosen:
                figure.dot(tau, y, f"{name.look} ring", 7, f"{title}, chosen on validation")
    figure.labels([run[:2] for run in runs])
    return figure.svg(f"accuracy ({key}) over the strength of the post-hoc prior")


def cosines(runs: Sequence[tuple[Name, Array]], classes: int) -> Markup:
    """Histograms of the cosines [G, K] of a group's classes to all others; that of the regular simplex is a line."""
    present = [group for group in range(len(GROUPS)) if any(counts_GK[group].any() for _, counts_GK in runs)]
    peak, step, top = 44, 68, 18  # pixels; above each histogram, which may begin at -1, a line for the group's name
    axis = Axis("cosine", -1, 1, tuple((value, signed(f"{value:g}")) for value in (-1, -0.5, 0, 0.5, 1)))
    figure = Figure(axis, top + step * len(present), (22, 40, 10))
    edges = np.linspace(-1, 1, 51).repeat(2).tolist()
    for row, group in enumerate(present, 1):
        foot = top + step * row - 6
        counts = [(name, counts_GK[group].reshape(50, -1).sum(1)) for name, counts_GK in runs]
        shares = [(name, count / count.sum()) for name, count in counts if count.any()]
        scale = peak / max(share.max() for _, share in shares)
        for name, share in shares:
            heights = foot - scale * np.pad(share.repeat(2), 1)
            figure.path(zip(edges, heights.tolist(), strict=True), f"line {name.look} thin area")
        figure.text(0, foot - peak - 4, GROUPS[group], "row")
    simplex = -1 / (classes - 1)
    figure.rule(simplex, "simplex")
    figure.text(axis.share(simplex), -6, signed(f"regular simplex {simplex:.2g}"), "axis", "middle")
    return figure.svg("cosines between the classes, by shot group")


def spread(runs: Sequence[tuple[Name, Sequence[str], Array]]) -> Markup:
    """By shot group: the median of its classes' values [C] (NaN: none), half of them (thick) and nine in ten (thin)."""
    rows: dict[str, list[tuple[Name, Array]]] = {}
    for group in GROUPS:
        row = [(name, values_C[np.isfinite(values_C) & (np.array(groups) == group)]) for name, groups, values_C in runs]
        if any(len(values) for _, values in row):
            rows[group] = row
    values = np.concatenate([values for row in rows.values() for _, values in row])
    axis = svg.linear_axis("1 \N{MINUS SIGN} cosine", values.tolist(), 0)
    figure, places = row_figure(axis, rows, 20, (4, 40, 10))
    for y, group, name, values in places:
        if len(values):
            low, start, middle, end, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
            figure.bar(low, high, y + 10, 2, name.look)
            figure.bar(start, end, y + 10, 7, f"{name.look} faint")
            figure.dot(middle, y + 10, name.look, 4.5, f"{name.label}, {group}: median {middle:.3f}")
            figure.label(y + 10, f"{middle:.2f}  {name.label}", f"name {name.look}")
    return figure.svg("spread within classes, by shot group")


def feature_map(
    places_M2: Array, labels_M: Array, predicted_M: Array, groups: Sequence[str], class_names: Sequence[str]
) -> Markup:
    """Images as dots, coloured by shot group, mistakes as rings; of few classes, the names over their middles."""
    figure = Figure(Axis("", 0, 1), 320, (10, 10, 12))
    points_M2 = (places_M2 - places_M2.min(0)) / np.maximum(np.ptp(places_M2, axis=0), 1e-9)
    points_M2[:, 1] = figure.height * (1 - points_M2[:, 1])
    wrong_M = labels_M != predicted_M
    for row in np.argsort(wrong_M, kind="stable"):  # rings lie on top
        true, said = int(labels_M[row]), int(predicted_M[row])
        look, title = groups[true], shortened(class_names[true])
        if wrong_M[row]:
            look, title = f"{look} ring", f"{title} taken for {shortened(class_names[said])}"
        figure.dot(float(points_M2[row, 0]), float(points_M2[row, 1]), look, 3, title)
    for c, class_name in enumerate(class_names if len(class_names) <= 12 else ()):  # as many as fit
        of_class_M = labels_M == c
        if of_class_M.any():
            x, y = np.median(points_M2[of_class_M], axis=0).tolist()
            anchor = "start" if x < 0.25 else "end" if x > 0.75 else "middle"  # a long name stays on a phone
            figure.text(x, y + 5, shortened(class_name, 16), "place", anchor)
    return figure.svg("a map of the encoder's features in two dimensions")


def over_seeds(rows: ByHeading) -> Markup:
    """For each method its seeds as faint dots, their mean and, below it, the paired difference to the first method; the
    rows' values are those of `compare.json`."""
    axis = _accuracy_axis([100 * value for row in rows.values() for _, result in row for value in result["values"]])
    figure, places = row_figure(axis, rows, 52, (4, 40, 10))
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


def confused_pairs(labels_N: Array, predicted_N: Array) -> list[tuple[int, int, int, int]]:
    """(class, class that it was taken for, images taken so, images of the class): those of the most images first; of
    equal ones, of the larger share."""
    counts, images = Counter(zip(labels_N.tolist(), predicted_N.tolist(), strict=True)), Counter(labels_N.tolist())
    pairs = [(true, said, mistakes, images[true]) for (true, said), mistakes in counts.items() if true != said]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[2] / pair[3], pair))


def surest(observed: Mapping[str, Array], true: int, said: int) -> list[int]:
    """The rows of the images of a class that were taken for that class, the surest first."""
    rows = np.flatnonzero((observed["labels_N"] == true) & (observed["predicted_N"] == said))
    return rows[np.argsort(-observed["confidence_N"][rows], kind="stable")].tolist()


def thumbnails(images: ImageList, rows: Sequence[int]) -> list[Markup]:
    """An <img> for each of these images that can be read, with the picture inside."""
    pictures: list[Markup] = []
    for row in rows:
        if url := thumbnail(images, row, 72):
            look = "pixels" if url.startswith("data:image/png") else "photo"  # which are smoothed
            image = '<img class="{}" src="{}" alt="{}" title="{}" width="56" height="56">'
            of = images.class_names[images.labels_N[row]], images.images.name(row)
            pictures.append(Markup(image).format(look, url, *of))
    return pictures


def thumbnail(images: ImageList, row: int, side: int) -> str | None:
    """A data URL of the image, of `side` pixels at most; PNG where it has 40 or fewer. None where it cannot be read."""
    try:
        picture = Image.fromarray(decode(images, row))
    except UserError:
        return None
    kind = "png" if max(picture.size) <= 40 else "jpeg"
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
