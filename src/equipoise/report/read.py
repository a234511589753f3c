"""Run folders become what the report shows of them: recipe, record, log, figures, observations.

Nothing is computed here, and much may be missing: a run that stopped early left its curves alone.
"""

import io
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UnreadableError, UserError, reason
from equipoise.base.files import ABSENT, fits, is_count, is_number, is_text, parsed_json
from equipoise.config.recipe import Recipe, load_recipe
from equipoise.evaluation.metrics import GROUPS
from equipoise.evaluation.observe import COSINE_BINS
from equipoise.evaluation.run import chosen
from equipoise.report.charts import Name
from equipoise.report.svg import shortened
from equipoise.runs.folder import LOG, METRICS, OBSERVED, RECIPE, RECORD
from equipoise.runs.records import read_metrics, read_record

CURVES = ("loss", "classification", "contrastive", "lr", "mean_per_class", "few")  # what is drawn of it
_MOST_OBSERVED = 2**26  # bytes; of 8,142 classes it has 20 million at most
_ENTRY, _MOST_ENTRIES = b"PK\x01\x02", 100  # what an array begins with in the directory, and how many there are

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RunRead:
    """What a run folder holds. Of a run that stopped early `metrics` is None, and `observed`, which is of
    the part that speaks for the run, is empty."""

    path: Path
    name: Name
    recipe: Recipe
    record: Mapping[str, Any]
    log: list[dict[str, Any]]
    metrics: Mapping[str, Any] | None
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
    if (path / RECIPE).is_file() and (path / RECORD).is_file():
        return load_recipe(path / RECIPE)
    if not path.exists():
        fault = f"there is no run folder at {path}"
    elif not path.is_dir():
        fault = f"{path} is a file, not a run folder"
    else:
        fault = f"{path} is not a run folder: it has no {RECIPE} or no {RECORD}"
    within = min(path.glob(f"*/{RECORD}"), default=None)
    raise UserError(f"{fault}; name one {f'within it, as {within.parent}' if within else 'that equipoise train wrote'}")


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
    record = read_record(path / RECORD)
    classes = record["class_counts"]
    metrics = read_metrics(path / METRICS) if (path / METRICS).is_file() else None
    if metrics and (metrics["class_names"], metrics["train_counts"]) != (list(classes), list(classes.values())):
        raise UserError(f"{path / METRICS} is of other classes than {RECORD}; write it anew: equipoise evaluate {path}")
    checkpoint, part = chosen(metrics) if metrics else ("last", "test")
    if metrics and not (metrics[checkpoint] or metrics["last"])[part]:
        metrics = None  # nothing was there to score it on
    observed: dict[str, Array] = {}
    if metrics and (path / OBSERVED).is_file():
        observed = _read_observed(path / OBSERVED, part, len(classes))
    log = _read_log(path / LOG) if (path / LOG).is_file() else []
    return RunRead(path, name, recipe, record, log, metrics, checkpoint, part, observed)


def _read_observed(file: Path, part: str, classes: int) -> dict[str, Array]:
    """What `observed.npz` has of a part; nothing of one that an earlier version wrote. Raises UserError where it is
    damaged, or its arrays are not those of a run of that many classes."""
    try:
        size = file.stat().st_size
        if size > _MOST_OBSERVED:
            raise UnreadableError("too large")
        content = file.read_bytes()
        if content.count(_ENTRY) > _MOST_ENTRIES:
            raise UnreadableError("too many arrays")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 8 * size + 2**25:
                raise UnreadableError("it unpacks to far more than it is")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            mine = [key for key in arrays.files if key.startswith(f"{part}/")]
            observed: dict[str, Array] = {key.removeprefix(f"{part}/"): arrays[key] for key in mine}
        if "confidence_N" not in observed:
            return {}
        _check_observed(observed, classes)
    except Exception as error:  # a damaged file may raise anything; nothing in it is executed
        raise UserError(
            f"{file} is damaged ({reason(error)}); write it anew: equipoise evaluate {file.parent}"
        ) from None
    return observed


def _check_observed(observed: dict[str, Array], classes: int) -> None:
    """Raise UnreadableError where an array is missing, is not of its shape, or holds what it cannot. Arrays of whole
    numbers become int64."""
    for key in ("labels_N", "predicted_N", "map_MF", "map_rows_M"):
        if key not in observed:
            raise UnreadableError(f"{key} is missing")
    images = observed["labels_N"].size
    mapped, *width = observed["map_MF"].shape
    if images < 1 or len(width) != 1 or (mapped and width[0] < 2):
        raise UnreadableError("arrays of no images")
    # By the end of the name: the shape, and between what the numbers lie.
    kinds = {
        "labels_N": ((images,), 0, classes - 1),
        "predicted_N": ((images,), 0, classes - 1),
        "confidence_N": ((images,), 0.0, 1.001),  # of float32, a sum may be above 1
        "calibrated_N": ((images,), 0.0, 1.001),
        "map_MF": ((mapped, *width), -1.001, 1.001),
        "map_rows_M": ((mapped,), 0, images - 1),
        "_spread_C": ((classes,), -0.001, 2.001),
        "_cosines_GK": ((len(GROUPS), COSINE_BINS), 0, 2**40),
    }
    for key, values in observed.items():
        shape, low, high = next((kind for end, kind in kinds.items() if key.endswith(end)), ((), 0, 0))
        whole = isinstance(high, int)
        known = values[~np.isnan(values)] if key.endswith("_spread_C") else values  # NaN: fewer than two images
        if values.shape != shape or values.dtype.kind not in ("iu" if whole else "f"):
            raise UnreadableError(f"{key[:40]} is not of its kind")
        if known.size and not (low <= known.min() and known.max() <= high):
            raise UnreadableError(f"{key[:40]} holds what it cannot")
        if whole:
            observed[key] = values.astype(np.int64)


# What is drawn of a line of the log.
_LOGGED = {
    "kind": is_text,
    **dict.fromkeys(("step", "epoch"), is_count),
    **dict.fromkeys(CURVES, (ABSENT, None, is_number)),
}


def _read_log(file: Path) -> list[dict[str, Any]]:
    """What is drawn of `metrics.jsonl`; the last line may be half a line where the run was killed. Raises UserError for
    another line that is none of a log."""
    lines: list[dict[str, Any]] = []
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                said = parsed_json(line, object_pairs_hook=_logged)
                if not fits(said, _LOGGED):
                    raise UnreadableError("no line of a log")
                lines.append(said)
            except ValueError:
                if not line.endswith(b"\n") and not opened.read(1):
                    break
                raise UserError(f"{file}, line {number} is damaged; remove that line") from None
    return lines


def _logged(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Names as the same objects in each line: of a long log, they would fill the memory."""
    return {sys.intern(name): value for name, value in pairs if name in _LOGGED}
