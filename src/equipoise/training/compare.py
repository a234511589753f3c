"""Methods under one recipe and several seeds become a table: means, standard deviations, and paired differences to the
first method with their confidence intervals.

Of seed s, method m reaches x_ms; its difference to the first method is d_s = x_ms - x_1s. Over the n seeds the interval
is mean(d) ± t * sd(d) / sqrt(n), t the 97.5 % quantile of Student's distribution of n - 1 degrees of freedom. It tells
what other seeds would change, not what other data would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from equipoise.base.errors import UserError, several
from equipoise.base.files import atomic_file
from equipoise.base.world import ALONE
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Recipe
from equipoise.evaluation.score import Run, chosen
from equipoise.runs.folder import METRICS, RECIPE, RECORD, write_json
from equipoise.runs.records import read_record
from equipoise.training.place import FREE, HOW, differing, find_place
from equipoise.training.plan import Plan, prepare
from equipoise.training.session import start

FIGURES = {"top1": "overall", "mean_per_class": "mean over classes", "many": "many", "medium": "medium", "few": "few"}


def paired_difference(first: Sequence[float], other: Sequence[float]) -> dict[str, float | None]:
    """The `mean` of `other` - `first`, seed by seed, and the bounds `low` and `high` of its 95 % confidence interval
    (Student's t, see the module), None with one seed."""
    from scipy.stats import t

    differences = np.subtract(other, first)
    mean, seeds = float(differences.mean()), len(differences)
    if seeds < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, seeds - 1) * differences.std(ddof=1) / math.sqrt(seeds))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def compare(of_methods: Sequence[Recipe], seeds: int, out: Path) -> dict[str, Any]:
    """Train each of the recipes, which differ in method and loss, with `seeds` seeds, from its own on, into
    `out`/METHOD-seed-N, and write `compare.json` and `compare.md` there.

    What is there already, of the same recipe and data, is kept; an unfinished run goes on. Returns what `compare.json`
    holds. Raises UserError for an unknown method, and for a run folder of another recipe or other data.
    """
    methods = [recipe.method for recipe in of_methods]
    if len(set(methods)) < len(methods) or len(methods) < 2:
        raise UserError(f"--methods needs two or more different methods, separated by commas, not {','.join(methods)}")
    if seeds < 1:
        raise UserError(f"--seeds must be 1 or more, not {seeds}")
    # Every refusal comes before the first hour of training.
    plan, *_ = [prepare(recipe) for recipe in of_methods]
    all_seeds = [of_methods[0].seed + number for number in range(seeds)]
    of_runs = [
        replace(plan.recipe, method=one.method, loss=one.loss, seed=seed) for seed in all_seeds for one in of_methods
    ]
    recipes = {out / f"{of_run.method.replace('+', '-')}-seed-{of_run.seed}": of_run for of_run in of_runs}
    for folder, of_run in recipes.items():
        if folder.exists():
            _refuse_other(folder, of_run, plan)
    for number, (folder, of_run) in enumerate(recipes.items(), 1):
        finished = (folder / METRICS).is_file()
        found = "is there" if finished else "trains"
        print(f"{number} of {len(recipes)}: {of_run.method}, seed {of_run.seed}, {found}", flush=True)
        if not finished:
            begun = folder.exists()
            place = find_place(of_run, None if begun else folder, folder if begun else None, ALONE)
            with start(replace(plan.of(of_run), place=place)) as session:
                session.run()
    result = {
        "recipe": asdict(plan.recipe),
        "losses": {recipe.method: asdict(recipe.loss) for recipe in of_methods},
        "data": plan.fingerprints,
        "seeds": all_seeds,
        "runs": {f"{of_run.method}, seed {of_run.seed}": folder.name for folder, of_run in recipes.items()},
        **_summary(methods, seeds, [Run(folder).metrics for folder in recipes]),
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
        raise UserError(
            f"not every run is scored by its {checkpoint} checkpoint on the {part} part; keep the run folders "
            "that are not elsewhere, and compare again"
        )
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
    return {"checkpoint": checkpoint, "part": part, "methods": table}


def markdown(result: dict[str, Any]) -> str:
    """A comparison as a Markdown table for people, in percent."""
    methods, seeds = result["methods"], result["seeds"]
    first, *others = methods
    figures = list(methods[first])
    rows = [["method", *(FIGURES[figure] for figure in figures)], ["---"] * (1 + len(figures))]
    rows += [[name, *(_value(methods[name][figure]) for figure in figures)] for name in methods]
    rows += [[f"{name} - {first}", *(_difference(methods[name][figure]) for figure in figures)] for name in others]
    heading = (
        f"{result['recipe']['name']}: {several(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), {result['part']} "
        f"part, {result['checkpoint']} checkpoint; accuracy in percent: mean ± sd of a sample over seeds, and paired "
        "differences with their 95 % confidence interval (neither with one seed): of other seeds, not of other test "
        "images"
    )
    return "\n".join([heading, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _value(row: dict[str, Any]) -> str:
    mean = f"{100 * row['mean']:.1f}"
    return mean if row["sd"] is None else f"{mean} ± {100 * row['sd']:.1f}"


def _difference(row: dict[str, Any]) -> str:
    mean, low, high = (row["difference"][name] for name in ("mean", "low", "high"))
    return f"{100 * mean:+.1f}" + ("" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]")
