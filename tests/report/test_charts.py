"""What the figures of the report show, read back from their SVG."""

import re
from itertools import combinations

import numpy as np
import pytest

from equipoise.report import charts
from equipoise.report.charts import EACH_AS_DOT, Name
from equipoise.report.svg import width_of

BCL, CE = Name("bcl", "run0"), Name("ce", "run1")


def circles(svg: str, look: str) -> list[tuple[float, float]]:
    pattern = rf'<circle class="dot {look}" cx="([-\d.]+)%" cy="([-\d.]+)"'
    return [(float(x), float(y)) for x, y in re.findall(pattern, svg)]


def words(svg: str, look: str) -> list[tuple[str, float, float, float]]:
    """(text, left, right, y) of the words of that look, in pixels on a page 360 wide with 16 beside the figure."""
    _, right, _, left = map(int, re.search(r"padding:(\d+)px (\d+)px (\d+)px (\d+)px", svg).groups())
    pattern = rf'<text class="{look}" x="([-\d.]+)%" y="([-\d.]+)" dx="([-\d.]+)" text-anchor="(\w+)">(.*?)</text>'
    found = []
    for x, y, dx, anchor, text in re.findall(pattern, svg):
        width = width_of(text, 12)
        start = (
            float(x) / 100 * (328 - left - right) + float(dx) - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        )
        found.append((text, start, start + width, float(y)))
    return found


def apart(words: list[tuple[str, float, float, float]]) -> bool:
    return all(
        one[2] <= other[1] + 0.1 or other[2] <= one[1] + 0.1 or abs(one[3] - other[3]) >= 12
        for one, other in combinations(words, 2)
    )


def test_trend_of_few_classes_is_the_classes():
    assert charts.trend([100, 10, 1], [0.9, None, 0.2]) == [
        (1, pytest.approx(20)),
        (pytest.approx(100), pytest.approx(90)),
    ]
    assert charts.trend([5, 5], [None, None]) == []


def test_trend_of_many_classes_is_means_of_equal_groups():
    counts = [2 ** (place // 10) for place in range(120)]
    accuracies = [place / 120 for place in range(120)]
    found = charts.trend(counts, accuracies)
    assert len(found) == 12
    for group, (count, percent) in enumerate(found):
        assert count == pytest.approx(2**group)
        assert percent == pytest.approx(100 * np.mean(accuracies[10 * group : 10 * group + 10]))


def test_one_figure_of_few_classes_and_one_a_run_of_many():
    few = charts.accuracy_by_count([(BCL, [100, 5], [1, 0.5]), (CE, [100, 5], [0.5, 0])], ["a", "<b>"])
    assert len(few) == 1
    assert len(circles(few[0], "run0 faint")) == len(circles(few[0], "run1 faint")) == 2
    assert "&lt;b&gt;: 5 training images, bcl 50.0 %" in few[0]
    heights = sorted(y for _, y in circles(few[0], "run1 faint"))
    assert heights == [160, 320]  # 50 % and 0 % of 320 pixels
    classes = EACH_AS_DOT + 100
    counts, accuracies = [5] * 50 + [500] * (classes - 50), [0.0] * 50 + [1.0] * (classes - 50)
    many = charts.accuracy_by_count([(BCL, counts, accuracies)], [str(c) for c in range(classes)])
    bubbles = re.findall(r"<title>(\d+) classes of about [\d,]+ training images and (\d+) %", many[0])
    assert sorted(bubbles) == [("450", "100"), ("50", "0")]


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ((2, 50, 124), ["few", "medium", "many"]),
        ((1, 99, 101), ["few", "medium", "many"]),
        ((19, 20, 101), ["few", "medium", "many"]),
        ((2, 60, 1000), ["few", "medium", "many"]),
        ((5, 60, 4980), ["few", "medium", "many"]),
        ((1, 60, 100_000), ["few", "medium", "many"]),
        ((19, 90), ["few", "medium"]),
        ((90, 300), ["medium", "many"]),
        ((300, 301), ["many"]),
        ((2, 124), ["few", "many"]),
    ],
)
@pytest.mark.parametrize("label", ["ce", "logit-adjusted", "x" * 24])
def test_every_group_is_named_and_no_name_covers_another(counts, groups, label):
    runs = [(Name(label, "run0"), counts, [0.5] * len(counts))]
    (svg,) = charts.accuracy_by_count(runs, [str(c) for c in range(len(counts))])
    named = [word for word in words(svg, "axis") if word[0] in ("few", "medium", "many")]
    assert [word[0] for word in named] == groups
    assert apart(words(svg, "axis"))
    assert min(word[1] for word in named) > -62, "off a phone's left edge"


def test_group_bars_leave_out_what_is_not_there():
    figures = {"top1": 0.75, "many": None, "medium": 0.8, "few": 0.5}
    svg = charts.group_bars([(BCL, figures), (CE, {**figures, "few": 0.25})], {"many": 0, "medium": 1, "few": 3})
    assert re.findall(r'<rect class="bar run(\d)" x="0.00%" width="([\d.]+)%"', svg) == [
        ("0", "75.00"), ("1", "75.00"), ("0", "80.00"), ("1", "80.00"), ("0", "50.00"), ("1", "25.00"),
    ]  # fmt: skip
    assert "medium · 1 class with 20 to 100 images" in svg
    assert "few · 3 classes with fewer than 20 images" in svg
    assert "many" not in svg


def test_equal_accuracies_do_not_hide_each_other():
    svg = charts.worst_classes([("a", 1200, "", [(BCL, 0.5), (CE, 0.5)]), ("b", 3, "remark", [(BCL, None), (CE, 1.0)])])
    (one,), two = circles(svg, "run0"), circles(svg, "run1")
    assert one[0] == two[0][0] == 50
    assert two[0][1] - one[1] >= 5
    assert two[1][0] == 100
    assert "1,200 images" in svg


def test_reliability_is_accuracy_by_bin():
    right = np.array([True, True, False, False])
    before = np.array([0.9, 0.9, 0.9, 0.2])
    svg = charts.reliability(BCL, right, {"before": before})
    assert circles(svg, "run0 before") == [(20.0, 220.0), (90.0, pytest.approx(220 * (1 - 2 / 3), abs=0.1))]


def test_the_chosen_tau_has_a_ring():
    rows = [{"tau": tau, "few": 0.5 + tau / 10} for tau in (0.0, 1.0, 2.0)]
    svg = charts.prior_sweep([(BCL, rows, 1.0), (CE, rows, None)], "few")
    assert len(circles(svg, "run0 ring")) == 1
    assert circles(svg, "run0 ring")[0] == circles(svg, "run0")[1]
    assert circles(svg, "run1 ring") == []


@pytest.mark.parametrize(("accuracy", "ticks"), [(0.0, (0, 1)), (0.5, (49, 51)), (1.0, (99, 100))])
def test_one_accuracy_alone_has_an_axis_within_0_to_100(accuracy, ticks):
    rows = [{"tau": tau, "few": accuracy} for tau in (0.0, 1.0, 2.0)]
    svg = charts.prior_sweep([(BCL, rows, 1.0)], "few")
    told = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', svg)]
    assert (min(told), max(told)) == ticks


def test_cosines_show_the_simplex_and_the_groups_that_are_there():
    counts = np.zeros((3, 200), int)
    counts[2, 120] = 7
    svg = charts.cosines([(BCL, counts)], 11)
    assert 'class="simplex" x1="45.00%"' in svg
    assert "regular simplex \u22120.1" in svg
    assert re.findall(r'class="row"[^>]*>(\w+)<', svg) == ["few"]
    left = float(re.search(r'class="line run0 thin" d="M([\d.]+)', svg)[1])
    assert left == 600  # the cosine 0.2, from -1 to 1 over 1000


def test_seeds_and_differences():
    told = {"values": [0.8, 0.9], "mean": 0.85, "sd": 0.0707, "difference": {"mean": -0.05, "low": -0.2, "high": 0.1}}
    svg = charts.over_seeds({"few": [(BCL, told)]})
    assert "85.0 ± 7.1" in svg
    assert len(circles(svg, "run0 faint")) == 2
    svg = charts.differences({"few": [(CE, told)]})
    assert "\u22125.0 [\u221220.0, +10.0]" in svg
    alone = {**told, "sd": None, "difference": {"mean": -0.05, "low": None, "high": None}}
    assert "\u22125.0<" in charts.differences({"few": [(CE, alone)]})


def test_a_group_s_name_lies_above_its_histogram():
    """Also where all cosines are -1, where the names are."""
    counts = np.zeros((3, 200), int)
    counts[:, 0] = 7
    svg = charts.cosines([(BCL, counts)], 11)
    tops = [
        min(float(y) for y in re.findall(r" ([\d.]+)", way))
        for way in re.findall(r'class="line run0 thin" d="([^"]*)"', svg)
    ]
    feet = [float(y) for y in re.findall(r'class="line base" d="M0.0 ([\d.]+)', svg)]
    names = [y for _, _, _, y in words(svg, "row")]
    assert len(tops) == len(feet) == len(names) == 3
    assert all(name + 3 < top for name, top in zip(names, tops, strict=True))
    assert all(foot < name - 12 for foot, name in zip(feet, names[1:], strict=False))


def test_one_epoch_is_a_dot_with_its_value():
    svg = charts.curves([(BCL, [1.0], [2.0741]), (CE, [1.0], [-0.0000125])], "loss", None)
    assert [text for text, *_ in words(svg, "name run.")] == ["bcl 2.07", "ce \u22121.25e\u221205"]
    assert 'r="4"' in svg
    ticks = [text for text, *_ in words(svg, "tick")]
    assert ticks[:2] == ["0", "1"], "no part of an epoch"
    svg = charts.curves([(BCL, [1.0], [2.0741])], "contrastive term", None)
    assert [text for text, *_ in words(svg, "tick")][2] == "0", "where the axis of the values begins"
    svg = charts.curves([(BCL, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]), (CE, [1.0], [1.5])], "loss", None)
    assert [text for text, *_ in words(svg, "name run.")] == ["ce 1.5", "bcl"]
    assert [text for text, *_ in words(svg, "tick")][:4] == ["0", "1", "2", "3"]
    svg = charts.curves([(BCL, [0.2, 0.6], [3.0, 2.0])], "loss", None)
    assert [text for text, *_ in words(svg, "tick")][:4] == ["0", "0.2", "0.4", "0.6"]


def test_names_on_the_map_do_not_cover_each_other():
    """Four classes lie in one place, which has room for three names; each dot says what it is all the same."""
    labels = np.repeat(np.arange(6), 5)
    corners = np.array([[0.0, 0.0], [1.0, 1.0]])
    places = np.concatenate([np.full((20, 2), 0.5), corners.repeat(5, axis=0)])
    predicted = labels.copy()
    predicted[0] = 5
    names = ["<a>", *(f"a long name {number}" for number in range(5))]
    svg = charts.feature_map(places, labels, predicted, np.array([0, 0, 1, 1, 2, 2]), names)
    written = words(svg, "place")
    assert [text for text, *_ in written] == ["&lt;a&gt;", *(f"a long name {number}" for number in (0, 1, 3, 4))]
    assert apart(written)
    assert [y for *_, y in written[:3]] == [165, 150, 180]
    assert svg.count("<title>a long name 2</title>") == 5, "the class that is not named"
    assert svg.count("<title>&lt;a&gt;</title>") == 4
    assert circles(svg, "many ring") == [(50, 160)]
    assert "<title>&lt;a&gt; taken for a long name 4</title>" in svg
    assert words(charts.feature_map(places, labels, predicted, np.zeros(13, int), [*names, *"1234567"]), "place") == []
