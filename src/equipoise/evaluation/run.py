"""A finished run, and its results."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from equipoise.base.errors import UserError
from equipoise.config.recipe import Recipe, load_recipe
from equipoise.evaluation.score import evaluate_checkpoint, evaluate_run
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, load_checkpoint
from equipoise.runs.folder import BEST, LAST, METRICS, RECIPE
from equipoise.runs.records import CheckpointMetrics, RunMetrics, read_metrics


@dataclass(frozen=True)
class Run:
    """A finished training run, in the folder `path`."""

    path: Path

    @cached_property
    def recipe(self) -> Recipe:
        """The complete recipe, as it was run."""
        return load_recipe(self.path / RECIPE)

    @cached_property
    def metrics(self) -> RunMetrics:
        """What `metrics.json` holds."""
        if not (self.path / METRICS).is_file():
            raise UserError(f"{self.path} has no {METRICS}: the run did not finish")
        return read_metrics(self.path / METRICS)

    @cached_property
    def model(self) -> TwoBranchNetwork:
        """The network of the last checkpoint, on the CPU: uint8 images `[N, 3, S, S]` to logits `[N, C]`."""
        return load_checkpoint(self.path / LAST).build()

    def evaluate(self, data: str | None = None, split: str = "test") -> Mapping[str, Any]:
        """The metrics computed anew: see `evaluate_run`, and for other data or another part `evaluate_checkpoint`."""
        if data is None and split == "test":
            return evaluate_run(self.path)
        return evaluate_checkpoint(self.path / LAST, data, split)[0]


def chosen(metrics: Mapping[str, Any]) -> tuple[Literal["last", "best"], Literal["validation", "test"]]:
    """Which metrics are shown as the result of a run (`RunMetrics`): the best checkpoint's where validation chose one,
    else the last's, on the test part, or else on validation."""
    checkpoint = "best" if metrics["best"] else "last"
    return checkpoint, "test" if metrics[checkpoint]["test"] else "validation"


def figures_of(file: Path, checkpoint: Checkpoint) -> CheckpointMetrics | None:
    """What the `metrics.json` beside a checkpoint's file says of it; None where it says nothing, or was written after
    another step, as while a resumed run is being trained."""
    written = file.with_name(METRICS)
    if file.name not in (LAST, BEST) or not written.is_file():
        return None
    figures = read_metrics(written)["last" if file.name == LAST else "best"]
    return figures if figures and figures.get("step") == checkpoint.step else None
