"""The report: as text, and as headless Chromium draws it."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from browser import look_at
from conftest import draw_folder, draw_picture, opened
from synthetic import write_run

from equipoise.base.errors import UserError
from equipoise.config.reading import load_recipe, recipe_toml
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
    for heading, key in (("top-1", "top1"), ("few", "few"), ("mean over classes", "mean_per_class")):
        low, high = (f"{100 * bound:.1f}" for bound in metrics["test"]["intervals"][key])
        shown = f'{100 * metrics["test"][key]:.1f} <span class="quiet">{low}-{high}</span></td>'
        assert f'<td>{heading}</td><td class="number">{shown}' in page
    rate = f"{100 * metrics['test']['false_head_rate']:.1f}"
    assert f'<td>few taken for many</td><td class="number">{rate}</td>' in page
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


def with_mistakes(run, data):
    """The run, as if it were of the pictures at `data` and its two surest mistakes had these neighbours."""
    table = json.loads((run / "run.json").read_text())
    parts = opened(data).named()
    table["data"]["fingerprints"] |= {name: images.fingerprint() for name, images in parts.items()}
    (run / "run.json").write_text(json.dumps(table))
    arrays = dict(np.load(run / "observed.npz"))
    arrays["test/labels_N"][:2], arrays["test/predicted_N"][:2] = (0, 1), (1, 0)
    arrays["test/confidence_N"][:2] = 0.987, 0.876
    arrays |= {"test/mistakes_M": np.array([0, 1]), "test/neighbours_MK": np.array([[5, 6, 0, 7], [1, 2, 3, 8]])}
    np.savez(run / "observed.npz", **arrays)
    return parts


@pytest.mark.slow
def test_the_surest_mistakes_beside_their_neighbours(browser, tmp_path, report):
    data = draw_folder(tmp_path / "data" / "train", {"<b>x & y<": 5, "bee": 4}).parent
    draw_folder(data / "test", {"<b>x & y<": 10, "bee": 10})
    run = write_run(tmp_path / "run", (5, 4), names=["<b>x & y<", "bee"], validation=False, data=str(data))
    recipe = load_recipe("pictures", data=str(data), holdout=0)
    (run / "recipe.toml").write_text(recipe_toml(recipe))
    assert "surest mistakes" not in report(run), "an older run, or from nothing"
    parts = with_mistakes(run, data)
    page = report(run)
    section = page.split("<h2>The surest mistakes")[1].split("<h2>")[0]
    first, second = re.findall("<li><b>(.*?)</li>", section, re.DOTALL)
    odd = "&lt;b&gt;x &amp; y&lt;"
    assert first.startswith(f"{odd}</b> taken for <b>bee</b> (98.7 % sure)")
    assert second.startswith(f"bee</b> taken for <b>{odd}</b> (87.6 % sure)")
    assert f"near: bee, bee, {odd}, bee<br>" in first
    assert f"near: {odd}, {odd}, {odd}, bee<br>" in second
    alts, titles = re.findall('alt="(.*?)"', first), re.findall('title="(.*?)"', first)
    names = [parts["train"].images.name(row).replace("<b>x & y<", odd) for row in (5, 6, 0, 7)]
    assert titles == [parts["test"].images.name(0).replace("<b>x & y<", odd), *names]
    assert alts == [odd, "bee", "bee", odd, "bee"]
    look_at(browser, write_report([run], tmp_path / "report.html"))

    draw_picture(data / "train" / "bee" / "new.png", 1, 9)
    page = report(run)
    assert "No pictures: the training images have changed since the run." in page
    assert "No example pictures" not in page, "of the test part"
    shutil.rmtree(data)
    page = report(run)
    assert f"No pictures: there is no file or folder at {data}." in page
    assert "<img" not in page


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
