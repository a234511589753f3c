"""Numbers become figures: SVG whose marks are placed, not scaled.

Across, a place is a share of the figure's width; down, it is in pixels: one figure fits a phone and a wide screen, its
letters of one size. Colours are the page's, in light and in dark: each mark has CSS classes (`look`, as `run0 faint`).
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from markupsafe import Markup


class Name(NamedTuple):
    """A run's label, and the CSS class (`run0`) that gives it its colour in every figure."""

    label: str
    look: str


Point = tuple[float, float]
Margins = tuple[int, int, int]  # top, bottom, left; pixels
ByHeading = Mapping[str, Sequence[tuple[Name, Any]]]  # below each heading a value of each run
Rows = list[tuple[int, str, Name, Any]]  # of each its top (pixels), heading, run and value
_LINE = 15  # pixels from one line of text to the next


@dataclass(frozen=True)
class Axis:
    """`low` to `high`, with ticks (value, text); `label` says what it measures, with its unit."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


PERCENT = Axis("accuracy, percent", 0, 100, tuple((value, str(value)) for value in (0, 25, 50, 75, 100)))


def linear_axis(label: str, values: Collection[float], low: float | None = None) -> Axis:
    """An axis over `values`, from `low` if given, with about five round ticks."""
    start, end = min(values) if low is None else low, max(values)
    if end <= start:
        end = start + (abs(start) or 1.0)
    raw = (end - start) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(start / step + 1e-9), math.ceil(end / step - 1e-9)
    marks = tuple((number * step, signed(f"{number * step:.6g}")) for number in range(first, last + 1))
    return Axis(label, marks[0][0], marks[-1][0], marks)


def log_axis(label: str, values: Collection[float]) -> Axis:
    """A logarithmic axis over positive `values`, with a little room; ticks at 1, 2, 5 or, of many, at powers of ten."""
    low, high = min(values) / 1.15, max(values) * 1.15
    factors = (1, 2, 5) if high / low < 250 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return Axis(label, low, high, tuple((tick, f"{tick:,.6g}") for tick in ticks if low <= tick <= high), log=True)


class Figure:
    """Marks over an x axis, `height` pixels high, placed in the units of the axes; without a `y` axis, y is pixels from
    the top. Text is placed at a share of the width and at pixels from the top. The margins hold what is around; the one
    at the right is as wide as the labels there."""

    def __init__(self, x: Axis, height: int, margins: Margins, y: Axis | None = None):
        self.x, self.height, self._y_axis, self._margins, self._right = x, height, y, margins, 14
        self._marks: list[Markup] = []
        for value, text in x.ticks:
            if y is None:
                self.rule(value, "grid")
            self.text(x.share(value), height + 18, text, "tick", "middle")
        if x.label:
            self.text(0, height + 35, x.label, "axis")
        if y is not None:
            for value, text in y.ticks:
                self._add('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>', self._down(value))
                self.text(0, self._down(value) + 4, text, "tick", "end", dx=-7)
            self.text(0, 14 - margins[0], y.label, "axis", dx=-margins[2])

    def _down(self, y: float) -> float:
        """Pixels from the top."""
        return y if self._y_axis is None else self.height * (1 - self._y_axis.share(y))

    def _across(self, x: float) -> str:
        return f"{100 * self.x.share(x):.2f}%"

    def _add(self, template: str, *values: object) -> None:
        self._marks.append(Markup(template).format(*values))  # which escapes them

    def rule(self, x: float, look: str) -> None:
        """A line from top to bottom."""
        self._add('<line class="{0}" x1="{1}" x2="{1}" y1="0" y2="{2}"/>', look, self._across(x), self.height)

    def text(self, share: float, y: float, text: str, look: str, anchor: str = "start", dx: float = 0) -> None:
        """Text at a share of the width; `y` is its baseline's, in pixels."""
        template = '<text class="{}" x="{:.2f}%" y="{:.1f}" dx="{:g}" text-anchor="{}">{}</text>'
        self._add(template, look, 100 * share, y, dx, anchor, text)

    def dot(self, x: float, y: float, look: str, radius: float = 4, title: str = "") -> None:
        inside = Markup("<title>{}</title>").format(title) if title else ""
        place = self._across(x), self._down(y)
        self._add('<circle class="dot {}" cx="{}" cy="{:.1f}" r="{:.3g}">{}</circle>', look, *place, radius, inside)

    def bar(self, low: float, high: float, y: float, thickness: float, look: str) -> None:
        """A bar from one value to another, centred on `y`."""
        width = f"{100 * (self.x.share(high) - self.x.share(low)):.2f}%"
        place = self._across(low), width, self._down(y) - thickness / 2
        self._add('<rect class="bar {}" x="{}" width="{}" y="{:.1f}" height="{:g}"/>', look, *place, thickness)

    def path(self, points: Iterable[Point], look: str) -> None:
        """A line, or the area within it."""
        places = "L".join(f"{1000 * self.x.share(x):.1f} {self._down(y):.1f}" for x, y in points)
        path = Markup('<path class="{}" d="M{}"/>').format(look, places)
        stretched = '<svg width="100%" height="{0}" viewBox="0 0 1000 {0}" preserveAspectRatio="none">{1}</svg>'
        self._add(stretched, self.height, path)

    def label(self, y: float, text: str, look: str) -> None:
        """Text beside the right end, at a height in pixels."""
        self.text(1, y + 4, text, look, dx=8)
        self._right = max(self._right, 14 + round(6.7 * len(text)))

    def labels(self, runs: Iterable[tuple[Name, Sequence[Point]]]) -> None:
        """The runs' labels beside their last points, moved apart where they would cover each other."""
        ordered = sorted((self._down(points[-1][1]), name) for name, points in runs)
        ys = list(accumulate((y for y, _ in ordered), lambda above, y: max(y, above + _LINE)))
        # What was pushed below the last pixel moves up again, and pushes up what it meets.
        ys = list(accumulate(reversed(ys), lambda below, y: min(y, below - _LINE), initial=float(self.height + _LINE)))
        for y, (_, name) in zip(reversed(ys[1:]), ordered, strict=True):
            self.label(y, name.label, f"name {name.look}")

    def svg(self, description: str) -> Markup:
        """The complete figure; `description` is for those who cannot see it."""
        top, bottom, left = self._margins
        return Markup(
            '<div class="plot" style="padding:{}px {}px {}px {}px"><svg class="figure" role="img" aria-label="{}" '
            'width="100%" height="{}">{}</svg></div>'
        ).format(top, self._right, bottom, left, description, self.height, Markup("").join(self._marks))


def row_figure(x: Axis, rows: ByHeading, row_height: int, margins: Margins) -> tuple[Figure, Rows]:
    """A figure with room for rows below headings, one for each run, and these rows."""
    figure = Figure(x, sum(36 + row_height * len(of_heading) for of_heading in rows.values()), margins)
    places, y = Rows(), 0
    for heading, of_heading in rows.items():
        figure.text(0, y + 16, heading, "row")
        for name, value in of_heading:
            places.append((y + 26, heading, name, value))
            y += row_height
        y += 36
    return figure, places


def shortened(text: str, length: int = 30) -> str:
    """`text`, or its beginning with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def signed(number: str) -> str:
    """A written number with a minus that is as wide as a plus."""
    return number.replace("-", "\N{MINUS SIGN}")
