"""Numbers become figures: SVG whose marks are placed, not scaled.

Across, a place is a share of the figure's width; down, it is in pixels. So one figure fits a phone and a wide screen
with letters and dots of the same size. Colours are the page's: a mark has a class (`run0`, `few`), to which the page
gives its colour, in light and in dark.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Point = tuple[float, float]  # x in the units of the axis, y in pixels
LINE = 15  # pixels from one line of text to the next
_PHONE = 328  # pixels; the narrowest page that a figure with its margins is made for


@dataclass(frozen=True)
class Axis:
    """`low` to `high`, with ticks (value, text), and what it measures, with its unit."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1 (beyond, where it lies outside)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


PERCENT = Axis("accuracy, percent", 0, 100, tuple((value, str(value)) for value in (0, 25, 50, 75, 100)))


def linear_axis(label: str, values: Iterable[float], low: float | None = None, ticks: int = 5) -> Axis:
    """An axis over `values`, from `low` if given, with about that many round ticks."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    start, end = min(known) if low is None else low, max(known)
    if end <= start:
        end = start + (abs(start) or 1.0)
    raw = (end - start) / ticks
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(start / step + 1e-9), math.ceil(end / step - 1e-9)
    marks = tuple((number * step, signed(f"{number * step:.6g}")) for number in range(first, last + 1))
    return Axis(label, marks[0][0], marks[-1][0], marks)


def log_axis(label: str, values: Iterable[float]) -> Axis:
    """A logarithmic axis over positive `values`, with a little room at both ends; ticks at 1, 2 and 5 or, over more
    than two decades, at powers of ten."""
    known = [value for value in values if value > 0] or [1.0]
    low, high = min(known) / 1.15, max(known) * 1.15
    factors = (1, 2, 5) if high / low < 250 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return Axis(label, low, high, tuple((tick, f"{tick:,.6g}") for tick in ticks if low <= tick <= high), log=True)


class Figure:
    """Marks over an x axis, `height` pixels high; with a `y` axis the ticks of it too.

    The margins (top, right, bottom, left) hold what is written around the marks.
    """

    def __init__(
        self, x: Axis, height: int, y: Axis | None = None, margins: tuple[int, int, int, int] = (26, 12, 40, 34)
    ):
        self.x, self.y_axis, self.height, self.margins = x, y, height, margins
        self._marks: list[Markup] = []
        for value, text in x.ticks:
            if y is None:
                self.rule(value, "grid")
            self.word(x.share(value), height + 18, text, "tick", "middle")
        if x.label:
            self.word(0, height + 35, x.label, "axis")
        if y is not None:
            for value, text in y.ticks:
                self._add('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>', self.y(value))
                self.word(0, self.y(value) + 4, text, "tick", "end", dx=-7)
            self.word(0, 14 - margins[0], y.label, "axis", dx=-margins[3])

    @property
    def narrowest(self) -> int:
        """Pixels across on a phone. Words that are clear of each other there are so on any wider page."""
        return _PHONE - self.margins[1] - self.margins[3]

    def y(self, value: float) -> float:
        """Pixels from the top."""
        assert self.y_axis is not None
        return self.height * (1 - self.y_axis.share(value))

    def _add(self, template: str, *values: object) -> None:
        self._marks.append(Markup(template).format(*values))

    def _across(self, value: float) -> str:
        return f"{100 * self.x.share(value):.2f}%"

    def rule(self, value: float, look: str) -> None:
        """A line from top to bottom."""
        self._add('<line class="{0}" x1="{1}" x2="{1}" y1="0" y2="{2}"/>', look, self._across(value), self.height)

    def word(self, share: float, y: float, text: str, look: str, anchor: str = "start", dx: float = 0) -> None:
        """Text whose baseline is at `y`, at a share of the width."""
        place = f"{100 * share:.2f}%"
        self._add(
            '<text class="{}" x="{}" y="{:.1f}" dx="{:g}" text-anchor="{}">{}</text>', look, place, y, dx, anchor, text
        )

    def dot(self, x: float, y: float, look: str, radius: float = 4, title: str = "") -> None:
        told = Markup("<title>{}</title>").format(title) if title else ""
        self._add(
            '<circle class="dot {}" cx="{}" cy="{:.1f}" r="{:.3g}">{}</circle>', look, self._across(x), y, radius, told
        )

    def bar(self, low: float, high: float, y: float, thickness: float, look: str) -> None:
        """A bar from one value to another, centred on `y`."""
        width = f"{100 * (self.x.share(high) - self.x.share(low)):.2f}%"
        self._add(
            '<rect class="bar {}" x="{}" width="{}" y="{:.1f}" height="{:g}"/>',
            look, self._across(low), width, y - thickness / 2, thickness,
        )  # fmt: skip

    def line(self, points: Sequence[Point], look: str) -> None:
        self._path("M" + "L".join(self._stretched(points)), f"line {look}")

    def area(self, points: Sequence[Point], look: str) -> None:
        self._path("M" + "L".join(self._stretched(points)) + "Z", f"area {look}")

    def _stretched(self, points: Sequence[Point]) -> list[str]:
        return [f"{1000 * self.x.share(x):.1f} {y:.1f}" for x, y in points]

    def _path(self, way: str, look: str) -> None:
        self._add(
            '<svg width="100%" height="{0}" viewBox="0 0 1000 {0}" preserveAspectRatio="none">'
            '<path class="{1}" d="{2}"/></svg>',
            self.height, look, way,
        )  # fmt: skip

    def labels_at_right(self, labels: Sequence[tuple[float, str, str]]) -> None:
        """(y, text, look) written beside the right end, moved apart where they would cover each other."""
        placed: list[float] = []
        ordered = sorted(labels)
        for y, _, _ in ordered:
            placed.append(max(y, placed[-1] + LINE) if placed else y)
        # What was pushed below the last pixel moves up again, and what it meets with it.
        limit = float(self.height)
        for index in reversed(range(len(placed))):
            placed[index] = min(placed[index], limit)
            limit = placed[index] - LINE
        for y, (_, text, look) in zip(placed, ordered, strict=True):
            self.word(1, y + 4, text, f"name {look}", dx=8)

    def svg(self, description: str) -> Markup:
        """The figure, complete; `description` is what it says to who cannot see it."""
        top, right, bottom, left = self.margins
        return Markup(
            '<div class="plot" style="padding:{}px {}px {}px {}px"><svg class="figure" role="img" aria-label="{}" '
            'width="100%" height="{}">{}</svg></div>'
        ).format(top, right, bottom, left, description, self.height, Markup("").join(self._marks))


def width_of(text: str, size: float) -> float:
    """About how many pixels a text takes in letters of that size: rather too many, as no font is known."""
    wide = sum(letter.isupper() or unicodedata.east_asian_width(letter) in "FW" for letter in text)
    return size * (wide + 0.7 * (len(text) - wide))


def shortened(text: str, length: int = 30) -> str:
    """`text`, or its beginning with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def signed(number: str) -> str:
    """A written number with a minus that is as wide as a plus."""
    return number.replace("-", "\N{MINUS SIGN}")
