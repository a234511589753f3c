"""A finished run, and what can be asked of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError
from equipoise.config.recipe import Recipe, load_recipe
from equipoise.evaluation.records import read_metrics
from equipoise.evaluation.score import evaluate_checkpoint, evaluate_run
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, load_checkpoint
from equipoise.runs.folder import AUTHORS_NAMES, BEST, LAST, METRICS, RECIPE


@dataclass(frozen=True)
class Run:
    """A finished training run, in the folder `path`."""

    path: Path

    @cached_property
    def recipe(self) -> Recipe:
        """The complete recipe, as it was run."""
        return load_recipe(self.path / RECIPE)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        file = self.path / METRICS
        if not file.is_file():
            raise UserError(f"{self.path} has no {METRICS}: the run did not finish")
        return read_metrics(file)

    @cached_property
    def model(self) -> TwoBranchNetwork:
        """The network of the last checkpoint, on the CPU: uint8 images `[N, 3, S, S]` to logits `[N, C]`."""
        return load_checkpoint(self.path / LAST).build()

    def evaluate(self, data: str | None = None, split: str = "test") -> dict[str, Any]:
        """The figures of the run's checkpoints, computed anew. See `evaluate_run` and `evaluate_checkpoint`."""
        if data is None and split == "test":
            return evaluate_run(self.path)
        return evaluate_checkpoint(self.path / LAST, data, split)[0]


def chosen(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Which of a run's results speaks for it: of the best checkpoint where validation chose one, or else of the last,
    on the test part, or else on validation."""
    checkpoint = "best" if metrics["best"] else "last"
    return checkpoint, "test" if metrics[checkpoint]["test"] else "validation"


def figures_of(path: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the `metrics.json` beside a checkpoint's file says of it; None where it says nothing, or speaks of another
    step, as while a resumed run is being trained."""
    name = {theirs: ours for ours, theirs in AUTHORS_NAMES.items()}.get(path.name, path.name)
    if name not in (LAST, BEST) or not checkpoint.class_counts or not (path.parent / METRICS).is_file():
        return None
    metrics = Run(path.parent).metrics
    block = metrics[Path(name).stem] if metrics["class_names"] == list(checkpoint.class_names) else None
    return block if block and block.get("step") == checkpoint.step else None
