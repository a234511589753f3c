"""Axes and placed marks, against values worked out by hand."""

import re
from itertools import pairwise

import pytest

from equipoise.report.svg import Axis, Figure, Name, linear_axis, log_axis, row_figure

TENTHS = Axis("x", 0, 10, ((0, "0"), (10, "10")))


@pytest.mark.parametrize(
    ("values", "low", "ticks"),
    [
        ([0.3, 9.7], None, ["0", "2", "4", "6", "8", "10"]),
        ([62.1, 97.8], None, ["60", "70", "80", "90", "100"]),
        ([-21.6, 3.9], None, ["\u221230", "\u221220", "\u221210", "0", "10"]),
        ([0.02, 0.051], 0, ["0", "0.02", "0.04", "0.06"]),
        ([5, 5], None, ["5", "6", "7", "8", "9", "10"]),
        ([0, 0], 0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
)
def test_linear_ticks_are_round_and_hold_all_values(values, low, ticks):
    axis = linear_axis("x", values, low)
    assert [text for _, text in axis.ticks] == ticks
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values)


def test_logarithmic_ticks():
    assert [text for _, text in log_axis("n", [2, 124]).ticks] == ["2", "5", "10", "20", "50", "100"]
    assert [text for _, text in log_axis("n", [2, 4980]).ticks] == ["10", "100", "1,000"]
    axis = log_axis("n", [10, 1000])
    assert axis.share(100) == pytest.approx(0.5)
    assert axis.share(10) == pytest.approx(1 - axis.share(1000))
    assert 0 < axis.share(10) < 0.05
    assert log_axis("n", [7, 7]).share(7) == pytest.approx(0.5)


def test_marks_lie_where_the_axes_put_them():
    figure = Figure(TENTHS, 200, (26, 40, 34), Axis("y", 0, 4))
    figure.dot(2.5, 1, "run0", title="<here & there>")
    figure.path([(0, 4), (5, 0)], "line run1")
    figure.bar(2, 4, 3, 10, "few")
    svg = figure.svg('of "marks"')
    assert (
        '<circle class="dot run0" cx="25.00%" cy="150.0" r="4"><title>&lt;here &amp; there&gt;</title></circle>' in svg
    )
    assert '<path class="line run1" d="M0.0 0.0L500.0 200.0"/>' in svg
    assert '<rect class="bar few" x="20.00%" width="20.00%" y="45.0" height="10"/>' in svg
    assert 'aria-label="of &#34;marks&#34;"' in svg


def test_labels_at_the_right_do_not_cover_each_other():
    figure = Figure(Axis("", 0, 1), 100, (0, 0, 0))
    figure.labels([(Name(label, ""), [(0, 50), (1, y)]) for label, y in (("c", 96), ("a", 10), ("b", 95), ("d", 97))])
    found = re.findall(r'y="([\d.]+)"[^>]*>([abcd])<', figure.svg(""))
    heights = [float(y) for y, _ in found]
    assert [name for _, name in found] == ["a", "b", "c", "d"]
    assert heights[0] == 14
    assert all(after - before >= 15 for before, after in pairwise(heights))
    assert heights[-1] <= 104


def test_rows_lie_below_their_headings():
    rows = {"a": [(Name("one", "run0"), 1), (Name("two", "run1"), 2)], "b": [(Name("one", "run0"), 3)]}
    figure, places = row_figure(TENTHS, rows, 20, (4, 4, 4))
    assert [(y, heading, value) for y, heading, _, value in places] == [(26, "a", 1), (46, "a", 2), (102, "b", 3)]
    assert figure.height == 132
    headings = re.findall(r'class="row" x="0.00%" y="([\d.]+)"[^>]*>(\w)<', figure.svg(""))
    assert headings == [("16.0", "a"), ("92.0", "b")]
