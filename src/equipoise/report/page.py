"""Run folders become one HTML page, side by side. It reads what a run left and runs no network.

Shapes: C classes, G shot groups, K bins of a cosine, M images of the map, N of the scored part.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.config.recipe import field_value, recipe_fields
from equipoise.data.images import ImageList, imbalance_factor
from equipoise.data.sources import open_data
from equipoise.evaluation.metrics import FURTHER, GROUPS, calibration_error, shot_group
from equipoise.report import charts
from equipoise.report.charts import LIMITS, Name
from equipoise.report.confusions import confused_pairs, thumbnails
from equipoise.report.read import RunRead, read_runs
from equipoise.report.svg import shortened, signed
from equipoise.runs.folder import RECIPE
from equipoise.views.loader import steps_per_epoch

MOST_RUNS = 6  # as many as there are colours that can be told apart
_WORST = 12

Array = npt.NDArray[Any]


def write_report(runs: Sequence[Path], out: Path, comparison: Mapping[str, Any] | None = None) -> Path:
    """Write the report of `runs` to `out` and return it; `comparison` is what `compare.json` holds, shown first.

    Raises UserError for what is no run folder, for too many runs and for runs of different classes.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs cannot be told apart in one figure; name {MOST_RUNS} at most")
    read = read_runs(runs)  # first: `out` may lie in what is no run folder
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError(f"the report must be a file in a folder that is there, not {out}")
    for run in read[1:]:
        if run.class_names != read[0].class_names:
            raise UserError(
                f"{run.path} has other classes than {read[0].path}: they cannot be compared; report each alone"
            )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("equipoise.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(_content(read, comparison))
    with atomic_file(out) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
    return out


# ---------------------------------------------------------------------------------------------- the page


def _content(runs: list[RunRead], comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the template needs, section by section; None or empty where there is nothing to show."""
    scored = [run for run in runs if run.metrics]
    seen = [run for run in scored if run.observed]
    return {
        "runs": runs,
        "title": f"{runs[0].recipe.name}: {' · '.join(run.name.label for run in runs)}",
        "facts": _facts(runs[0]),
        "finding": _finding(scored, comparison),
        "seeds": _seeds(comparison, runs) if comparison else None,
        "scored": scored,
        "many_classes": len(runs[0].class_names) > charts.EACH_AS_DOT,
        "unseen": [run for run in scored if not run.observed],
        "stopped": [run for run in runs if not run.metrics],
        "by_count": charts.accuracy_by_count(
            [(run.name, run.counts, run.figures["per_class"]) for run in scored], runs[0].class_names
        )
        if scored
        else [],
        "bars": charts.group_bars([(run.name, run.figures) for run in scored], _group_sizes(scored[0]))
        if scored
        else None,
        "table": _table(scored),
        "curves": _curves(runs),
        "worst": _worst(scored) if scored else None,
        "confused": [_confusions(run, 6 if len(seen) <= 2 else 4) for run in seen],
        "calibration": [_calibration(run) for run in seen],
        "sweep": _sweep(scored),
        "tau_chosen": any(run.metrics[run.checkpoint]["post_hoc"] for run in scored if run.metrics),
        "geometry": _geometry(seen, len(runs[0].class_names)),
        "maps": [(run.name, _map(run)) for run in seen],
        "groups": [group for group, classes in _group_sizes(runs[0]).items() if classes],
        "origin": [_origin(run, runs[0]) for run in runs],
        "different": _different_fields(runs),
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _group_sizes(run: RunRead) -> dict[str, int]:
    groups = [shot_group(count) for count in run.counts]
    return {group: groups.count(group) for group in GROUPS}


def _facts(run: RunRead) -> str:
    """What was trained on, and scored on."""
    counts = run.counts
    scored = f" · scored on {run.figures['images']:,} {run.part} images" if run.metrics else ""
    return (
        f"{sum(counts):,} training images in {len(counts):,} classes, from {max(counts):,} to {min(counts):,} a class "
        f"(imbalance factor {imbalance_factor(counts):.4g}){scored}"
    )


def _finding(scored: Sequence[RunRead], comparison: Mapping[str, Any] | None) -> str:
    """The first sentence: what the runs reach on the rarest classes there are."""
    if not scored:
        return "No run was scored yet: what follows are the curves of training."
    first = scored[0]
    group = next(group for group in reversed(GROUPS) if first.figures[group] is not None)
    shares = [(run.name.label, run.figures[group]) for run in scored]
    if comparison:
        shares = [(method, row[group]["mean"]) for method, row in comparison["methods"].items()]
    reached = [f"{label} {_percent(share)}\N{NO-BREAK SPACE}%" for label, share in shares]
    reached[0] = f"{shares[0][0]} gets {_percent(shares[0][1])}\N{NO-BREAK SPACE}% right"
    said = ", ".join(reached[:-1]) + " and " * (len(reached) > 1) + reached[-1]
    classes = _group_sizes(first)[group]
    noun = "one class" if classes == 1 else f"{classes:,} classes"
    mean = f", in the mean of {len(comparison['seeds'])} seeds" if comparison and len(comparison["seeds"]) > 1 else ""
    return f"Of the {first.part} images of the {noun} with {LIMITS[group]} training images, {said}{mean}."


def _table(scored: Sequence[RunRead]) -> list[tuple[str, list[str]]]:
    rows = {"top-1": "top1", **FURTHER}
    return [(said, [_percent(run.figures[key]) for run in scored]) for said, key in rows.items()]


def _curves(runs: Sequence[RunRead]) -> list[tuple[str, Markup]]:
    wanted = [
        ("train", "loss", "loss", 0.0),
        ("train", "classification", "classification term", 0.0),
        ("train", "contrastive", "contrastive term", None),
        ("train", "lr", "learning rate", 0.0),
        ("validation", "mean_per_class", "validation: mean over classes, percent", None),
        ("validation", "few", "validation: few, percent", None),
    ]
    found: list[tuple[str, Markup]] = []
    for kind, key, said, low in wanted:
        series: list[tuple[Name, list[float], list[float]]] = []
        for run in runs:
            steps = steps_per_epoch(run.record["data"]["images"]["train"], run.recipe.batch_size)
            lines = [line for line in run.log if line["kind"] == kind and line.get(key) is not None]
            scale = 100 if kind == "validation" else 1
            if lines:
                series.append(
                    (run.name, [line["step"] / steps for line in lines], [scale * line[key] for line in lines])
                )
        if series:
            found.append((said, charts.curves(series, said, low)))
    return found


# ---------------------------------------------------------------------------------------------- what goes wrong


def _worst(scored: Sequence[RunRead]) -> dict[str, Any] | None:
    """The classes that the first run gets wrong most; of equal ones, those with the most training images. None where no
    run gets any wrong."""
    first = scored[0]
    per_class: list[list[float | None]] = [run.figures["per_class"] for run in scored]
    known = [(share, -first.counts[c], c) for c, share in enumerate(per_class[0]) if share is not None]
    wrong = [place for place in sorted(known) if any((of_run[place[2]] or 0) < 1 for of_run in per_class)]
    rows: list[tuple[str, int, str, list[tuple[Name, float | None]]]] = []
    for _, count, c in wrong[:_WORST]:
        values = [(run.name, of_run[c]) for run, of_run in zip(scored, per_class, strict=True)]
        rows.append((first.class_names[c], -count, _taken_for(first, c), values))
    if not rows:
        return None
    without = [(run.name.label, of_run.count(0)) for run, of_run in zip(scored, per_class, strict=True)]
    never = [f"{label} leaves {count:,}" for label, count in without if count]
    return {
        "figure": charts.worst_classes(rows),
        "rows": len(rows),
        "never": never,
        "of": first.name.label,
        "classes": f"{len(known):,}",
    }


def _taken_for(run: RunRead, c: int) -> str:
    if not run.observed:
        return ""
    predicted = run.observed["predicted_N"][run.observed["labels_N"] == c]
    wrong = predicted[predicted != c]
    if len(wrong) == 0:
        return ""
    other = int(np.bincount(wrong).argmax())
    share = 100 * (wrong == other).sum() / len(predicted)
    return f"{run.name.label} takes {share:.0f} % for {shortened(run.class_names[other], 24)}"


def _confusions(run: RunRead, most: int) -> dict[str, Any]:
    labels_N, predicted_N, confidence_N = (run.observed[key] for key in ("labels_N", "predicted_N", "confidence_N"))
    pairs = confused_pairs(labels_N, predicted_N, confidence_N, len(run.class_names), most)
    images, absent = _images(run)
    shown = [
        {
            "true": run.class_names[pair.true],
            "said": run.class_names[pair.said],
            "mistakes": f"{pair.mistakes:,} of {pair.images:,}",
            "wrong": thumbnails(images, pair.wrong) if images else [],
            "typical": thumbnails(images, pair.typical) if images else [],
        }
        for pair in pairs
    ]
    return {"name": run.name, "pairs": shown, "absent": absent}


def _images(run: RunRead) -> tuple[ImageList | None, str]:
    """The scored part's images, or why they cannot be shown."""
    try:
        images = open_data(run.recipe).named().get(run.part)
    except UserError as error:
        return None, f"No example pictures: {str(error).partition(';')[0]}."  # what to do is of other commands
    if images is None or images.fingerprint() != run.record["data"]["fingerprints"].get(run.part):
        return None, f"No example pictures: the data at {run.recipe.data.path} has changed since the run."
    if len(images) != len(run.observed["labels_N"]):
        return None, "No example pictures: some images could not be read, so it is not known which are which."
    return images, ""


# ---------------------------------------------------------------------------------------------- calibration, prior


def _calibration(run: RunRead) -> dict[str, Any]:
    assert run.metrics is not None
    right_N = run.observed["labels_N"] == run.observed["predicted_N"]
    confidences = {
        look: run.observed[key].astype(np.float64)
        for look, key in {"before": "confidence_N", "after": "calibrated_N"}.items()
        if key in run.observed
    }
    return {
        "name": run.name,
        "temperature": run.metrics[run.checkpoint]["temperature"],
        "errors": {look: _percent(calibration_error(values, right_N)) for look, values in confidences.items()},
        "figure": charts.reliability(run.name, right_N, confidences),
        "on": run.part,
    }


def _sweep(scored: Sequence[RunRead]) -> list[tuple[str, Markup]]:
    known = [run for run in scored if run.figures["prior_sweep"]]
    found: list[tuple[str, Markup]] = []
    for key, said in {"mean_per_class": "mean over classes", **dict(zip(GROUPS, GROUPS, strict=True))}.items():
        runs: list[tuple[Name, list[dict[str, Any]], float | None]] = []
        for run in known:
            assert run.metrics is not None
            post_hoc = run.metrics[run.checkpoint]["post_hoc"]
            if run.figures[key] is not None:
                runs.append((run.name, run.figures["prior_sweep"], post_hoc["tau"] if post_hoc else None))
        if runs:
            found.append((said, charts.prior_sweep(runs, key)))
    return found


# ---------------------------------------------------------------------------------------------- geometry


def _geometry(seen: Sequence[RunRead], classes: int) -> dict[str, Any]:
    wanted = {
        "encoder_means": "class means of the encoder's features",
        "classifier": "class vectors of the classifier",
        "contrastive_means": "class means of the contrastive features",
        "prototypes": "prototypes",
    }
    found: list[tuple[str, Markup]] = []
    for key, said in wanted.items():
        runs = [(run.name, run.observed[f"{key}_cosines_GK"]) for run in seen if f"{key}_cosines_GK" in run.observed]
        if runs and classes > 2:
            found.append((said, charts.cosines(runs, classes)))
    spreads: list[tuple[str, Markup]] = []
    for space, said in {"encoder": "the encoder's features", "contrastive": "the contrastive features"}.items():
        groups = [
            (run.name, _by_group(run.observed[f"{space}_spread_C"], run.counts))
            for run in seen
            if f"{space}_spread_C" in run.observed
        ]
        if any(np.isfinite(values).any() for _, of_run in groups for values in of_run.values()):
            spreads.append((said, charts.spread(groups)))
    return {"cosines": found, "spreads": spreads, "simplex": signed(f"{-1 / (classes - 1):.2g}")}


def _by_group(values_C: Array, counts: Sequence[int]) -> dict[str, Array]:
    groups_C = np.array([shot_group(count) for count in counts])
    return {group: values_C[groups_C == group] for group in GROUPS}


def _map(run: RunRead) -> Markup | None:
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
    groups_C = np.array([GROUPS.index(shot_group(count)) for count in run.counts])
    return charts.feature_map(places_M2, labels_M, predicted_M, groups_C, run.class_names)


# ---------------------------------------------------------------------------------------------- seeds, origin


def _seeds(comparison: Mapping[str, Any], runs: Sequence[RunRead]) -> dict[str, Any]:
    names = {run.recipe.method: run.name for run in runs}
    table = comparison["methods"]
    first = next(iter(table))
    spoken = {"top1": "overall", **dict(zip(GROUPS, GROUPS, strict=True))}
    rows = {spoken[key]: [(names[method], row[key]) for method, row in table.items()] for key in table[first]}
    others = {said: [(name, told) for name, told in row if "difference" in told] for said, row in rows.items()}
    return {
        "number": len(comparison["seeds"]),
        "first": first,
        "accuracy": charts.over_seeds(rows),
        "differences": charts.differences(others),
    }


def _origin(run: RunRead, first: RunRead) -> dict[str, Any]:
    record, data = run.record, run.record["data"]
    same = data["fingerprints"] == first.record["data"]["fingerprints"]
    scored = run.metrics[run.checkpoint]["epoch"] if run.metrics else None
    done = max((line["epoch"] for line in run.log), default=-1) + 1
    git = record.get("git")
    rows = {
        "recipe": f"{run.recipe.name}, method {run.recipe.method}, seed {run.recipe.seed}",
        "scored": f"{run.checkpoint} checkpoint (after epoch {scored}), {run.part} part"
        if run.metrics
        else f"not scored: stopped in epoch {done} of {run.recipe.epochs}",
        "command": record["command"],
        "started": record["started"],
        "data": f"{data['kind']}: {', '.join(f'{count:,} {part}' for part, count in data['images'].items())}",
        "data fingerprints": ", ".join(f"{part} {value[:12]}" for part, value in data["fingerprints"].items())
        + ("" if same else f" (not the data of {first.name.label})"),
        "versions": ", ".join(f"{package} {version}" for package, version in record["versions"].items()),
        "machine": ", ".join(f"{what} {value}" for what, value in record["machine"].items())
        + f", {record['precision']}",
        "code": f"commit {git['commit'][:12]}{', with changes' if git['changed'] else ''}"
        if git
        else "its version alone is known",
        "folder": str(run.path),
    }
    return {"name": run.name, "rows": rows, "recipe": (run.path / RECIPE).read_text(encoding="utf-8")}


def _different_fields(runs: Sequence[RunRead]) -> list[tuple[str, list[str]]]:
    """The recipe's fields in which the runs differ."""
    fields = [(field.key, [str(field_value(run.recipe, field)) for run in runs]) for field in recipe_fields()]
    return [(key, values) for key, values in fields if len(set(values)) > 1]
