"""Run folders become one HTML page, side by side. No network is run; a run that stopped early has its curves alone.

Shapes: C classes, G shot groups, K bins of a cosine, M images of the map, N of the scored part.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from equipoise.data.images import ImageList, imbalance_factor
from equipoise.data.sources import open_data
from equipoise.evaluation.metrics import FURTHER, GROUP_LIMITS, GROUPS, calibration_error, percent, shot_group
from equipoise.evaluation.predictions import read_observed
from equipoise.evaluation.score import chosen
from equipoise.report import charts
from equipoise.report.charts import Array, Curve
from equipoise.report.svg import Name, Point, shortened, signed
from equipoise.runs.folder import LOG, METRICS, OBSERVED, RECIPE, RECORD
from equipoise.runs.records import CheckpointMetrics, LogLine, RunRecord, read_log, read_metrics, read_record
from equipoise.training.compare import FIGURES
from equipoise.views.loader import steps_per_epoch

MOST_RUNS = 6  # as many as there are colours that can be told apart
Titled = list[tuple[str, Markup]]  # figures with their headings


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
    """A run with the metrics of the checkpoint and the scores on the part that speak for it, and what was observed on
    that part (arrays as `Observation` names them)."""

    checkpoint: str
    part: str
    metrics: CheckpointMetrics
    scores: Mapping[str, Any]  # of `PartMetrics`
    observed: Mapping[str, Array]

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


def write_report(runs: Sequence[Path], out: Path, comparison: Mapping[str, Any] | None = None) -> Path:
    """Write the report of `runs` to `out` and return it; `comparison` is what `compare.json` holds, shown first.

    Raises UserError for what is no run folder, for too many runs and for runs of different classes.
    """
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
    scored = [run for run in runs if isinstance(run, ScoredRun)]
    fields = [(field.key, [str(field_value(run.recipe, field)) for run in runs]) for field in recipe_fields()]
    per_class = [(run.name, run.counts, run.scores["per_class"]) for run in scored]
    group_sizes = {group: runs[0].groups.count(group) for group in GROUPS}
    few = len(scored) <= 2
    return {
        "runs": runs,
        "scored": scored,
        "recipes": [(run.path / RECIPE).read_text(encoding="utf-8") for run in runs],
        "different": [(key, values) for key, values in fields if len(set(values)) > 1],
        "imbalance": imbalance_factor(runs[0].counts),
        "group_sizes": group_sizes,
        "group_limits": GROUP_LIMITS,
        "rarest": next((group for group in reversed(GROUPS) if scored and scored[0].scores[group] is not None), None),
        "comparison": comparison,
        "seeds": _seeds(comparison["methods"], runs) if comparison else None,
        "table": {"top-1": "top1", **{group: group for group in GROUPS}, **FURTHER},
        "bars": charts.group_bars([(run.name, run.scores) for run in scored], group_sizes) if scored else None,
        "by_count": charts.accuracy_by_count(per_class, runs[0].class_names) if scored else [],
        "many_classes": len(runs[0].counts) > charts.EACH_AS_DOT,
        "curves": _curves(runs),
        "worst": _worst(scored) if scored else None,
        "confused": [_confusions(run, 6 if few else 4) for run in scored],
        "mistakes": [_mistakes(run, 12 if few else 4) for run in scored if "mistakes_M" in run.observed],
        "calibration": [_calibration(run) for run in scored],
        "sweep": _sweep(scored),
        "geometry": _geometry(scored, len(runs[0].counts)),
        "maps": [(run, figure) for run in scored if (figure := _map(run))],
    }


def _seeds(methods: Mapping[str, Any], runs: Sequence[RunRead]) -> Markup:
    names = {run.recipe.method: run.name for run in runs}
    of_methods = [(names[method], of_method) for method, of_method in methods.items()]
    rows = {key: [(name, of_method[key]) for name, of_method in of_methods] for key in of_methods[0][1]}
    return charts.over_seeds({FIGURES[key]: row for key, row in rows.items()})


def _curves(runs: Sequence[RunRead]) -> Titled:
    wanted = [  # kind and field of a line of the log, heading, where the axis begins
        ("train", "loss", "loss", 0.0),
        ("train", "classification", "classification term", 0.0),
        ("train", "contrastive", "contrastive term", None),
        ("train", "lr", "learning rate", 0.0),
        ("validation", "mean_per_class", "validation: mean over classes, percent", None),
        ("validation", "few", "validation: few, percent", None),
    ]
    found: Titled = []
    for kind, key, heading, low in wanted:
        curves: list[Curve] = []
        for run in runs:
            steps = steps_per_epoch(run.record["data"]["images"]["train"], run.recipe.batch_size)
            lines = [(line.step / steps, getattr(line, key)) for line in run.log if line.kind == kind]
            scale = 100 if kind == "validation" else 1
            if points := [(epoch, scale * value) for epoch, value in lines if value is not None]:
                curves.append((run.name, points))
        if curves:
            found.append((heading, charts.curves(curves, heading, low)))
    return found


def _worst(scored: Sequence[ScoredRun]) -> dict[str, Any] | None:
    """The classes that the first run gets wrong most; of equal ones, those with the most training images. None if no
    run gets any wrong."""
    first = scored[0]
    accuracies = [[(run.name, run.scores["per_class"][c]) for run in scored] for c in range(len(first.counts))]
    known = sorted((of[0][1], -first.counts[c], c) for c, of in enumerate(accuracies) if of[0][1] is not None)
    wrong = [c for _, _, c in known if any((share or 0) < 1 for _, share in accuracies[c])][:12]
    rows = [(first.class_names[c], first.counts[c], _taken_for(first, c), accuracies[c]) for c in wrong]
    return {"figure": charts.worst_classes(rows), "rows": len(rows), "of": len(known)} if rows else None


def _taken_for(run: ScoredRun, c: int) -> str:
    """What a run takes a class for most often, as a sentence; empty if it takes it for no other."""
    said = run.observed["predicted_N"][run.observed["labels_N"] == c].tolist()
    for other, images in Counter(said).most_common(2):
        if other != c:
            share = f"{run.name.label} takes {100 * images / len(said):.0f} %"
            return f"{share} for {shortened(run.class_names[other], 24)}"
    return ""


def _confusions(run: ScoredRun, most: int) -> tuple[ScoredRun, list[tuple[charts.Pair, list[list[Markup]]]], str]:
    """A run, its pairs with pictures of the mistakes and of the class said, and why there are none."""
    labels_N, predicted_N, confidence_N = (run.observed[key] for key in ("labels_N", "predicted_N", "confidence_N"))
    pairs = charts.confused_pairs(labels_N, predicted_N, confidence_N, len(run.counts), most)
    parts, absent = run.images
    images = parts.get(run.part)
    pictures = [
        [charts.thumbnails(images, rows) if images else [] for rows in (pair.wrong, pair.typical)] for pair in pairs
    ]
    return run, list(zip(pairs, pictures, strict=True)), absent


def _mistakes(run: ScoredRun, most: int) -> tuple[ScoredRun, list[dict[str, Any]], str]:
    """A run, its surest mistakes with the training images nearest to each, and why there are none."""
    parts, absent = run.images
    if absent or "train" not in parts:
        return run, [], absent or "the training images have changed since the run"
    images, train, shown = parts[run.part], parts["train"], list[dict[str, Any]]()
    rows_M, neighbours_MK = (run.observed[key][:most].tolist() for key in ("mistakes_M", "neighbours_MK"))
    for row, near in zip(rows_M, neighbours_MK, strict=True):
        true, said = (run.class_names[run.observed[key][row]] for key in ("labels_N", "predicted_N"))
        about = {"name": images.images.name(row), "sure": run.observed["confidence_N"][row], "true": true, "said": said}
        pictures = {"picture": charts.thumbnails(images, [row]), "near": charts.thumbnails(train, near)}
        classes = [train.class_names[train.labels_N[other]] for other in near]
        shown.append({**about, **pictures, "classes": classes})
    return run, shown, ""


def _calibration(run: ScoredRun) -> tuple[ScoredRun, dict[str, float], Markup]:
    """A run, its calibration errors before and after scaling, and the figure of both."""
    right_N = run.observed["labels_N"] == run.observed["predicted_N"]
    keys = {"before": "confidence_N", "after": "calibrated_N"}
    confidences = {look: run.observed[key].astype(float) for look, key in keys.items() if key in run.observed}
    errors = {look: calibration_error(confidence_N, right_N) for look, confidence_N in confidences.items()}
    return run, errors, charts.reliability(run.name, right_N, confidences)


def _sweep(scored: Sequence[ScoredRun]) -> Titled:
    found: Titled = []
    for key, heading in ("mean_per_class", "mean over classes"), *zip(GROUPS, GROUPS, strict=True):
        sweeps: list[tuple[Name, list[Point], float | None]] = []
        for run in scored:
            rows, post_hoc = run.scores["prior_sweep"], run.metrics["post_hoc"]
            if rows and run.scores[key] is not None:
                points = [(row["tau"], 100 * row[key]) for row in rows]
                sweeps.append((run.name, points, post_hoc["tau"] if post_hoc else None))
        if sweeps:
            found.append((heading, charts.prior_sweep(sweeps, key)))
    return found


def _geometry(scored: Sequence[ScoredRun], classes: int) -> dict[str, Any]:
    vectors = {
        "encoder_means": "class means of the encoder's features",
        "classifier": "class vectors of the classifier",
        "contrastive_means": "class means of the contrastive features",
        "prototypes": "prototypes",
    }
    cosines, spreads = Titled(), Titled()
    for space, heading in vectors.items() if classes > 2 else ():
        key = f"{space}_cosines_GK"
        if counts := [(run.name, run.observed[key]) for run in scored if key in run.observed]:
            cosines.append((heading, charts.cosines(counts, classes)))
    for space, heading in {"encoder": "the encoder's features", "contrastive": "the contrastive features"}.items():
        key = f"{space}_spread_C"
        spread = [(run.name, run.groups, run.observed[key]) for run in scored if key in run.observed]
        if any(np.isfinite(values_C).any() for _, _, values_C in spread):
            spreads.append((heading, charts.spread(spread)))
    return {"cosines": cosines, "spreads": spreads, "simplex": signed(f"{-1 / (classes - 1):.2g}")}


def _map(run: ScoredRun) -> Markup | None:
    """t-SNE of the sampled features; None of too few images, or where all features are the same."""
    features_MF, rows_M = run.observed["map_MF"], run.observed["map_rows_M"]
    if len(rows_M) < 10 or not np.ptp(features_MF, axis=0).any():
        return None

    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    layout = TSNE(perplexity=min(30, (len(rows_M) - 1) / 3), init="pca", random_state=0)
    with threadpool_limits(1):  # of so few images, several threads would mostly wait for each other
        places_M2 = layout.fit_transform(features_MF.astype(np.float32))
    labels_M, predicted_M = run.observed["labels_N"][rows_M], run.observed["predicted_N"][rows_M]
    return charts.feature_map(places_M2, labels_M, predicted_M, run.groups, run.class_names)


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
    names, counts = list(record["class_counts"]), list(record["class_counts"].values())
    run = RunRead(path, name, recipe, record, read_log(path / LOG), names, counts, list(map(shot_group, counts)))
    if not (path / METRICS).is_file() or not (path / OBSERVED).is_file():
        return run
    metrics = read_metrics(path / METRICS)
    checkpoint, part = chosen(metrics)
    block = metrics["best"] or metrics["last"]
    scores, observed = block[part], read_observed(path / OBSERVED, part)
    if scores is None or not observed:
        return run  # there was nothing to score it on
    return ScoredRun(**vars(run), checkpoint=checkpoint, part=part, metrics=block, scores=scores, observed=observed)
