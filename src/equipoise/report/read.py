"""Run folders become what the report shows of them: recipe, record, log, scores, observations.

Nothing is computed here, and much may be missing: a run that stopped early has its curves alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason
from equipoise.config.recipe import Recipe, load_recipe
from equipoise.evaluation.metrics import shot_group
from equipoise.evaluation.score import chosen
from equipoise.report.charts import Name
from equipoise.report.svg import shortened
from equipoise.runs.folder import LOG, METRICS, OBSERVED, RECIPE, RECORD
from equipoise.runs.records import CheckpointMetrics, RunRecord, read_metrics, read_record

Array = npt.NDArray[Any]


class LogLine(msgspec.Struct):
    """What is drawn of a line of the log: losses and learning rate of 'train', shares of 'validation'."""

    kind: str
    step: int
    epoch: int
    loss: float | None = None
    classification: float | None = None
    contrastive: float | None = None
    lr: float | None = None
    mean_per_class: float | None = None
    few: float | None = None


@dataclass(frozen=True, eq=False)
class RunRead:
    """A run, finished or not; of each class its training images (`counts`) and its shot group."""

    path: Path
    name: Name
    recipe: Recipe
    record: RunRecord
    log: list[LogLine]
    class_names: list[str]
    counts: list[int]
    groups: list[str]


@dataclass(frozen=True, eq=False)
class ScoredRun(RunRead):
    """A run with the metrics of the checkpoint that speaks for it, its scores on the part that speaks for it, and what
    was observed on that part (arrays as `Observation` names them)."""

    checkpoint: str
    part: str
    metrics: CheckpointMetrics
    scores: Mapping[str, Any]  # of `PartMetrics`
    observed: Mapping[str, Array]


def read_runs(paths: Sequence[Path]) -> list[RunRead]:
    """What the run folders hold. Raises UserError for a path that is no run folder, and for a damaged file."""
    for path in paths:
        if not (path / RECIPE).is_file() or not (path / RECORD).is_file():
            fault = f"{path} is not a run folder: it has no {RECIPE} or no {RECORD}"
            raise UserError(f"{fault}; name one that equipoise train wrote")
    recipes = [load_recipe(path / RECIPE) for path in paths]
    names = [Name(label, f"run{number}") for number, label in enumerate(_labels(paths, recipes))]
    return [_read_run(*run) for run in zip(paths, names, recipes, strict=True)]


def _labels(paths: Sequence[Path], recipes: Sequence[Recipe]) -> list[str]:
    """The shortest labels that tell the runs apart."""
    ways = (
        [recipe.method for recipe in recipes],
        [f"{recipe.method}, seed {recipe.seed}" for recipe in recipes],
        [shortened(path.resolve().name, 24) for path in paths],
        [f"run {number}" for number in range(1, len(paths) + 1)],
    )
    return next(labels for labels in ways if len(set(labels)) == len(labels))


def _read_run(path: Path, name: Name, recipe: Recipe) -> RunRead:
    record = read_record(path / RECORD)
    log = _read_log(path / LOG) if (path / LOG).is_file() else []
    counts = list(record["class_counts"].values())
    groups = [shot_group(count) for count in counts]
    run = RunRead(path, name, recipe, record, log, list(record["class_counts"]), counts, groups)
    if not (path / METRICS).is_file() or not (path / OBSERVED).is_file():
        return run
    metrics = read_metrics(path / METRICS)
    checkpoint, part = chosen(metrics)
    block = metrics["best"] or metrics["last"]
    scores, observed = block[part], _read_observed(path / OBSERVED, part)
    if scores is None or not observed:
        return run  # there was nothing to score it on
    return ScoredRun(**vars(run), checkpoint=checkpoint, part=part, metrics=block, scores=scores, observed=observed)


def _read_observed(file: Path, part: str) -> dict[str, Array]:
    """The arrays of a part."""
    try:
        with np.load(file, allow_pickle=False) as arrays:  # so that nothing in it is executed
            return {key.removeprefix(f"{part}/"): arrays[key] for key in arrays.files if key.startswith(f"{part}/")}
    except Exception as error:  # numpy, zipfile and zlib raise errors of many kinds
        advice = f"write it anew: equipoise evaluate {file.parent}"
        raise UserError(f"{file} is damaged ({reason(error)}); {advice}") from None


def _read_log(file: Path) -> list[LogLine]:
    lines, _, _ = file.read_bytes().rpartition(b"\n")  # without half a line, which a killed run may leave
    try:
        return msgspec.json.Decoder(LogLine).decode_lines(lines)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and the report is without curves") from None
