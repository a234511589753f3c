"""Run folders become one HTML page, side by side. No network is run; a run that stopped early has its curves alone.

Shapes: C classes, G shot groups, K bins of a cosine, M images of the map, N of the scored part.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Recipe, field_value, recipe_fields
from equipoise.data.images import ImageList
from equipoise.data.sources import open_data
from equipoise.evaluation.metrics import ALL_FIGURES, GROUP_LIMITS, GROUPS, calibration_error, percent, shot_group
from equipoise.evaluation.predictions import read_observed
from equipoise.evaluation.score import chosen
from equipoise.report import charts
from equipoise.report.charts import Array
from equipoise.report.svg import Name, Point, shortened
from equipoise.runs.folder import LOG, METRICS, OBSERVED, RECIPE, RECORD
from equipoise.runs.records import read_log, read_metrics, read_record
from equipoise.training.compare import FIGURES
from equipoise.views.loader import steps_per_epoch

MOST_RUNS = 6  # as many as there are colours that can be told apart


class RunRead:
    """A run, finished or not: of each class its training images (`counts`) and its shot group. Of one that was scored
    also the metrics of the checkpoint and the `scores` on the part that speak for it (else None), and what was observed
    on that part (arrays as `Observation` names them)."""

    def __init__(self, path: Path, name: Name, recipe: Recipe) -> None:
        self.path, self.name, self.recipe = path, name, recipe
        self.record, self.log = read_record(path / RECORD), read_log(path / LOG)
        self.class_names, self.counts = list(self.record["class_counts"]), list(self.record["class_counts"].values())
        self.groups = [shot_group(count) for count in self.counts]
        self.metrics: Any = None
        self.scores: Any = None
        self.observed: Mapping[str, Array] = {}
        if (path / METRICS).is_file() and (path / OBSERVED).is_file():
            metrics = read_metrics(path / METRICS)
            self.checkpoint, self.part = chosen(metrics)
            self.metrics = metrics["best"] or metrics["last"]
            self.scores, self.observed = self.metrics[self.part], read_observed(path / OBSERVED, self.part)
        if self.scores:
            self.confusions = charts.confused_pairs(self.observed["labels_N"], self.observed["predicted_N"])

    @cached_property
    def images(self) -> tuple[dict[str, ImageList], str]:
        """The images of the parts that are as they were, and why those of the scored part cannot be shown."""
        try:
            parts = open_data(self.recipe.data).named()
        except UserError as error:
            return {}, str(error).partition(";")[0]  # what follows is advice for other commands
        known = self.record["data"]["fingerprints"]
        same = {part: images for part, images in parts.items() if images.fingerprint() == known.get(part)}
        if self.part not in same:
            return {}, f"the data at {self.recipe.data.path} has changed since the run"
        if len(same[self.part]) != len(self.observed["labels_N"]):
            return {}, "some images could not be read"  # so which row is which image is not known
        return same, ""

    def pictures(self, part: str, rows: Sequence[int]) -> list[Markup]:
        """Those of these images of a part that can be shown."""
        images = self.images[0].get(part)
        return charts.thumbnails(images, rows) if images else []

    def taken(self, true: int, said: int, most: int) -> list[Markup]:
        """Pictures of a class that were taken for that class, the surest."""
        return self.pictures(self.part, charts.surest(self.observed, true, said)[:most])

    def mostly_taken_for(self, c: int) -> str:
        """A sentence; empty if it is taken for no other."""
        for true, said, mistakes, images in self.confusions:
            if true == c:
                name = shortened(self.class_names[said], 24)
                return f"{self.name.label} takes {100 * mistakes / images:.0f} % for {name}"
        return ""

    def curve(self, kind: str, key: str) -> list[Point]:
        """A field of the lines of that kind in the log, over the epochs; of validation in percent."""
        steps = steps_per_epoch(self.record["data"]["images"]["train"], self.recipe.batch_size)
        lines = [(line.step / steps, getattr(line, key)) for line in self.log if line.kind == kind]
        return [(epoch, value * (100 if kind == "validation" else 1)) for epoch, value in lines if value is not None]

    def calibration(self) -> tuple[dict[str, float], Markup]:
        """Calibration errors before and after scaling, and the figure of both."""
        right_N = self.observed["labels_N"] == self.observed["predicted_N"]
        keys = {"before": "confidence_N", "after": "calibrated_N"}
        confidences = {look: self.observed[key].astype(float) for look, key in keys.items() if key in self.observed}
        errors = {look: calibration_error(confidence_N, right_N) for look, confidence_N in confidences.items()}
        return errors, charts.reliability(self.name, right_N, confidences)

    def map(self) -> Markup | None:
        """t-SNE of the sampled features; None of too few images, or where all features are the same."""
        features_MF, rows_M = self.observed["map_MF"], self.observed["map_rows_M"]
        if len(rows_M) < 10 or not np.ptp(features_MF, axis=0).any():
            return None

        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        layout = TSNE(perplexity=min(30, (len(rows_M) - 1) / 3), init="pca", random_state=0)
        with threadpool_limits(1):  # of so few images, several threads would mostly wait for each other
            places_M2 = layout.fit_transform(features_MF.astype(np.float32))
        labels_M, predicted_M = self.observed["labels_N"][rows_M], self.observed["predicted_N"][rows_M]
        return charts.feature_map(places_M2, labels_M, predicted_M, self.groups, self.class_names)


def write_report(runs: Sequence[Path], out: Path, comparison: Mapping[str, Any] | None = None) -> Path:
    """Write the report of `runs` to `out` and return it; `comparison` is what `compare.json` holds, shown first. Raises
    UserError for what is no run folder, for too many runs and for runs of different classes."""
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs cannot be told apart in one figure; name {MOST_RUNS} at most")
    read = read_runs(runs)
    for run in read[1:]:
        if run.class_names != read[0].class_names:
            raise UserError(f"{run.path} has other classes than {read[0].path}; report each alone")
    return write_page("page.html.jinja", _content(read, comparison), out)


def write_page(template: str, content: Mapping[str, Any], out: Path) -> Path:
    """Write a template's page to `out` and return it."""
    loader = jinja2.PackageLoader("equipoise.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = percent
    page = environment.get_template(template).render(content)
    with atomic_file(out) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
    return out


def _content(runs: Sequence[RunRead], comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the template shows, section by section; empty where there is nothing to show."""
    scored = [run for run in runs if run.scores]
    per_class = [(run.name, run.counts, run.scores["per_class"]) for run in scored]
    fields = [(field.key, [str(field_value(run.recipe, field)) for run in runs]) for field in recipe_fields()]
    group_sizes = {group: runs[0].groups.count(group) for group in GROUPS}
    return {
        "runs": runs,
        "scored": scored,
        "recipes": [(run.path / RECIPE).read_text(encoding="utf-8") for run in runs],
        "different": [(key, values) for key, values in fields if len(set(values)) > 1],
        "group_sizes": group_sizes,
        "group_limits": GROUP_LIMITS,
        "rarest": next((group for group in reversed(GROUPS) if scored and scored[0].scores[group] is not None), None),
        "comparison": comparison,
        "seeds": _seeds(comparison["methods"], runs) if comparison else None,
        "table": ALL_FIGURES,
        "bars": charts.group_bars([(run.name, run.scores) for run in scored], group_sizes) if scored else None,
        "by_count": charts.accuracy_by_count(per_class, runs[0].class_names) if scored else [],
        "many_classes": len(runs[0].counts) > charts.EACH_AS_DOT,
        "curves": _curves,
        "worst": _worst(scored) if scored else None,
        "sweep": _sweep,
        "cosines": _cosines,
        "spread": _spread,
        "maps": [(run, figure) for run in scored if (figure := run.map())],
    }


def _seeds(methods: Mapping[str, Any], runs: Sequence[RunRead]) -> Markup:
    names = {run.recipe.method: run.name for run in runs}
    of_methods = [(names[method], of_method) for method, of_method in methods.items()]
    rows = {key: [(name, of_method[key]) for name, of_method in of_methods] for key in of_methods[0][1]}
    return charts.over_seeds({FIGURES[key]: row for key, row in rows.items()})


def _worst(scored: Sequence[RunRead]) -> dict[str, Any] | None:
    """The classes that the first run gets wrong most; of equal ones, those with the most training images. None if no
    run gets any wrong."""
    first = scored[0]
    accuracies = [[(run.name, run.scores["per_class"][c]) for run in scored] for c in range(len(first.counts))]
    known = sorted((of[0][1], -first.counts[c], c) for c, of in enumerate(accuracies) if of[0][1] is not None)
    wrong = [c for _, _, c in known if any((share or 0) < 1 for _, share in accuracies[c])][:12]
    rows = [(first.class_names[c], first.counts[c], first.mostly_taken_for(c), accuracies[c]) for c in wrong]
    return {"figure": charts.worst_classes(rows), "rows": len(rows), "of": len(known)} if rows else None


def _curves(runs: Sequence[RunRead], kind: str, key: str, heading: str, low: float | None = None) -> Any:
    """The heading, and the figure if any run has the values."""
    curves = [(run.name, points) for run in runs if (points := run.curve(kind, key))]
    return heading, charts.curves(curves, heading, low) if curves else None


def _sweep(scored: Sequence[RunRead], key: str) -> Markup | None:
    shown = [run for run in scored if run.scores["prior_sweep"] and run.scores[key] is not None]
    points = [[(row["tau"], 100 * row[key]) for row in run.scores["prior_sweep"]] for run in shown]
    chose = [run.metrics["post_hoc"] and run.metrics["post_hoc"]["tau"] for run in shown]
    return charts.prior_sweep([*zip((run.name for run in shown), points, chose, strict=True)], key) if shown else None


def _cosines(scored: Sequence[RunRead], space: str) -> Markup | None:
    key = f"{space}_cosines_GK"
    counts = [(run.name, run.observed[key]) for run in scored if key in run.observed]
    return charts.cosines(counts, len(scored[0].counts)) if counts else None


def _spread(scored: Sequence[RunRead], space: str) -> Markup | None:
    key = f"{space}_spread_C"
    spread = [(run.name, run.groups, run.observed[key]) for run in scored if key in run.observed]
    return charts.spread(spread) if any(np.isfinite(values_C).any() for _, _, values_C in spread) else None


def read_runs(paths: Sequence[Path]) -> list[RunRead]:
    """What the run folders hold, with the shortest labels that tell them apart. Raises UserError for a path that is no
    run folder, and for a damaged file."""
    for path in paths:
        if not (path / RECIPE).is_file() or not (path / RECORD).is_file():
            raise UserError(
                f"{path} is not a run folder: it lacks {RECIPE} or {RECORD}; name one that equipoise train wrote"
            )
    recipes = [load_recipe(path / RECIPE) for path in paths]
    ways = (
        [recipe.method for recipe in recipes],
        [f"{recipe.method}, seed {recipe.seed}" for recipe in recipes],
        [shortened(path.resolve().name, 24) for path in paths],
        [f"run {number}" for number in range(1, len(paths) + 1)],
    )
    labels = next(labels for labels in ways if len(set(labels)) == len(labels))
    names = [Name(label, f"run{number}") for number, label in enumerate(labels)]
    return [RunRead(*of_run) for of_run in zip(paths, names, recipes, strict=True)]
