"""Run folders become what the report shows of them: recipe, record, log, figures, observations.

Nothing is computed here, and much may be missing: a run that stopped early left its curves alone.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.charts import Name
from equipoise.errors import UserError
from equipoise.figures import shortened
from equipoise.recipe import Recipe, load_recipe
from equipoise.run import METRICS, OBSERVED, RECIPE, RECORD, chosen, read_json

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RunRead:
    """What a run folder holds. Of a run that stopped early `metrics` is None, and `observed`, which is of
    the part that speaks for the run, is empty."""

    path: Path
    name: Name
    recipe: Recipe
    record: dict[str, Any]
    log: list[dict[str, Any]]
    metrics: dict[str, Any] | None
    checkpoint: str
    part: str
    observed: dict[str, Array]

    @property
    def figures(self) -> dict[str, Any]:
        """Of a scored run: the figures that are shown, as in `metrics.json`."""
        assert self.metrics is not None
        return self.metrics[self.checkpoint][self.part]

    @property
    def class_names(self) -> list[str]:
        return list(self.record["class_counts"])

    @property
    def counts(self) -> list[int]:
        return list(self.record["class_counts"].values())


def read_runs(paths: Sequence[Path]) -> list[RunRead]:
    """What the run folders hold. Raises UserError for what is no run folder, or damaged."""
    recipes = [_read_recipe(path) for path in paths]
    return [
        _read_run(path, Name(label, f"run{number}"), recipe)
        for number, (path, label, recipe) in enumerate(zip(paths, _labels(paths, recipes), recipes, strict=True))
    ]


def _read_recipe(path: Path) -> Recipe:
    if not (path / RECIPE).is_file() or not (path / RECORD).is_file():
        raise UserError(f"{path} is not a run folder: it has no {RECIPE} or no {RECORD}")
    return load_recipe(path / RECIPE)


def _labels(paths: Sequence[Path], recipes: Sequence[Recipe]) -> list[str]:
    """The shortest of these that tells the runs apart."""
    ways = [
        [recipe.method for recipe in recipes],
        [f"{recipe.method}, seed {recipe.seed}" for recipe in recipes],
        [shortened(path.resolve().name, 24) for path in paths],
    ]
    numbered = [f"run {number}" for number in range(1, len(paths) + 1)]
    return next((way for way in ways if len(set(way)) == len(way)), numbered)


def _read_run(path: Path, name: Name, recipe: Recipe) -> RunRead:
    metrics = read_json(path / METRICS) if (path / METRICS).is_file() else None
    checkpoint, part = chosen(metrics) if metrics else ("last", "test")
    if metrics and metrics[checkpoint][part] is None:
        metrics = None  # nothing was there to score it on
    observed: dict[str, Array] = {}
    if metrics and (path / OBSERVED).is_file():
        try:
            with np.load(path / OBSERVED) as file:
                mine = [key for key in file.files if key.startswith(f"{part}/")]
                observed = {key.removeprefix(f"{part}/"): file[key] for key in mine}
        except (ValueError, OSError, zipfile.BadZipFile):
            raise UserError(f"{path / OBSERVED} is damaged; write it anew: equipoise evaluate {path}") from None
    if "confidence_N" not in observed:
        observed = {}  # of an earlier version
    try:
        record = read_json(path / RECORD)
        log = _read_log(path / "metrics.jsonl")
    except (ValueError, OSError):
        raise UserError(f"{path / RECORD} is damaged or incomplete; name another run") from None
    return RunRead(path, name, recipe, record, log, metrics, checkpoint, part, observed)


def _read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; the last may be half a line where the run was killed."""
    lines: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
