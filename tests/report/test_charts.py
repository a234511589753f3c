"""What the figures of the report show, read back from their SVG."""

import base64
import io
import re

import numpy as np
import pytest
from conftest import draw_folder
from PIL import Image

from equipoise.data.sources import find_parts
from equipoise.evaluation.metrics import shot_group
from equipoise.report import charts
from equipoise.report.charts import EACH_AS_DOT
from equipoise.report.svg import Name

BCL, CE = Name("bcl", "run0"), Name("ce", "run1")


def circles(svg: str, look: str) -> list[tuple[float, float]]:
    """The centres of the dots of that look."""
    pattern = rf'<circle class="dot {look}" cx="([-\d.]+)%" cy="([-\d.]+)"'
    return [(float(x), float(y)) for x, y in re.findall(pattern, svg)]


def words(svg: str, look: str) -> list[str]:
    return re.findall(rf'<text class="{look}"[^>]*>(.*?)</text>', svg)


def test_trend_is_the_classes_or_means_of_equal_groups():
    assert np.allclose(charts.trend([100, 10, 1], [0.9, None, 0.2]), [(1, 20), (100, 90)])
    counts, accuracies = [2 ** (place // 10) for place in range(120)], np.arange(120) / 120
    expected = [(2**group, 100 * accuracies[10 * group : 10 * group + 10].mean()) for group in range(12)]
    assert np.allclose(charts.trend(counts, accuracies.tolist()), expected)
    pairs = charts.trend([4**number for number in range(24)], [0.2, 0.9] * 12)
    assert np.allclose(pairs, [(2 * 16**pair, 55) for pair in range(12)]), "the geometric mean of the counts"


def test_one_figure_of_few_classes_and_one_a_run_of_many():
    (few,) = charts.accuracy_by_count([(BCL, [100, 5], [1, 0.5]), (CE, [100, 5], [0.5, 0])], ["a", "<b>"])
    assert "&lt;b&gt;: 5 training images, bcl 50.0 %" in few
    assert sorted(y for _, y in circles(few, "run1 faint")) == [150, 300]  # 50 % and 0 % of 300 pixels
    classes = EACH_AS_DOT + 100
    counts, accuracies = [5] * 50 + [500] * (classes - 50), [0.0] * 50 + [1.0] * (classes - 50)
    run = (BCL, counts, accuracies)
    many = charts.accuracy_by_count([run, (CE, counts, accuracies)], [str(c) for c in range(classes)])
    assert len(many) == 2
    bubbles = re.findall(r"<title>(\d+) classes of about [\d,]+ training images and (\d+) %", many[0])
    assert sorted(bubbles) == [("150", "100"), ("50", "0")]


@pytest.mark.parametrize("counts", [(2, 50, 124), (19, 20, 101), (1, 60, 100_000), (19, 90), (90, 300), (300, 301)])
def test_the_groups_with_classes_are_named_beside_their_limits(counts):
    (svg,) = charts.accuracy_by_count([(BCL, counts, [0.5] * len(counts))], [str(c) for c in range(len(counts))])
    named = re.findall(r'<text class="axis" x="([\d.]+)%" y="-10.0" [^>]*>(.*?)<', svg)
    assert [group for _, group in named] == list(dict.fromkeys(map(shot_group, sorted(counts))))
    limits = {float(x) for x in re.findall(r'class="rule" x1="([\d.]+)%"', svg)}
    assert {float(x) for x, _ in named} <= limits | {0, 100}


def test_group_bars_leave_out_what_is_not_there():
    scores = {"top1": 0.75, "many": None, "medium": 0.8, "few": 0.5}
    svg = charts.group_bars([(BCL, scores), (CE, {**scores, "few": 0.25})], {"many": 0, "medium": 1, "few": 3})
    assert re.findall(r'<rect class="bar run(\d)" x="0.00%" width="([\d.]+)%"', svg) == [
        ("0", "75.00"), ("1", "75.00"), ("0", "80.00"), ("1", "80.00"), ("0", "50.00"), ("1", "25.00"),
    ]  # fmt: skip
    assert [heading.split(" with")[0] for heading in words(svg, "row")] == [
        "overall · all 4 classes", "medium · 1 class", "few · 3 classes",
    ]  # fmt: skip


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
    alone = charts.prior_sweep([(BCL, [(0.0, 100.0), (2.0, 100.0)], 1.0)], "few")  # an axis within 0 to 100
    assert words(alone, "tick")[-1] == "100"


def test_cosines_show_the_simplex_and_the_groups_that_are_there():
    counts = np.zeros((3, 200), int)
    counts[2, 120] = 7
    svg = charts.cosines([(BCL, counts)], 11)
    assert 'class="simplex" x1="45.00%"' in svg
    assert "regular simplex \u22120.1" in svg
    assert words(svg, "row") == ["few"]
    points = re.findall(r"([\d.]+) ([\d.]+)", re.search(r'class="line run0 thin area" d="M([\d. L]+)', svg)[1])
    top = min(float(y) for _, y in points)
    assert [float(x) for x, y in points if float(y) == top] == [600, 620]  # the cosine 0.2, from -1 to 1 over 1000


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
    assert circles(svg, "run0") == [(100, 100)]
    assert circles(svg, "run1") == [(33.33, 75)]
    assert "<title>ce 1.5</title>" in svg
    assert words(svg, "name run.") == ["ce", "bcl"]


def test_the_map_names_few_classes_and_rings_mistakes():
    labels, groups, names = np.repeat([0, 1], 5), ["many", "few"], ["<a>", "a name of many letters"]
    places = np.array([[0.0, 0.0]] * 4 + [[0.5, 0.5]] + [[1.0, 1.0]] * 5)
    predicted = labels.copy()
    predicted[4] = 1
    svg = charts.feature_map(places, labels, predicted, groups, names)
    assert words(svg, "place") == ["&lt;a&gt;", "a name of many\u2026"]
    assert svg.count("<title>&lt;a&gt;</title>") == 4
    assert circles(svg, "many ring") == [(50, 160)]
    assert "<title>&lt;a&gt; taken for a name of many letters</title>" in svg
    assert len(circles(svg, "few")) == 5
    assert "place" not in charts.feature_map(places, labels, predicted, ["many"] * 13, [*names, *"123456789ab"])


# ---- mistakes

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 1])
PREDICTED = np.array([0, 1, 1, 1, 2, 0, 0, 1, 2, 1])
SURE = np.array([0.5, 0.6, 0.9, 0.7, 0.4, 0.8, 0.2, 0.3, 0.9, 0.8])


def test_pairs_by_number_then_by_share():
    assert charts.confused_pairs(LABELS, PREDICTED) == [
        (0, 1, 2, 3),  # two of three come before two of four
        (2, 0, 2, 4),
        (1, 2, 1, 3),
        (2, 1, 1, 4),
    ]
    assert charts.confused_pairs(LABELS, LABELS) == []
    observed = {"labels_N": LABELS, "predicted_N": PREDICTED, "confidence_N": SURE}
    assert charts.surest(observed, 0, 1) == [2, 1]
    assert charts.surest(observed, 1, 1) == [9, 3]


def shown(picture: str) -> tuple[bytes, str]:
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', picture).groups()
    return base64.b64decode(data), kind


def test_thumbnails_hold_the_picture_and_broken_ones_are_passed_over(tmp_path):
    folder = draw_folder(tmp_path / "data", {"<b>x & y": 2, "z": 1})
    noise = np.random.default_rng(0).integers(0, 255, (600, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "z" / "1.jpg")
    (folder / "z" / "2.jpg").write_bytes((folder / "z" / "1.jpg").read_bytes()[:900])
    images = find_parts(str(folder)).parts["train"]
    small, _, other, large = charts.thumbnails(images, range(5))
    assert 'alt="&lt;b&gt;x &amp; y"' in small
    assert 'alt="z"' in other
    with Image.open(io.BytesIO(shown(small)[0])) as seen, Image.open(images.images.name(0)) as file:
        assert np.array_equal(np.asarray(seen), np.asarray(file.convert("RGB")))
    data, kind = shown(large)
    assert (kind, len(data) < 5000) == ("jpeg", True)
    with Image.open(io.BytesIO(data)) as seen:
        assert seen.size == (48, 72)
