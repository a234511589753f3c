"""Run folders become what the report shows of them: recipe, record, log, scores, observations.

Nothing is computed here, and much may be missing: a run that stopped early has its curves alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UserError, reason
from equipoise.config.recipe import Recipe, load_recipe
from equipoise.evaluation.metrics import GROUPS, shot_group
from equipoise.evaluation.records import read_metrics, read_record
from equipoise.evaluation.run import chosen
from equipoise.report.charts import Name
from equipoise.report.svg import shortened
from equipoise.runs.folder import METRICS, OBSERVED, RECIPE, RECORD

LOG = "metrics.jsonl"

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
    """What a run folder holds, whether the run has finished or not."""

    path: Path
    name: Name
    recipe: Recipe
    record: Mapping[str, Any]
    log: list[LogLine]

    @cached_property
    def class_names(self) -> list[str]:
        return list(self.record["class_counts"])

    @cached_property
    def counts(self) -> list[int]:
        """Training images of each class."""
        return list(self.record["class_counts"].values())

    @cached_property
    def groups(self) -> Array:
        """The shot group of each class."""
        return np.array([shot_group(count) for count in self.counts])

    @cached_property
    def group_sizes(self) -> dict[str, int]:
        """How many classes each shot group has."""
        return {group: int((self.groups == group).sum()) for group in GROUPS}


@dataclass(frozen=True, eq=False)
class ScoredRun(RunRead):
    """A run with the metrics of the checkpoint that speaks for it, on the part that speaks for it, and with what was
    `observed` on that part (arrays as `Observation` names them; empty if an earlier version scored the run)."""

    checkpoint: str
    part: str
    metrics: Mapping[str, Any]
    observed: dict[str, Array]

    @property
    def scores(self) -> Mapping[str, Any]:
        return self.metrics[self.part]

    @property
    def tau(self) -> float | None:
        """The strength of the post-hoc prior that validation chose, if any."""
        return self.metrics["post_hoc"]["tau"] if self.metrics["post_hoc"] else None


def read_runs(paths: Sequence[Path]) -> list[RunRead]:
    """What the run folders hold. Raises UserError for a path that is no run folder, or has a file that cannot be
    read."""
    recipes = [_read_recipe(path) for path in paths]
    names = [Name(label, f"run{number}") for number, label in enumerate(_labels(paths, recipes))]
    return [_read_run(*run) for run in zip(paths, names, recipes, strict=True)]


def _read_recipe(path: Path) -> Recipe:
    if (path / RECIPE).is_file() and (path / RECORD).is_file():
        return load_recipe(path / RECIPE)
    fault = f"is no run folder (it lacks {RECIPE} or {RECORD})" if path.exists() else "does not exist"
    within = min(path.glob(f"*/{RECORD}"), default=None)
    advice = f"name a run folder within it, as {within.parent}" if within else "name one that equipoise train wrote"
    raise UserError(f"{path} {fault}; {advice}")


def _labels(paths: Sequence[Path], recipes: Sequence[Recipe]) -> list[str]:
    """The shortest labels that tell the runs apart."""
    ways = [
        [recipe.method for recipe in recipes],
        [f"{recipe.method}, seed {recipe.seed}" for recipe in recipes],
        [shortened(path.resolve().name, 24) for path in paths],
    ]
    numbered = [f"run {number}" for number in range(1, len(paths) + 1)]
    return next((way for way in ways if len(set(way)) == len(way)), numbered)


def _read_run(path: Path, name: Name, recipe: Recipe) -> RunRead:
    log = _read_log(path / LOG) if (path / LOG).is_file() else []
    run = RunRead(path, name, recipe, read_record(path / RECORD), log)
    if not (path / METRICS).is_file():
        return run
    metrics = read_metrics(path / METRICS)
    checkpoint, part = chosen(metrics)
    if metrics[checkpoint][part] is None:
        return run  # there was nothing to score it on
    observed = _read_observed(path / OBSERVED, part) if (path / OBSERVED).is_file() else {}
    return ScoredRun(path, name, recipe, run.record, log, checkpoint, part, metrics[checkpoint], observed)


def _read_observed(file: Path, part: str) -> dict[str, Array]:
    """The arrays of a part; none where an earlier version wrote the file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:  # so that nothing in it is executed
            observed = {key.removeprefix(f"{part}/"): arrays[key] for key in arrays.files if key.startswith(f"{part}/")}
    except Exception as error:  # numpy, zipfile and zlib raise errors of many kinds
        raise UserError(
            f"{file} is damaged ({reason(error)}); write it anew: equipoise evaluate {file.parent}"
        ) from None
    return observed if "confidence_N" in observed else {}


def _read_log(file: Path) -> list[LogLine]:
    *lines, _ = file.read_bytes().split(b"\n")  # the last is empty, or half a line if the run was killed
    decoder, log = msgspec.json.Decoder(LogLine), list[LogLine]()
    for number, line in enumerate(lines, 1):
        try:
            log.append(decoder.decode(line))
        except ValueError as error:
            raise UserError(f"{file}, line {number} is damaged ({error}); remove that line") from None
    return log
