"""Comparisons: the interval against scipy's paired t test, and runs that are there, missing, unfinished or others."""

import json
import math
import os
import shutil
from statistics import mean, stdev

import numpy as np
import pytest
from conftest import refusal
from scipy.stats import ttest_rel

from equipoise import UserError
from equipoise.cli.flags import recipe_of_method
from equipoise.cli.main import _parser, main
from equipoise.training.compare import _summary, markdown, paired_difference

METHODS = ("ce", "supcon+la")
WORDS = ["compare", "digits-lt", "--methods", "ce,supcon+la", "--epochs", "2", "--set", "optim.warmup_epochs=0"]


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_the_interval_is_that_of_the_paired_t_test(seeds):
    generator = np.random.default_rng(seeds)
    first, other = generator.normal(0.8, 0.05, seeds), generator.normal(0.7, 0.03, seeds)
    found = paired_difference(first.tolist(), other.tolist())
    expected = ttest_rel(other, first).confidence_interval(0.95)
    mean_difference = np.mean(other) - np.mean(first)
    assert found == pytest.approx({"mean": mean_difference, "low": expected.low, "high": expected.high})


def test_the_interval_by_hand():
    """Differences 1 to 5: their sd is the root of 2.5, and t at 97.5 % with 4 degrees of freedom is 2.776 in tables."""
    found = paired_difference([10, 10, 10, 10, 10], [11, 12, 13, 14, 15])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert found == pytest.approx({"mean": 3, "low": 3 - half, "high": 3 + half}, abs=1e-3)


def test_one_seed_and_equal_runs_have_no_interval_or_one_of_no_width():
    assert paired_difference([0.5], [0.75]) == {"mean": 0.25, "low": None, "high": None}
    assert paired_difference([0.5, 0.6], [0.5, 0.6]) == {"mean": 0, "low": 0, "high": 0}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    assert main([*WORDS, "--seeds", "2", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_what_a_comparison_writes(compared):
    result = json.loads((compared / "compare.json").read_text())
    assert result["runs"] == {
        "ce, seed 0": "ce-seed-0", "supcon+la, seed 0": "supcon-la-seed-0",
        "ce, seed 1": "ce-seed-1", "supcon+la, seed 1": "supcon-la-seed-1",
    }  # fmt: skip
    table = (compared / "compare.md").read_text(encoding="utf-8")
    for figure in ("top1", "many", "medium", "few"):
        values = {}
        for method in METHODS:
            folders = [compared / f"{method.replace('+', '-')}-seed-{seed}" / "metrics.json" for seed in (0, 1)]
            values[method] = [json.loads(folder.read_text())["test"][figure] for folder in folders]
            row = result["methods"][method][figure]
            assert row["values"] == values[method]
            assert row["mean"] == pytest.approx(mean(values[method]))
            assert row["sd"] == pytest.approx(stdev(values[method]))
            assert f" {100 * row['mean']:.1f} ± {100 * row['sd']:.1f} |" in table
        difference = result["methods"]["supcon+la"][figure]["difference"]
        expected = ttest_rel(values["supcon+la"], values["ce"]).confidence_interval(0.95)
        if not math.isnan(expected.low):  # scipy gives NaN where no seed differs from another
            assert (difference["low"], difference["high"]) == pytest.approx((expected.low, expected.high))
    assert "difference" not in result["methods"]["ce"]["few"]
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "<h2>Over 2 seeds</h2>" in page
    assert "digits-lt: ce · supcon+la" in page


@pytest.mark.slow
def test_it_goes_on_where_it_was_interrupted(compared, tmp_path, capsys):
    """One run is missing, one stopped before its first checkpoint, one before it was scored: the result is the same."""
    out = shutil.copytree(compared, tmp_path / "out")
    before = json.loads((out / "compare.json").read_text())
    shutil.rmtree(out / "ce-seed-1")
    for name in ("last.pt", "previous.pt", "metrics.json", "observed.npz"):
        (out / "supcon-la-seed-0" / name).unlink()
    (out / "supcon-la-seed-1" / "metrics.json").unlink()
    kept = (out / "ce-seed-0" / "metrics.json").stat().st_mtime_ns
    (out / "compare.md").write_text("as it was")
    os.link(out / "compare.md", tmp_path / "old")
    assert main([*WORDS, "--seeds", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for line in ("1 of 4: ce, seed 0, is there", "2 of 4: supcon+la, seed 0, trains", "3 of 4: ce, seed 1, trains"):
        assert line in said
    assert (out / "ce-seed-0" / "metrics.json").stat().st_mtime_ns == kept
    assert (tmp_path / "old").read_text() == "as it was", "the new table takes the old one's name when it is whole"
    assert (out / "compare.md").read_text(encoding="utf-8").startswith("digits-lt: 2 seeds")
    after = json.loads((out / "compare.json").read_text())
    for method in METHODS:
        for figure, row in before["methods"][method].items():
            assert after["methods"][method][figure]["values"] == pytest.approx(row["values"], abs=0.03)


@pytest.mark.slow
def test_other_recipes_and_other_data_are_refused(compared, tmp_path, capsys):
    words = [*WORDS, "--seeds", "2", "--out", str(compared)]
    said = refusal(capsys, *words, "--lr", "0.01")
    assert said == (
        f"{compared / 'ce-seed-0'} was trained with optim.lr = 0.05, not 0.01: change it back, or name another --out"
    )
    assert "trained with precision = auto, not fp32" in refusal(capsys, *words, "--precision", "fp32")
    out = shutil.copytree(compared, tmp_path / "out")
    record = json.loads((out / "ce-seed-1" / "run.json").read_text())
    record["data"]["fingerprints"]["test"] = "another"
    (out / "ce-seed-1" / "run.json").write_text(json.dumps(record))
    said = refusal(capsys, *words[:-1], str(out))
    assert "ce-seed-1 was trained on other data than lies at digits now; name another --out" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "bcl,cee"], "method must be one of balanced-softmax, bcl, "),
        (["--methods", "bcl"], "--methods needs two or more different methods, separated by commas, not bcl"),
        (["--methods", "ce,ce"], "--methods needs two or more different methods, separated by commas, not ce,ce"),
        (["--seeds", "0"], "--seeds must be 1 or more, not 0"),
        (["--method", "bcl"], "compare trains the methods of --methods; drop --method"),
        (["--batch-size", "400"], "batch_size (400) is larger than the training part (342 images)"),
    ],
)
def test_refusals(words, sentence, capsys, tmp_path):
    assert refusal(capsys, "compare", "digits-lt", "--out", str(tmp_path / "out"), *words).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_runs_that_are_not_scored_alike_are_not_averaged():
    """One has lost its best checkpoint, say."""
    last = {"test": {"top1": 0.5}, "validation": None}
    with pytest.raises(UserError, match="not every run is scored by its last checkpoint on the test part; keep"):
        _summary(["bcl", "ce"], 1, [{"last": last, "best": None}, {"last": last, "best": last}])


def test_groups_without_classes_are_left_out_and_one_seed_has_no_sd():
    bcl, ce = (
        {"test": {"top1": top1, "mean_per_class": few, "many": None, "medium": None, "few": few}, "validation": None}
        for top1, few in ((0.5, 0.25), (0.25, 0.25))
    )
    summary = _summary(["bcl", "ce"], 1, [{"last": bcl, "best": None}, {"last": ce, "best": None}])
    assert markdown({"recipe": {"name": "x"}, "seeds": [3], **summary}).splitlines()[1:] == [
        "",
        "| method | overall | mean over classes | few |",
        "| --- | --- | --- | --- |",
        "| bcl | 50.0 | 25.0 | 25.0 |",
        "| ce | 25.0 | 25.0 | 25.0 |",
        "| ce - bcl | -25.0 | +0.0 | +0.0 |",
    ]


def test_what_is_set_holds_for_every_method():
    """Also where a method brings settings of its own; and none are left for the next method."""
    words = ["compare", "cifar10-lt", "--temperature", "0.3"]
    options = _parser(words).parse_args(words)
    bcl, proco, again = (recipe_of_method(options, method).loss for method in ("bcl", "proco", "bcl"))
    assert (bcl.alpha, bcl.beta, bcl.temperature) == (2, 0.6, 0.3)
    assert (proco.alpha, proco.beta, proco.temperature) == (1, 1, 0.3)
    assert again == bcl
