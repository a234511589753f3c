"""Methods under one recipe and several seeds become a table: means, standard deviations, and paired differences to the
first method with their confidence intervals and tests.

Of seed s, method m reaches x_ms; its difference to the first method is d_s = x_ms - x_1s. Over the n seeds the interval
is mean(d) ± t * sd(d) / sqrt(n), t the 97.5 % quantile of Student's distribution of n - 1 degrees of freedom. A second
interval, from resampling the test images, tells what other images would change for these networks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from equipoise.base.errors import UserError, several
from equipoise.base.files import atomic_file
from equipoise.base.progress import say
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Recipe
from equipoise.evaluation.metrics import bootstrap, figure_weights
from equipoise.evaluation.predictions import read_observed
from equipoise.evaluation.score import Run, chosen
from equipoise.runs.folder import METRICS, OBSERVED, RECIPE, RECORD, write_json
from equipoise.runs.records import read_record
from equipoise.training.plan import FREE, HOW, Plan, differing, prepare
from equipoise.training.session import start

FIGURES = {"top1": "overall", "mean_per_class": "mean over classes", "many": "many", "medium": "medium", "few": "few"}


def paired_difference(first: Sequence[float], other: Sequence[float]) -> dict[str, float | None]:
    """The `mean` of `other` - `first`, `low` and `high` of its 95 % interval, `p` of its t test: None with one seed;
    where all differ alike there are no bounds, and p is 1: so few seeds may agree by chance."""
    from scipy.stats import ttest_1samp

    differences = np.subtract(other, first)
    mean = float(differences.mean())
    if np.ptp(differences) < 1e-12:
        return {"mean": mean, "low": None, "high": None, "p": 1.0 if len(differences) > 1 else None}
    test: Any = ttest_1samp(differences, 0)
    low, high = test.confidence_interval(0.95)
    return {"mean": mean, "low": float(low), "high": float(high), "p": float(test.pvalue)}


def correct(differences: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm` to differences that have a `p`: Holm's correction for their number (Scand. J. Statist. 1979)."""
    rows, highest = sorted((row for row in differences if row["p"] is not None), key=lambda row: row["p"]), 0.0
    for place, row in enumerate(rows):
        row["p_holm"] = highest = max(highest, min(1.0, (len(rows) - place) * row["p"]))


def compare(of_methods: Sequence[Recipe], seeds: int, out: Path) -> dict[str, Any]:
    """Train each of the recipes, which differ in the method and what it brings along, with `seeds` seeds, from its own
    on, into `out`/METHOD-seed-N, and write `compare.json` and `compare.md` there.

    What is there already, of the same recipe and data, is kept; an unfinished run goes on. Returns what `compare.json`
    holds. Raises UserError for an unknown method, and for a run folder of another recipe or other data.
    """
    methods = [recipe.method for recipe in of_methods]
    if len(set(methods)) < len(methods) or len(methods) < 2:
        raise UserError(f"--methods needs two or more different methods, separated by commas, not {','.join(methods)}")
    if seeds < 1:
        raise UserError(f"--seeds must be 1 or more, not {seeds}")
    # Every refusal comes before the first hour of training. The data are read once.
    plan = prepare(of_methods[0])
    plans = [plan, *(prepare(recipe, parts=plan.parts) for recipe in of_methods[1:])]
    all_seeds = [plan.recipe.seed + number for number in range(seeds)]
    of_runs = [replace(one.recipe, seed=seed) for seed in all_seeds for one in plans]
    recipes = {out / f"{of_run.method.replace('+', '-')}-seed-{of_run.seed}": of_run for of_run in of_runs}
    for folder, of_run in recipes.items():
        if folder.exists():
            _refuse_other(folder, of_run, plan)
    for number, (folder, of_run) in enumerate(recipes.items(), 1):
        finished = (folder / METRICS).is_file()
        found = "is there" if finished else "trains"
        say(f"{number} of {len(recipes)}: {of_run.method}, seed {of_run.seed}, {found}")
        if not finished:
            place = (None, folder) if folder.exists() else (folder, None)
            with start(prepare(of_run, *place, parts=plan.parts)) as session:
                session.run()
    metrics = [Run(folder).metrics for folder in recipes]
    summary = _summary(methods, seeds, metrics)
    summary["unknown"] = _over_images(summary, list(recipes), metrics[0]["train_counts"])
    for figure in summary["methods"][methods[0]]:
        correct([summary["methods"][method][figure]["difference"] for method in methods[1:]])
    result = {
        "recipe": asdict(plan.recipe),
        "settings": {  # of each method those that are not the recipe's
            one.recipe.method: {key: now for key, _, now in differing(plan.recipe, one.recipe, frozenset())}
            for one in plans
        },
        "data": plan.fingerprints,
        "seeds": all_seeds,
        "runs": {f"{of_run.method}, seed {of_run.seed}": folder.name for folder, of_run in recipes.items()},
        **summary,
    }
    write_json(out / "compare.json", result)
    with atomic_file(out / "compare.md") as file:
        file.write(markdown(result).encode("utf-8", "backslashreplace"))
    return result


def _refuse_other(folder: Path, recipe: Recipe, plan: Plan) -> None:
    """Raise UserError where `folder` holds anything but a run of this recipe on this data."""
    for key, before, now in differing(load_recipe(folder / RECIPE), recipe, FREE - set(HOW)):
        raise UserError(f"{folder} was trained with {key} = {before}, not {now}: change it back, or name another --out")
    if read_record(folder / RECORD)["data"]["fingerprints"] != plan.fingerprints:
        raise UserError(f"{folder} was trained on other data than lies at {recipe.data.path} now; name another --out")


def _summary(methods: Sequence[str], seeds: int, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`metrics` come seed by seed, and of each seed method by method."""
    checkpoint, part = chosen(metrics[0])
    scored = [of_run[checkpoint] and of_run[checkpoint][part] for of_run in metrics]
    if not all(scored) or any(chosen(of_run) != (checkpoint, part) for of_run in metrics):
        raise UserError(f"not every run is scored by its {checkpoint} checkpoint on the {part} part; train those anew")
    table: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for figure in FIGURES:
        if scored[0][figure] is None:  # no class is in this group
            continue
        of_method = {method: [run[figure] for run in scored[at :: len(methods)]] for at, method in enumerate(methods)}
        for method, values in of_method.items():
            sd = stdev(values) if seeds > 1 else None
            table[method][figure] = {"values": values, "mean": fmean(values), "sd": sd}
            if method != methods[0]:
                table[method][figure]["difference"] = paired_difference(of_method[methods[0]], values)
    spread, seconds = dict[str, Any](), dict[str, Any]()
    for at, method in enumerate(methods):
        if seeds > 1:
            sd_C = np.array([run["per_class"] for run in scored[at :: len(methods)]], float).std(0, ddof=1)
            spread[method] = [None if math.isnan(sd) else sd for sd in sd_C.tolist()]
        known = [run.get("cost", {}).get("seconds") for run in metrics[at :: len(methods)]]
        seconds[method] = fmean(known) if None not in known else None
    return {"checkpoint": checkpoint, "part": part, "methods": table, "per_class_sd": spread, "seconds": seconds}


def _over_images(summary: Mapping[str, Any], folders: Sequence[Path], train_counts: Sequence[int]) -> str:
    """Add to each difference `images`, its interval over test images (None where resampling changes nothing), and of
    one seed `p` of McNemar's exact test (Psychometrika 1947) of top-1. Returns why they are not known, or ''."""
    from scipy.stats import binomtest

    methods, classes = summary["methods"], len(train_counts)
    try:
        read = [read_observed(folder / OBSERVED, summary["part"]) for folder in folders]
    except UserError as error:
        return str(error)
    labels_N = read[0]["labels_N"]
    if not all(np.array_equal(run["labels_N"], labels_N) for run in read):
        return f"{OBSERVED} of the runs is not of the same images; write it anew: equipoise evaluate RUN"
    right_SMN = np.stack([run["predicted_N"] == labels_N for run in read]).reshape(-1, len(methods), len(labels_N))
    seeds, right_MN = len(right_SMN), right_SMN.sum(0)
    weights = figure_weights(np.bincount(labels_N, minlength=classes), train_counts)
    for row, right_N in zip(list(methods.values())[1:], right_MN[1:], strict=True):
        change_N = right_N - right_MN[0]
        counts_CV = np.zeros((classes, 2 * seeds + 1), np.int64)
        np.add.at(counts_CV, (labels_N, change_N + seeds), 1)
        for figure, bounds in bootstrap(counts_CV, np.arange(-seeds, seeds + 1) / seeds, weights).items():
            row[figure]["difference"]["images"] = bounds.tolist() if bounds[0] < bounds[1] else None
        if seeds == 1:
            gained, lost = int((change_N > 0).sum()), int((change_N < 0).sum())
            row["top1"]["difference"]["p"] = float(binomtest(gained, max(1, gained + lost)).pvalue)
    return ""


def markdown(result: dict[str, Any]) -> str:
    """A comparison as a Markdown table for people, in percent, below what its intervals are of."""
    methods, seeds = result["methods"], result["seeds"]
    first, *others = methods
    figures = list(methods[first])
    rows = [["method", *(FIGURES[figure] for figure in figures), "seconds"], ["---"] * (2 + len(figures))]
    for name, row in methods.items():
        values = [_percents("{:.1f}", row[of]["mean"]) + _percents(" ± {:.1f}", row[of]["sd"]) for of in figures]
        rows.append([name, *values, f"{result['seconds'][name]:,.0f}" if result["seconds"][name] else ""])
    for name in others:
        for label, cell in _CELLS.items():
            if any(cells := [cell(methods[name][figure]["difference"]) for figure in figures]):
                rows.append([f"{name} - {first}{label}", *cells, ""])
    test = "paired t test over seeds" if len(seeds) > 1 else "McNemar's exact test of what one method alone gets right"
    heading = (
        f"{result['recipe']['name']}: {several(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), {result['part']} "
        f"part, {result['checkpoint']} checkpoint; accuracy in percent, mean ± sd of a sample over seeds; seconds of "
        "training steps. 95 % intervals of paired differences, not corrected for their number: over seeds (Student's "
        "t: what other seeds would change on these images), over images (bootstrap within classes: what other images "
        f"would change for these networks). p: {test}, Holm-corrected over the methods, each column by itself."
    )
    unknown = ["", f"Intervals over images are not known: {result['unknown']}"] if result["unknown"] else []
    return "\n".join([heading, *unknown, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _percents(form: str, *shares: float | None) -> str:
    return "" if None in shares else form.format(*(100 * (share or 0) for share in shares))


_CELLS: dict[str, Callable[[dict[str, Any]], str]] = {  # of a difference: row by row, its label and its cell
    "": lambda row: _percents("{:+.1f}", row["mean"]),
    ", over seeds": lambda row: _percents("[{:+.1f}, {:+.1f}]", row["low"], row["high"]),
    ", over images": lambda row: _percents("[{:+.1f}, {:+.1f}]", *(row.get("images") or (None, None))),
    ", p": lambda row: f"{row['p_holm']:.2g}" if "p_holm" in row else "",
}
