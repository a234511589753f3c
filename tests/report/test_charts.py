"""What the figures of the report show, read back from their SVG."""

import re
from itertools import combinations

import numpy as np
import pytest

from equipoise.evaluation.metrics import shot_group
from equipoise.report import charts
from equipoise.report.charts import EACH_AS_DOT
from equipoise.report.svg import Name, width_of

BCL, CE = Name("bcl", "run0"), Name("ce", "run1")


def circles(svg: str, look: str) -> list[tuple[float, float]]:
    """The centres of the dots of that look."""
    pattern = rf'<circle class="dot {look}" cx="([-\d.]+)%" cy="([-\d.]+)"'
    return [(float(x), float(y)) for x, y in re.findall(pattern, svg)]


def texts(svg: str, look: str) -> list[tuple[str, float, float, float]]:
    """(text, left, right, y) of the texts of that look, in pixels on a page 360 wide with 16 beside the figure."""
    _, right, _, left = map(int, re.search(r"padding:(\d+)px (\d+)px (\d+)px (\d+)px", svg).groups())
    pattern = rf'<text class="{look}" x="([-\d.]+)%" y="([-\d.]+)" dx="([-\d.]+)" text-anchor="(\w+)">(.*?)</text>'
    found = []
    for x, y, dx, anchor, text in re.findall(pattern, svg):
        width, before = width_of(text, 12), {"start": 0, "middle": 0.5, "end": 1}[anchor]
        start = float(x) / 100 * (328 - left - right) + float(dx) - width * before
        found.append((text, start, start + width, float(y)))
    return found


def words(svg: str, look: str) -> list[str]:
    return [text for text, *_ in texts(svg, look)]


def apart(texts: list[tuple[str, float, float, float]]) -> bool:
    return all(
        one[2] <= other[1] + 0.1 or other[2] <= one[1] + 0.1 or abs(one[3] - other[3]) >= 12
        for one, other in combinations(texts, 2)
    )


def test_trend_is_the_classes_or_means_of_equal_groups():
    assert np.allclose(charts.trend([100, 10, 1], [0.9, None, 0.2]), [(1, 20), (100, 90)])
    counts, accuracies = [2 ** (place // 10) for place in range(120)], np.arange(120) / 120
    expected = [(2**group, 100 * accuracies[10 * group : 10 * group + 10].mean()) for group in range(12)]
    assert np.allclose(charts.trend(counts, accuracies.tolist()), expected)
    assert np.allclose(charts.trend([1, 100], [0.2, 0.9], groups=1), [(10, 55)]), "the geometric mean of the counts"


def test_one_figure_of_few_classes_and_one_a_run_of_many():
    (few,) = charts.accuracy_by_count([(BCL, [100, 5], [1, 0.5]), (CE, [100, 5], [0.5, 0])], ["a", "<b>"])
    assert len(circles(few, "run0 faint")) == len(circles(few, "run1 faint")) == 2
    assert "&lt;b&gt;: 5 training images, bcl 50.0 %" in few
    assert sorted(y for _, y in circles(few, "run1 faint")) == [160, 320]  # 50 % and 0 % of 320 pixels
    classes = EACH_AS_DOT + 100
    counts, accuracies = [5] * 50 + [500] * (classes - 50), [0.0] * 50 + [1.0] * (classes - 50)
    run = (BCL, counts, accuracies)
    many = charts.accuracy_by_count([run, (CE, counts, accuracies)], [str(c) for c in range(classes)])
    assert len(many) == 2
    bubbles = re.findall(r"<title>(\d+) classes of about [\d,]+ training images and (\d+) %", many[0])
    assert sorted(bubbles) == [("450", "100"), ("50", "0")]


@pytest.mark.parametrize(
    "counts", [(2, 50, 124), (1, 99, 101), (19, 20, 101), (1, 60, 100_000), (19, 90), (90, 300), (300, 301), (2, 124)]
)
@pytest.mark.parametrize("label", ["ce", "x" * 24])
def test_every_group_is_named_and_no_name_covers_another(counts, label):
    runs = [(Name(label, "run0"), counts, [0.5] * len(counts))]
    (svg,) = charts.accuracy_by_count(runs, [str(c) for c in range(len(counts))])
    named = [text for text in texts(svg, "axis") if text[0] in ("few", "medium", "many")]
    assert [text[0] for text in named] == list(dict.fromkeys(map(shot_group, sorted(counts))))
    assert apart(texts(svg, "axis"))
    assert min(text[1] for text in named) > -62, "off a phone's left edge"


def test_group_bars_leave_out_what_is_not_there():
    scores = {"top1": 0.75, "many": None, "medium": 0.8, "few": 0.5}
    svg = charts.group_bars([(BCL, scores), (CE, {**scores, "few": 0.25})], {"many": 0, "medium": 1, "few": 3})
    assert re.findall(r'<rect class="bar run(\d)" x="0.00%" width="([\d.]+)%"', svg) == [
        ("0", "75.00"), ("1", "75.00"), ("0", "80.00"), ("1", "80.00"), ("0", "50.00"), ("1", "25.00"),
    ]  # fmt: skip
    assert words(svg, "row") == [
        "overall · all 4 classes",
        "medium · 1 class with 20 to 100 images",
        "few · 3 classes with fewer than 20 images",
    ]


def test_equal_accuracies_do_not_hide_each_other():
    svg = charts.worst_classes([("a", 1200, "", [(BCL, 0.5), (CE, 0.5)]), ("b", 3, "remark", [(BCL, None), (CE, 1.0)])])
    (one,), two = circles(svg, "run0"), circles(svg, "run1")
    assert one[0] == two[0][0] == 50
    assert two[0][1] - one[1] >= 5
    assert two[1][0] == 100
    assert "1,200 images" in svg


def test_reliability_is_accuracy_by_bin():
    right = np.array([True, True, False, False])
    svg = charts.reliability(BCL, right, {"before": np.array([0.9, 0.9, 0.9, 0.2])})
    assert circles(svg, "run0 before") == [(20.0, 220.0), (90.0, pytest.approx(220 * (1 - 2 / 3), abs=0.1))]


def test_the_chosen_tau_has_a_ring():
    points = [(0.0, 50.0), (1.0, 60.0), (2.0, 70.0)]
    svg = charts.prior_sweep([(BCL, points, 1.0), (CE, points, None)], "few")
    assert circles(svg, "run0 ring") == circles(svg, "run0")[1:2]
    assert circles(svg, "run1 ring") == []


@pytest.mark.parametrize(("accuracy", "ticks"), [(0.0, (0, 1)), (50.0, (49, 51)), (100.0, (99, 100))])
def test_one_accuracy_alone_has_an_axis_within_0_to_100(accuracy, ticks):
    svg = charts.prior_sweep([(BCL, [(0.0, accuracy), (2.0, accuracy)], 1.0)], "few")
    shown = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', svg)]
    assert (min(shown), max(shown)) == ticks


def test_cosines_show_the_simplex_and_the_groups_that_are_there():
    counts = np.zeros((3, 200), int)
    counts[2, 120] = 7
    svg = charts.cosines([(BCL, counts)], 11)
    assert 'class="simplex" x1="45.00%"' in svg
    assert "regular simplex \u22120.1" in svg
    assert words(svg, "row") == ["few"]
    left = float(re.search(r'class="line run0 thin area" d="M([\d.]+)', svg)[1])
    assert left == 600  # the cosine 0.2, from -1 to 1 over 1000


def test_spread_is_the_median_over_the_classes_of_a_group():
    values = np.array([0.1, 0.3, 0.2, np.nan, np.nan])
    svg = charts.spread([(BCL, ["few", "few", "few", "few", "many"], values)])
    assert words(svg, "row") == ["few"]
    assert words(svg, "name run0") == ["0.20  bcl"]


def test_seeds_and_differences():
    first = {"values": [0.8, 0.9], "mean": 0.85, "sd": 0.0707}
    other = {**first, "difference": {"mean": -0.05, "low": -0.2, "high": 0.1}}
    svg = charts.over_seeds({"few": [(BCL, first), (CE, other)]})
    assert words(svg, "value") == ["85.0 ± 7.1", "85.0 ± 7.1", "difference \u22125.0 [\u221220.0, +10.0]"]
    assert len(circles(svg, "run0 faint")) == 2
    alone = {"values": [0.8], "mean": 0.8, "sd": None, "difference": {"mean": -0.05, "low": None, "high": None}}
    assert words(charts.over_seeds({"few": [(CE, alone)]}), "value") == ["80.0", "difference \u22125.0"]


def test_curves_end_in_a_dot_with_the_last_value():
    svg = charts.curves([(BCL, [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]), (CE, [(1.0, 1.5)])], "loss", 0)
    assert words(svg, "tick") == ["0", "1", "2", "3"] * 2
    assert circles(svg, "run0") == [(100, 100)]
    assert circles(svg, "run1") == [(33.33, 75)]
    assert "<title>ce 1.5</title>" in svg
    assert words(svg, "name run.") == ["ce", "bcl"]


def test_names_on_the_map_do_not_cover_each_other():
    """Four classes lie in one place, which has room for one name; the title of each dot names its class."""
    labels = np.repeat(np.arange(6), 5)
    corners = np.array([[0.0, 0.0], [1.0, 1.0]])
    places = np.concatenate([np.full((20, 2), 0.5), corners.repeat(5, axis=0)])
    predicted = labels.copy()
    predicted[0] = 5
    groups = ["many", "many", "medium", "medium", "few", "few"]
    names = ["<a>", *(f"a long name {number}" for number in range(5))]
    svg = charts.feature_map(places, labels, predicted, groups, names)
    written = texts(svg, "place")
    assert [text for text, *_ in written] == ["&lt;a&gt;", "a long name 3", "a long name 4"]
    assert apart(written)
    assert svg.count("<title>a long name 2</title>") == 5, "a class that is not named"
    assert svg.count("<title>&lt;a&gt;</title>") == 4
    assert circles(svg, "many ring") == [(50, 160)]
    assert "<title>&lt;a&gt; taken for a long name 4</title>" in svg
    many = charts.feature_map(places, labels, predicted, ["many"] * 13, [*names, *"1234567"])
    assert texts(many, "place") == []
