"""The JSON files of a run folder: their types, and how they are read.

The types are TypedDicts: what is read is the plain dicts of the file, `metrics["test"]["few"]`, of which every value
was checked. Keys that a later version may have added are left out.
"""

import json
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from equipoise.base.errors import UserError

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Share = Annotated[float, Meta(ge=0, le=1.00001)]  # between 0 and 1, but for what float32 rounds
BadImages = dict[str, dict[str, str]]  # part -> name of an image -> why it cannot be read


class GroupMeans(TypedDict):
    """Mean per-class accuracy of each shot group. None: no class of the group has images."""

    many: Share | None
    medium: Share | None
    few: Share | None


class PriorRow(GroupMeans):
    """Accuracy with the post-hoc prior of strength `tau`."""

    tau: Annotated[float, Meta(ge=0, le=100)]
    top1: Share
    mean_per_class: Share


class PartMetrics(GroupMeans):
    """The metrics of one checkpoint on one part; all are fractions.

    `top5`: None where five classes or fewer make it always right. `mean_per_class`: the mean of per-class accuracy.
    `macro_f1`: the mean F1 over the classes that have images. `worst_tenth`: the mean over the tenth of these classes
    (rounded up) with the lowest accuracy. `ece`: expected calibration error of the top class over 15 bins of equal
    width (Guo et al., ICML 2017). `per_class`: None for a class without images. `prior_sweep`: a row for each strength
    of the post-hoc prior; None where the training prior is not known.
    """

    images: Positive
    top1: Share
    top5: Share | None
    mean_per_class: Share
    macro_f1: Share
    worst_class: Share
    worst_tenth: Share
    ece: Share
    per_class: list[Share | None]
    prior_sweep: list[PriorRow] | None


class PostHocPrior(TypedDict):
    """The row of `prior_sweep` whose `tau` the validation part chose, of each part."""

    tau: Annotated[float, Meta(ge=0, le=100)]
    chosen_on: str
    validation: PriorRow
    test: NotRequired[PriorRow]


class CheckpointMetrics(TypedDict):
    """The metrics of one checkpoint. `post_hoc` and `temperature` are None without a validation part."""

    epoch: Count
    step: NotRequired[Count]
    validation: PartMetrics | None
    test: PartMetrics | None
    post_hoc: PostHocPrior | None
    temperature: Annotated[float, Meta(gt=0, le=1e6)] | None


class RunMetrics(TypedDict):
    """`metrics.json`. `validation` and `test` are those of the last checkpoint. `best_lost`: why the best checkpoint
    cannot be read. `train_counts`: training images of each class."""

    method: str
    validation: PartMetrics | None
    test: PartMetrics | None
    last: CheckpointMetrics
    best: CheckpointMetrics | None
    best_lost: NotRequired[str | None]
    bad_images: NotRequired[BadImages]
    class_names: list[str]
    train_counts: list[Count]


class GitState(TypedDict):
    commit: str
    changed: bool


class PartSizes(TypedDict):
    train: Positive
    validation: NotRequired[Count]
    test: NotRequired[Count]


class DataRecord(TypedDict):
    """What was trained and scored on: `fingerprints`, and `images` (their number), by part."""

    kind: str
    lists: NotRequired[list[str]]
    notes: NotRequired[list[str]]
    fingerprints: dict[str, str]
    images: PartSizes


class RunRecord(TypedDict):
    """`run.json`: what a run was started with. `started`: UTC, ISO 8601. `launch`: torchrun's name of the launch.
    `class_counts`: training images by class name, in the order of the classes, two at least."""

    command: str
    started: str
    versions: dict[str, str]
    machine: dict[str, str | int]
    processes: NotRequired[Positive]
    launch: NotRequired[str]
    precision: str
    git: NotRequired[GitState | None]
    data: DataRecord
    class_counts: Annotated[dict[str, Positive], Meta(min_length=2)]


def read_metrics(file: Path) -> RunMetrics:
    """`metrics.json`. Raises UserError where it is damaged, or contradicts itself."""
    advice = "remove it, and write it anew with equipoise evaluate"
    metrics = _read(file, RunMetrics, advice)
    fault = _contradiction(metrics)
    if fault:
        raise UserError(f"{file} is damaged ({fault}); {advice}")
    return metrics


def read_record(file: Path) -> RunRecord:
    """`run.json`. Raises UserError where it is damaged."""
    return _read(file, RunRecord, "name another run, or train it anew")


def read_bad_images(file: Path) -> BadImages:
    """`bad-images.json`. Raises UserError where it is damaged."""
    return _read(file, BadImages, "remove it")


def _read(file: Path, kind: type[T], advice: str) -> T:
    try:
        # Not msgspec's own decoder, which refuses the escaped bytes of a name that is no UTF-8.
        return msgspec.convert(json.loads(file.read_bytes()), kind)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({(error.strerror or str(error)).lower()}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); {advice}") from None


def _contradiction(metrics: RunMetrics) -> str | None:
    """What of `metrics.json` does not fit the rest of it; None where all does."""
    blocks = [metrics, metrics["last"], *([metrics["best"]] if metrics["best"] else [])]
    parts = [part for block in blocks for part in (block["validation"], block["test"]) if part]
    of_each_class = [metrics["class_names"], metrics["train_counts"], *(part["per_class"] for part in parts)]
    if len(set(map(len, of_each_class))) > 1:
        return "its metrics are of different numbers of classes"
    for part in parts:
        present = _groups(part)
        if not any(present) or any(_groups(row) != present for row in part["prior_sweep"] or ()):
            return "its shot groups contradict each other"
    return None


def _groups(means: GroupMeans) -> list[bool]:
    return [means[group] is not None for group in ("many", "medium", "few")]
