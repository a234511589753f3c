"""Methods under one recipe and several seeds become a table: means, standard deviations, and paired differences to the
first method with their confidence intervals.

Of seed s, method m reaches x_ms; its difference to the first method is d_s = x_ms - x_1s. Over the n seeds the interval
is mean(d) ± t * sd(d) / sqrt(n), with t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom. It
tells what other seeds would change, the data being the same, not what other data would.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from equipoise.base.errors import UserError, several
from equipoise.base.files import atomic_file
from equipoise.config.recipe import Method, Recipe, load_recipe, nearest
from equipoise.evaluation.run import Run, chosen
from equipoise.runs.folder import METRICS, RECIPE, RECORD, write_json
from equipoise.runs.records import read_record
from equipoise.training.place import FREE_IN_COMPARISON, differing
from equipoise.training.plan import Plan, prepare
from equipoise.training.session import train

FIGURES = {"top1": "overall", "many": "many", "medium": "medium", "few": "few"}
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """To the first method, over seeds: `low` and `high` bound the 95 % interval, None with one seed."""

    mean: float
    low: float | None
    high: float | None


def paired_difference(first: Sequence[float], other: Sequence[float]) -> Difference:
    """The mean of `other` - `first`, seed by seed, and its 95 % confidence interval (Student's t, see the module)."""
    from scipy.stats import t

    differences = np.subtract(other, first)
    mean, seeds = float(differences.mean()), len(differences)
    if seeds < 2:
        return Difference(mean, None, None)
    half = float(t.ppf(0.975, seeds - 1) * differences.std(ddof=1) / math.sqrt(seeds))
    return Difference(mean, mean - half, mean + half)


def compare(recipe: Recipe, methods: Sequence[str], seeds: int, out: Path) -> dict[str, Any]:
    """Train every method with `seeds` seeds, from `recipe.seed` on, into `out`/METHOD-seed-N, and write `compare.json`
    and `compare.md` there.

    What is there already, of the same recipe and the same data, is kept; an unfinished run goes on from its last
    checkpoint. Returns what `compare.json` holds. Raises UserError for an unknown method, and for a run folder of
    another recipe or other data.
    """
    _refuse_methods(methods, seeds)
    all_seeds = [recipe.seed + number for number in range(seeds)]
    # Every refusal comes before the first hour of training.
    plan = prepare(replace(recipe, method=methods[0]))  # pyright: ignore[reportArgumentType] it is one
    recipes = {
        out / f"{method.replace('+', '-')}-seed-{seed}": replace(plan.recipe, method=method, seed=seed)  # pyright: ignore[reportArgumentType] it is one
        for seed in all_seeds
        for method in methods
    }
    for folder, of_run in recipes.items():
        if folder.exists():
            _refuse_other(folder, of_run, plan)
    for number, (folder, of_run) in enumerate(recipes.items(), 1):
        finished = (folder / METRICS).is_file()
        found = "is there" if finished else "trains"
        print(f"{number} of {len(recipes)}: {of_run.method}, seed {of_run.seed}, {found}", flush=True)
        if not finished:
            begun = folder.exists()
            train(of_run, out=None if begun else folder, resume=folder if begun else None)
    result = {
        "recipe": asdict(plan.recipe),
        "data": plan.fingerprints,
        "seeds": all_seeds,
        "runs": {f"{of_run.method}, seed {of_run.seed}": folder.name for folder, of_run in recipes.items()},
        **_summary(methods, seeds, [Run(folder).metrics for folder in recipes]),
    }
    write_json(out / "compare.json", result)
    with atomic_file(out / "compare.md") as file:
        file.write(markdown(result).encode("utf-8", "backslashreplace"))
    return result


def _refuse_methods(methods: Sequence[str], seeds: int) -> None:
    known = list(get_args(Method))
    for method in methods:
        if method not in known:
            raise UserError(f"no method is called '{method}'{nearest(method, known)}")
    if len(set(methods)) < len(methods) or len(methods) < 2:
        raise UserError(f"--methods needs two or more different methods, separated by commas, not {','.join(methods)}")
    if not 1 <= seeds <= _MOST_SEEDS:
        raise UserError(f"--seeds must be 1 to {_MOST_SEEDS:,}, not {seeds}")


def _refuse_other(folder: Path, recipe: Recipe, plan: Plan) -> None:
    """Raise UserError where `folder` holds anything but a run of this recipe on this data."""
    if not (folder / RECIPE).is_file() or not (folder / RECORD).is_file():
        raise UserError(f"{folder} is not a run folder; remove it, or name another folder with --out")
    for key, before, now in differing(load_recipe(folder / RECIPE), recipe, FREE_IN_COMPARISON):
        raise UserError(f"{folder} was trained with {key} = {before}, not {now}: change it back, or name another --out")
    if read_record(folder / RECORD)["data"]["fingerprints"] != plan.fingerprints:
        raise UserError(f"{folder} was trained on other data than lies at {recipe.data.path} now; name another --out")


def _summary(methods: Sequence[str], seeds: int, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`metrics` come seed by seed, and of each seed method by method."""
    checkpoint, part = chosen(metrics[0])
    scored = [of_run[checkpoint] and of_run[checkpoint][part] for of_run in metrics]
    if not all(scored) or any(chosen(of_run) != (checkpoint, part) for of_run in metrics):
        raise UserError(
            f"not every run is scored by its {checkpoint} checkpoint on the {part} part; remove the run folders that "
            "are not, and compare again"
        )
    table: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for figure in FIGURES:
        if any(of_run[figure] is None for of_run in scored):  # no class is in this group
            continue
        first = [of_run[figure] for of_run in scored[:: len(methods)]]
        for number, method in enumerate(methods):
            values = [of_run[figure] for of_run in scored[number :: len(methods)]]
            sd = float(np.std(values, ddof=1)) if seeds > 1 else None
            table[method][figure] = {"values": values, "mean": float(np.mean(values)), "sd": sd}
            if number:
                table[method][figure]["difference"] = asdict(paired_difference(first, values))
    return {"checkpoint": checkpoint, "part": part, "methods": table}


def markdown(result: dict[str, Any]) -> str:
    """The table of a comparison for people, as Markdown, in percent."""
    methods, seeds, part, checkpoint = (result[key] for key in ("methods", "seeds", "part", "checkpoint"))
    first, *others = methods
    spread, how = "", "one seed, so no interval can be given"
    if len(seeds) > 1:
        spread, how = ", mean ± sd of a sample", "paired by seed, with its 95 % confidence interval"

    def table(rows: Sequence[str], cell: Callable[[dict[str, Any]], str]) -> list[str]:
        figures = list(methods[first])
        cells = [["method", *(FIGURES[figure] for figure in figures)], ["---"] * (1 + len(figures))]
        cells += [[name, *(cell(methods[name][figure]) for figure in figures)] for name in rows]
        return [f"| {' | '.join(row)} |" for row in cells]

    lines = [
        f"{result['recipe']['name']}: {several(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), {part} part, "
        f"{checkpoint} checkpoint; accuracy in percent{spread}",
        "",
        *table(list(methods), _value),
        "",
        f"Difference to {first}, percentage points, {how}:",
        "",
        *table(others, _difference),
    ]
    if len(seeds) > 1:
        lines += [
            "",
            f"The interval is mean(d) ± t · sd(d) / √n over the differences d of the n = {len(seeds)} seeds (Student's "
            "t). It tells what other seeds would change, not what other data would.",
        ]
    return "\n".join(lines) + "\n"


def _value(row: dict[str, Any]) -> str:
    mean = f"{100 * row['mean']:.1f}"
    return mean if row["sd"] is None else f"{mean} ± {100 * row['sd']:.1f}"


def _difference(row: dict[str, Any]) -> str:
    mean, low, high = (row["difference"][name] for name in ("mean", "low", "high"))
    return f"{100 * mean:+.1f}" + ("" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]")
