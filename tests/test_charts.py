"""What the figures of the report show, read back from their SVG."""

import re

import numpy as np
import pytest

from equipoise import charts
from equipoise.charts import EACH_AS_DOT, Name

BCL, CE = Name("bcl", "run0"), Name("ce", "run1")


def circles(svg: str, look: str) -> list[tuple[float, float]]:
    pattern = rf'<circle class="dot {look}" cx="([-\d.]+)%" cy="([-\d.]+)"'
    return [(float(x), float(y)) for x, y in re.findall(pattern, svg)]


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
