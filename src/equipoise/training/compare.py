"""Methods under one recipe and several seeds become a table: means, standard deviations, and paired differences to the
first method with their confidence intervals.

Of seed s, method m reaches x_ms; its difference to the first method is d_s = x_ms - x_1s. Over the n seeds the interval
is mean(d) ± t * sd(d) / sqrt(n), with t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom. It
tells what other seeds would change, the data being the same, not what other data would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.config.recipe import Method, Recipe, field_value, load_recipe, nearest, recipe_fields
from equipoise.evaluation.run import Run, chosen
from equipoise.runs.folder import METRICS, RECIPE, RECORD, write_json
from equipoise.runs.records import read_record
from equipoise.training.loop import fit
from equipoise.training.plan import Plan, prepare

FIGURES = {"top1": "overall", "many": "many", "medium": "medium", "few": "few"}
_MOST_SEEDS = 1000
# They change where and how often, not what is trained.
_FREE = {"name", "summary", "device", "workers", "log_every", "checkpoint_minutes"}


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
    known = list(get_args(Method))
    for method in methods:
        if method not in known:
            raise UserError(f"no method is called '{method}'{nearest(method, known)}")
    if len(set(methods)) < len(methods) or len(methods) < 2:
        raise UserError(
            f"--methods needs two or more different methods, separated by commas, not '{','.join(methods)}'"
        )
    if not 1 <= seeds <= _MOST_SEEDS:
        raise UserError(f"--seeds must be 1 to {_MOST_SEEDS:,}, not {seeds}")
    cells = [(method, recipe.seed + number) for number in range(seeds) for method in methods]
    # Every refusal comes before the first hour of training.
    plan = prepare(replace(recipe, method=cells[0][0], seed=cells[0][1]))  # pyright: ignore[reportArgumentType] checked
    folders = {cell: out / f"{cell[0].replace('+', '-')}-seed-{cell[1]}" for cell in cells}
    recipes = {cell: replace(plan.recipe, method=cell[0], seed=cell[1]) for cell in cells}
    for cell, folder in folders.items():
        if folder.exists():
            _refuse_other(folder, recipes[cell], plan)
    for number, (cell, folder) in enumerate(folders.items(), 1):
        found = "is there" if (folder / METRICS).is_file() else "trains"
        print(f"{number} of {len(cells)}: {cell[0]}, seed {cell[1]}, {found}", flush=True)
        if not (folder / METRICS).is_file():
            _finish(folder, recipes[cell])
    metrics = {cell: Run(folder).metrics for cell, folder in folders.items()}
    result = {
        "recipe": asdict(plan.recipe),
        "data": {name: part.fingerprint() for name, part in plan.parts.named().items()},
        "seeds": [recipe.seed + number for number in range(seeds)],
        "runs": {f"{method}, seed {seed}": folder.name for (method, seed), folder in folders.items()},
        **_summary(methods, seeds, [metrics[cell] for cell in cells]),
    }
    write_json(out / "compare.json", result)
    with atomic_file(out / "compare.md") as file:
        file.write(markdown(result).encode("utf-8", "backslashreplace"))
    return result


def _refuse_other(folder: Path, recipe: Recipe, plan: Plan) -> None:
    """Raise UserError where `folder` holds anything but a run of this recipe on this data."""
    if not (folder / RECIPE).is_file() or not (folder / RECORD).is_file():
        raise UserError(f"{folder} is not a run folder; remove it, or name another folder with --out")
    there = load_recipe(folder / RECIPE)
    for field in recipe_fields():
        before, now = field_value(there, field), field_value(recipe, field)
        if before != now and field.key not in _FREE:
            raise UserError(
                f"{folder} was trained with {field.key} = {before}, not {now}: change it back, or name another folder "
                "with --out"
            )
    data = read_record(folder / RECORD)["data"]["fingerprints"]
    if data != {name: part.fingerprint() for name, part in plan.parts.named().items()}:
        raise UserError(f"{folder} was trained on other data than lies at {recipe.data.path} now; name another --out")


def _finish(folder: Path, recipe: Recipe) -> None:
    """Train what is missing of a run, from nothing or from its last checkpoint."""
    fit(prepare(recipe, resume=folder) if folder.exists() else prepare(recipe, folder))


def _summary(methods: Sequence[str], seeds: int, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`metrics` come seed by seed, and of each seed method by method."""
    checkpoint, part = chosen(metrics[0])
    if any(chosen(of_run) != (checkpoint, part) for of_run in metrics):
        raise UserError(
            f"not every run is scored by its {checkpoint} checkpoint on the {part} part; remove the run folders that "
            "are not, and compare again"
        )
    scored = [of_run[chosen(of_run)[0]][part] for of_run in metrics]
    if not all(scored):
        raise UserError(f"not every run has figures on the {part} part; remove the run folders without")
    table: dict[str, Any] = {}
    for number, method in enumerate(methods):
        table[method] = {}
        for figure in FIGURES:
            if any(of_run[figure] is None for of_run in scored):  # no class is in this group
                continue
            values = [of_run[figure] for of_run in scored[number :: len(methods)]]
            table[method][figure] = {
                "values": values,
                "mean": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)) if seeds > 1 else None,
            }
            if number:
                first = table[methods[0]][figure]["values"]
                table[method][figure]["difference"] = asdict(paired_difference(first, values))
    return {"checkpoint": checkpoint, "part": part, "methods": table}


def markdown(result: dict[str, Any]) -> str:
    """The table of a comparison for people, as Markdown, in percent."""
    methods, seeds = result["methods"], result["seeds"]
    first, *others = methods
    figures = list(methods[first])
    one = len(seeds) == 1
    lines = [
        f"{result['recipe']['name']}: {len(seeds)} {'seed' if one else 'seeds'} ({', '.join(map(str, seeds))}), "
        f"{result['part']} part, {result['checkpoint']} checkpoint; accuracy in percent"
        + ("" if one else ", mean ± sd of a sample"),
        "",
        f"| method | {' | '.join(FIGURES[figure] for figure in figures)} |",
        "|---|" + "---|" * len(figures),
    ]
    for method, row in methods.items():
        cells = [
            f"{100 * row[figure]['mean']:.1f}" + ("" if one else f" ± {100 * row[figure]['sd']:.1f}")
            for figure in figures
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    what = "one seed, so no interval can be given" if one else "paired by seed, with its 95 % confidence interval"
    lines += ["", f"Difference to {first}, percentage points, {what}:", ""]
    lines += [f"| method | {' | '.join(FIGURES[figure] for figure in figures)} |", "|---|" + "---|" * len(figures)]
    for method in others:
        cells = [_spoken(methods[method][figure]["difference"]) for figure in figures]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if not one:
        lines += [
            "",
            f"The interval is mean(d) ± t · sd(d) / √n over the differences d of the n = {len(seeds)} seeds, t the "
            f"97.5 % quantile of Student's distribution with {len(seeds) - 1} degrees of freedom. It tells what other "
            "seeds would change, not what other data would.",
        ]
    return "\n".join(lines) + "\n"


def _spoken(difference: dict[str, Any]) -> str:
    mean = f"{100 * difference['mean']:+.1f}"
    if difference["low"] is None:
        return mean
    return f"{mean} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
