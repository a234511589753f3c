"""Comparisons: intervals and tests against scipy, slow loops and definitions; and runs that are there, missing,
unfinished or others."""

import itertools
import json
import math
import os
import shutil
from statistics import mean, stdev

import numpy as np
import pytest
from conftest import refusal
from scipy.stats import binomtest, ttest_rel
from synthetic import write_run

from equipoise import UserError
from equipoise.cli.flags import recipe_of_method
from equipoise.cli.main import _parser, main
from equipoise.evaluation.score import Run
from equipoise.training.compare import _over_images, _summary, correct, markdown, paired_difference

METHODS = ("ce", "supcon+la")
WORDS = ["compare", "digits-lt", "--methods", "ce,supcon+la", "--epochs", "2", "--set", "optim.warmup_epochs=0"]


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_the_interval_is_that_of_the_paired_t_test(seeds):
    generator = np.random.default_rng(seeds)
    first, other = generator.normal(0.8, 0.05, seeds), generator.normal(0.7, 0.03, seeds)
    found = paired_difference(first.tolist(), other.tolist())
    test = ttest_rel(other, first)
    expected, mean_difference = test.confidence_interval(0.95), np.mean(other) - np.mean(first)
    assert found == pytest.approx(
        {"mean": mean_difference, "low": expected.low, "high": expected.high, "p": test.pvalue}
    )


def test_the_interval_by_hand():
    """Differences 1 to 5: their sd is the root of 2.5, and t at 97.5 % with 4 degrees of freedom is 2.776 in tables."""
    found = paired_difference([10, 10, 10, 10, 10], [11, 12, 13, 14, 15])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert found == pytest.approx({"mean": 3, "low": 3 - half, "high": 3 + half, "p": 0.0133}, abs=1e-3)


def test_one_seed_and_seeds_that_agree_have_no_interval():
    assert paired_difference([0.5], [0.75]) == {"mean": 0.25, "low": None, "high": None, "p": None}
    assert paired_difference([0.5, 0.6], [0.5, 0.6]) == {"mean": 0, "low": None, "high": None, "p": 1}
    assert paired_difference([0.1, 0.6], [0.3, 0.8])["p"] == 1, "two seeds that agree by chance prove nothing"


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closed_test_of_bonferroni(seed):
    """A hypothesis is rejected where every set of hypotheses that it is in is: p of a set is its size x its least p."""
    values = np.random.default_rng(seed).choice([0.001, 0.01, 0.02, 0.03, 0.5, 0.9], 5).tolist()
    rows = [{"p": p} for p in values]
    correct(rows)
    for at, row in enumerate(rows):
        sets = [chosen for size in range(1, 6) for chosen in itertools.combinations(range(5), size) if at in chosen]
        expected = max(min(1, len(of) * min(values[place] for place in of)) for of in sets)
        assert row["p_holm"] == pytest.approx(expected)
    unknown = [{"p": None}]
    correct(unknown)
    assert unknown == [{"p": None}]


SHOTS = (300, 120, 60, 30, 12, 6, 3)


def synthetic(tmp_path, seeds, images_per_class=9):
    """The summary of made-up runs of two methods, their folders, and of each run which images it gets right, `[R, N]`,
    with the labels `[N]`."""
    folders = [
        write_run(tmp_path / f"{method}-{seed}", SHOTS, method=method, seed=seed, images_per_class=images_per_class)
        for seed in range(seeds) for method in METHODS
    ]  # fmt: skip
    arrays = [np.load(folder / "observed.npz") for folder in folders]
    right_RN = np.stack([of["test/predicted_N"] == of["test/labels_N"] for of in arrays])
    return _summary(METHODS, seeds, [Run(folder).metrics for folder in folders]), folders, right_RN


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_over_images_is_a_loop_over_images(seeds, tmp_path):
    """Each replicate draws images, of a class of 9 always 8, and scores all runs on them."""
    summary, folders, right_RN = synthetic(tmp_path, seeds)
    assert _over_images(summary, folders, SHOTS) == ""
    generator, found = np.random.default_rng(1), {figure: [] for figure in ("top1", "few")}
    for _ in range(1500):
        rows_CI = np.stack([9 * label + generator.integers(0, 9, 8) for label in range(7)])
        of_class_RC = right_RN[:, rows_CI].mean(2)
        change_C = of_class_RC[1::2].mean(0) - of_class_RC[::2].mean(0)
        found["top1"].append(change_C.mean())
        found["few"].append(change_C[4:].mean())
    for figure, values in found.items():
        row = summary["methods"][METHODS[1]][figure]["difference"]
        low, high = np.percentile(values, [2.5, 97.5])
        assert row["images"] == pytest.approx([low, high], abs=0.1 * (high - low))
        assert row["images"][0] < row["mean"] < row["images"][1]


def test_one_seed_has_mcnemars_test_of_top1_alone(tmp_path):
    summary, folders, right_RN = synthetic(tmp_path, 1)
    assert _over_images(summary, folders, SHOTS) == ""
    gained, lost = int((right_RN[1] & ~right_RN[0]).sum()), int((right_RN[0] & ~right_RN[1]).sum())
    rows = {figure: row["difference"] for figure, row in summary["methods"][METHODS[1]].items()}
    assert rows["top1"]["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert all(row["p"] is None for figure, row in rows.items() if figure != "top1")
    same, again, _ = synthetic(tmp_path / "same", 1)
    assert _over_images(same, [again[0], again[0]], SHOTS) == ""
    row = same["methods"][METHODS[1]]["top1"]["difference"]
    assert (row["p"], row["images"]) == (1, None), "no image is judged otherwise"


def test_what_is_said_where_test_images_cannot_be_resampled(tmp_path):
    """Runs of other images, then one whose file is missing; the rest of the table is as ever."""
    summary, folders, _ = synthetic(tmp_path, 1)
    other = write_run(tmp_path / "other", SHOTS, images_per_class=8)
    said = "observed.npz of the runs is not of the same images; write it anew: equipoise evaluate RUN"
    assert _over_images(summary, [folders[0], other], SHOTS) == said
    (folders[1] / "observed.npz").unlink()
    summary["unknown"] = _over_images(summary, folders, SHOTS)
    assert summary["unknown"].startswith(f"{folders[1] / 'observed.npz'} is missing; write it anew: equipoise evaluate")
    table = markdown({"recipe": {"name": "x"}, "seeds": [0], **summary})
    assert f"Intervals over images are not known: {summary['unknown']}" in table.splitlines()
    assert "over images |" not in table
    assert "| supcon+la - ce | " in table


def test_the_spread_of_each_class_over_seeds(tmp_path):
    summary, folders, right_RN = synthetic(tmp_path, 3)
    for at, method in enumerate(METHODS):
        of_classes_SC = right_RN[at::2].reshape(3, 7, 9).mean(2)
        expected = [stdev(of_classes_SC[:, label]) for label in range(7)]
        assert summary["per_class_sd"][method] == pytest.approx(expected)
        assert summary["seconds"][method] is None, "they are of an earlier version"
    metrics = [Run(folder).metrics | {"cost": {"seconds": 10.0 + at}} for at, folder in enumerate(folders)]
    metrics[0]["last"]["test"]["per_class"][2] = None  # a class without test images
    summary = _summary(METHODS, 3, metrics)
    assert summary["seconds"] == {METHODS[0]: 12, METHODS[1]: 13}
    assert [label for label, sd in enumerate(summary["per_class_sd"][METHODS[0]]) if sd is None] == [2]
    assert _summary(METHODS, 1, metrics[:2])["per_class_sd"] == {}


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
    row = result["methods"]["supcon+la"]["top1"]["difference"]
    for label, (low, high) in (("seeds", (row["low"], row["high"])), ("images", row["images"])):
        assert f"| supcon+la - ce, over {label} | [{100 * low:+.1f}, {100 * high:+.1f}] |" in table
    assert f"| supcon+la - ce, p | {row['p']:.2g} |" in table, "of one difference, nothing is corrected"
    assert "difference" not in result["methods"]["ce"]["few"]
    for method in METHODS:
        costs = [json.loads((compared / name / "metrics.json").read_text())["cost"] for name in result["runs"].values()]
        known = [cost["seconds"] for cost in costs[METHODS.index(method) :: 2]]
        assert result["seconds"][method] == pytest.approx(mean(known))
        assert [cost["images_seen"] for cost in costs] == [2 * 342] * 4
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "<h2>Over 2 seeds</h2>" in page
    assert "digits-lt: ce · supcon+la" in page


@pytest.mark.slow
def test_the_table_alone_of_runs_that_are_there(compared, capsys):
    """What --markdown prints is compare.md, byte for byte; no run is trained or scored anew."""
    kept = {file: file.stat().st_mtime_ns for file in compared.glob("*/*.*")}
    before = (compared / "compare.md").read_text(encoding="utf-8")
    assert main([*WORDS, "--seeds", "2", "--out", str(compared), "--markdown"]) == 0
    said = capsys.readouterr()
    assert said.out == before == (compared / "compare.md").read_text(encoding="utf-8")
    assert "4 of 4: supcon+la, seed 1, is there" in said.err
    assert {file: file.stat().st_mtime_ns for file in compared.glob("*/*.*")} == kept


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
    with pytest.raises(UserError, match="not every run is scored by its last checkpoint on the test part; train"):
        _summary(["bcl", "ce"], 1, [{"last": last, "best": None}, {"last": last, "best": last}])


def test_groups_without_classes_are_left_out_and_one_seed_has_no_sd():
    bcl, ce = (
        {"test": {"top1": top1, "mean_per_class": few, "many": None, "medium": None, "few": few}, "validation": None}
        for top1, few in ((0.5, 0.25), (0.25, 0.25))
    )
    cost = {"seconds": 1234.5}
    runs = [{"last": bcl, "best": None, "cost": cost}, {"last": ce, "best": None}]
    summary = _summary(["bcl", "ce"], 1, runs)
    assert markdown({"recipe": {"name": "x"}, "seeds": [3], "unknown": "", **summary}).splitlines()[1:] == [
        "",
        "| method | overall | mean over classes | few | seconds |",
        "| --- | --- | --- | --- | --- |",
        "| bcl | 50.0 | 25.0 | 25.0 | 1,234 |",
        "| ce | 25.0 | 25.0 | 25.0 |  |",
        "| ce - bcl | -25.0 | +0.0 | +0.0 |  |",
    ]


def test_what_is_set_holds_for_every_method():
    """Also where a method brings settings of its own; and none are left for the next method."""
    words = ["compare", "cifar10-lt", "--temperature", "0.3"]
    options = _parser(words).parse_args(words)
    bcl, proco, again = (recipe_of_method(options, method).loss for method in ("bcl", "proco", "bcl"))
    assert (bcl.alpha, bcl.beta, bcl.temperature) == (2, 0.6, 0.3)
    assert (proco.alpha, proco.beta, proco.temperature) == (1, 1, 0.3)
    assert again == bcl
