"""The report: as text, and as headless Chromium draws it."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from synthetic import write_run

from equipoise.base.errors import UserError
from equipoise.report.page import write_report
from equipoise.training.compare import FIGURES, paired_difference

ODD = "<b>x & y</b>"
NAMES = [ODD, "日本語", 'said "so"', "C" * 70, *"efghij"]
FEW_CLASSES = (500, 299, 180, 100, 60, 40, 20, 13, 8, 5)
# What Places-LT and iNaturalist 2018 look like: as many classes, as long a tail.
PLACES = [max(5, round(4980 * (5 / 4980) ** (label / 364))) for label in range(365)]
INATURALIST = [max(2, round(1000 * (2 / 1000) ** (label / 8141))) for label in range(8142)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of ten classes, with validation: the last stopped early."""
    root = tmp_path_factory.mktemp("runs")
    made = [write_run(root / method, FEW_CLASSES, method=method, names=NAMES) for method in ("bcl", "ce")]
    return [*made, write_run(root / "stopped", FEW_CLASSES, method="logit-adjusted", names=NAMES, scored=False)]


@pytest.fixture
def report(tmp_path):
    """Writes a report, and returns its text."""
    return lambda *runs: write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_everything_is_there_and_nothing_from_elsewhere(runs, report):
    page = report(*runs)
    assert not re.search("<(script|iframe|object|b>x)", page)
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)', page))
    assert not re.search(r"@import|url\(", page)
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert re.search(r"<td>top-1</td><td class=\"number\">" + f"{100 * metrics['test']['top1']:.1f}", page)
    assert f"bcl gets {100 * metrics['test']['few']:.1f}" in page
    assert "3 classes with fewer than 20 training images" in page
    assert "logit-adjusted has no figures: it stopped early" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Frequent and rare classes", "Training", "The worst classes", "What is taken for what",
        "How far confidence can be trusted", "Adjusting for the prior afterwards", "The geometry of the classes",
        "How far classes spread", "A map of the features", "Where this comes from",
    ]  # fmt: skip
    assert "validation: mean over classes, percent" in page.split("<h2>Training</h2>")[1]
    assert "regular simplex, with cosine \u22121/(C\u22121) = \u22120.11" in page
    for said in ("equipoise train --method bcl", "test test-10", "torch 2.14.1", "method = &#34;bcl&#34;"):
        assert said in page.split("<h2>Where this comes from</h2>")[1]
    assert "No example pictures: there is no file or folder at no-such-folder." in page
    assert ODD not in page
    assert "&lt;b&gt;x &amp; y&lt;/b&gt;" in page
    assert "said &#34;so&#34;" in page


@pytest.mark.slow
def test_calibration_is_better_after_scaling_and_without_validation_nothing_is_fitted(tmp_path, report):
    """A made-up network of scale 30 is too sure of hard images; one temperature mends some of it."""
    run = write_run(tmp_path / "run", [5] * 100, images_per_class=20)
    found = re.search(r"calibration error ([\d.]+) %, ([\d.]+) % at temperature ([\d.]+)", report(run))
    before, after, temperature = map(float, found.groups())
    metrics = json.loads((run / "metrics.json").read_text())
    assert before == pytest.approx(100 * metrics["test"]["ece"], abs=0.051)
    assert after < before
    assert temperature == pytest.approx(metrics["last"]["temperature"], abs=0.0051)
    page = report(write_run(tmp_path / "other", FEW_CLASSES, validation=False))
    assert "at temperature" not in page
    assert 'class="dot run0 after"' not in page

    # Without a test part, validation is shown.
    metrics["test"] = metrics["last"]["test"] = None
    del metrics["last"]["post_hoc"]["test"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = report(run)
    assert "last checkpoint (after epoch 20), validation part" in page
    assert "Temperature and error are from the same validation images" in page


def test_one_run_that_stopped_early_has_its_curves(runs, tmp_path, report):
    run = write_run(tmp_path / "run", FEW_CLASSES, scored=False)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')  # killed while it wrote
    page = report(run)
    assert "No run was scored yet" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Training", "Where this comes from"]
    assert page.count('<svg class="figure"') == 6
    (run / "metrics.jsonl").unlink()
    assert "Nothing was logged" in report(run)
    old = shutil.copytree(runs[0], tmp_path / "old")
    (old / "observed.npz").unlink()
    page = report(runs[1], old)
    assert f"lacks observed.npz, which <code>equipoise evaluate {old}</code> writes" in page
    assert page.count("dot run1") == 6


def test_perfect_runs_and_features_that_are_all_the_same(tmp_path, report):
    run = write_run(tmp_path / "run", (4000, 3000), images_per_class=5)
    arrays = dict(np.load(run / "observed.npz"))
    np.savez(run / "observed.npz", **{**arrays, "test/map_MF": np.ones_like(arrays["test/map_MF"])})
    assert json.loads((run / "metrics.json").read_text())["test"]["top1"] == 1
    page = report(run)
    assert "No mistakes." in page
    assert "The worst classes" not in page
    assert "A map of the features" not in page


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("run.json", b"", "run.json is damaged ("),
        ("metrics.jsonl", b'{"kind": "train"}\n', "metrics.jsonl is damaged (Object missing required field"),
        ("observed.npz", b"PK", "observed.npz is damaged (its content makes no sense); write it anew: equipoise eval"),
    ],
)
def test_a_damaged_file(runs, tmp_path, report, file, content, sentence):
    broken = shutil.copytree(runs[0], tmp_path / "broken")
    (broken / file).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        report(broken)
    assert not (tmp_path / "report.html").exists()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_in_the_observations_is_not_run(runs, tmp_path, report, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, planted = shutil.copytree(runs[0], tmp_path / "run"), np.array([Payload()])
    np.savez(run / "observed.npz", **{"test/labels_N": planted, "test/confidence_N": planted})
    for content in ((run / "observed.npz").read_bytes(), pickle.dumps(Payload())):
        (run / "observed.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"observed.npz is damaged \("):
            report(run)
    assert not (tmp_path / "executed").exists()


def test_what_cannot_be_shown(runs, tmp_path, report):
    """Also where the report would be written into it."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match=f"{path} is not a run folder: .*; name one that equipoise train wrote"):
            write_report([path], path / "report.html")
    with pytest.raises(UserError, match=r"other has other classes than .*bcl; report each alone"):
        report(runs[0], write_run(tmp_path / "other", (50, 5)))
    with pytest.raises(UserError, match="7 runs cannot be told apart in one figure; name 6 at most"):
        report(*[runs[0]] * 7)


@pytest.mark.slow
def test_labels_tell_the_runs_apart(tmp_path, report):
    """By method, or else by seed, or else by folder, or else by number."""
    one, two = (write_run(tmp_path / name, (50, 5), seed=seed) for seed, name in enumerate(("one", "two")))
    assert "bcl, seed 0 · bcl, seed 1</h1>" in report(one, two)
    page = report(one, shutil.copytree(one, tmp_path / "copy"))
    assert "one · copy</h1>" in page
    assert "run 1 · run 2</h1>" in report(one, one)


def comparison(seeds: int) -> dict:
    """Made-up accuracies of two methods, as in `compare.json`."""
    values, others = [0.8, 0.72, 0.9][:seeds], [0.6, 0.7, 0.65][:seeds]
    first = {"values": values, "mean": np.mean(values), "sd": np.std(values, ddof=1) if seeds > 1 else None}
    other = {**first, "values": others, "difference": paired_difference(values, others)}
    methods = {"bcl": dict.fromkeys(FIGURES, first), "ce": dict.fromkeys(FIGURES, other)}
    return {"seeds": list(range(seeds)), "methods": methods}


@pytest.mark.slow
def test_seeds_come_first(runs, tmp_path):
    page = write_report(runs[:2], tmp_path / "report.html", comparison(3)).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page)[0] == "Over 3 seeds"
    assert ", in the mean of 3 seeds." in page
    write_report(runs[:2], tmp_path / "report.html", comparison(1))  # without intervals


# ---- as a browser draws it


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here, so the report is not looked at in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


LOOK = """
const shapes = 'circle, rect, line, path, text';
const box = element => element.getBoundingClientRect();
const outside = [...document.querySelectorAll('main *')].filter(
    element => !element.closest('.scroll, pre') && (box(element).right > innerWidth + .5 || box(element).left < -.5));
const covering = (one, other) => Math.min(one.right, other.right) - Math.max(one.left, other.left) > .5
    && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 2;
const covered = [...document.querySelectorAll('svg.figure')].flatMap(figure => {
    const words = [...figure.querySelectorAll('text:not(.place)')];
    return words.filter((word, at) => words.slice(0, at).some(before => covering(box(word), box(before))));
});
return {
    covered: covered.map(word => word.textContent),
    figures: [...document.querySelectorAll('svg.figure')].map(figure => [
        figure.getAttribute('aria-label'), box(figure).width, box(figure).height,
        [...figure.querySelectorAll(shapes)].filter(mark => box(mark).width + box(mark).height > 0).length]),
    pictures: [...document.images].map(image => image.naturalWidth),
    wide: document.documentElement.scrollWidth,
    outside: outside.map(element => element.outerHTML.slice(0, 200)),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector('svg text.row, svg text.tick')).fill,
};
"""


def brightness(colour: str) -> float:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 765


def look_at(browser, page) -> int:
    """Look at the page at three widths and in both schemes: all is drawn, nothing lies outside, no text over another,
    the browser complains of nothing and asks for nothing; but names of classes on the map may cover each other. Returns
    the number of figures."""
    figures = set[int]()
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # reading it empties it of an earlier page's
    for width in (360, 768, 1280):
        for scheme in ("light", "dark"):
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            browser.get(page.as_uri())
            seen = browser.execute_script(LOOK)
            figures.add(len(seen["figures"]))
            for description, wide, high, marks in seen["figures"]:
                assert min(wide, high) > 50, description
                assert marks > 3, description
            assert seen["wide"] <= width
            assert seen["outside"] == []
            assert seen["covered"] == []
            assert all(side > 0 for side in seen["pictures"])
            paper, ink = brightness(seen["paper"]), brightness(seen["ink"])
            assert (paper > 0.9 and ink < 0.6) if scheme == "light" else (paper < 0.15 and ink > 0.5)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    (number,) = figures
    return number


@pytest.mark.slow
def test_ten_classes_and_seeds_in_a_browser(browser, runs, tmp_path):
    assert look_at(browser, write_report(runs, tmp_path / "report.html")) == 2 + 6 + 1 + 2 + 4 + 4 + 2 + 2
    assert look_at(browser, write_report(runs[:2], tmp_path / "report.html", comparison(3))) == 1 + 23


@pytest.mark.long
@pytest.mark.parametrize(
    ("counts", "methods", "options", "figures"),
    [
        (PLACES, ("bcl", "ce"), {}, 1 + 23),  # one figure a run of accuracy by count
        (INATURALIST, ("bcl",), {"images_per_class": 1, "validation": False}, 17),  # one image a class: no spread
    ],
)
def test_many_classes_in_a_browser(browser, tmp_path, counts, methods, options, figures):
    runs = [write_run(tmp_path / method, counts, method=method, **options) for method in methods]
    page = write_report(runs, tmp_path / "report.html")
    assert all((run / "observed.npz").stat().st_size < 20e6 for run in runs)
    assert page.stat().st_size < 2e6
    assert look_at(browser, page) == figures
