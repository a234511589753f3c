"""The JSON files of a run folder, as TypedDicts: plain dicts, of values of the right type. Other keys are left out."""

import json
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar

import msgspec

from equipoise.base.errors import UserError, in_words

T = TypeVar("T")

BadImages = dict[str, dict[str, str]]  # part -> name of an image -> why it cannot be read


class Means(TypedDict):
    """Accuracy over all images, mean per-class accuracy, and that of each shot group: None where it has no images."""

    top1: float
    mean_per_class: float
    many: float | None
    medium: float | None
    few: float | None


class PriorRow(Means):
    """Accuracy with the post-hoc prior of strength `tau`."""

    tau: float


class Calibration(TypedDict):
    """How well the probabilities fit, as means over a group's classes that have images. `classwise_ece`: over all
    images, the weighted gap between a class's probability and frequency, over 15 bins of equal width (Kull et al.,
    NeurIPS 2019, section 2). `nll`, `brier`: the mean over the images of the class."""

    classwise_ece: float
    nll: float
    brier: float


class ShiftRow(TypedDict):
    """Accuracy under a class prior of the test images: with the prior unknown, and known to the classifier."""

    prior: str
    unknown: float
    known: float


class PartMetrics(Means):
    """The metrics of one checkpoint on one part; all are fractions. `top5`: None where five classes or fewer make it
    always right. `macro_f1`: the mean F1 over the classes that have images. `worst_tenth`: the mean over the tenth of
    these classes (rounded up) with the lowest accuracy. `false_head_rate`: the share of few-class images that are
    predicted as a many-class; None without such. `ece`: expected calibration error of the top class over 15 bins of
    equal width (Guo et al., ICML 2017). `per_class`: None for a class without images. `intervals`, by name, and
    `per_class_intervals`: see `evaluation/metrics.py`. `prior_sweep`: a row for each strength of the post-hoc prior;
    None where the training prior is not known. `calibration`: of 'all' classes and of each shot group, by the softmax
    of the raw logits."""

    images: int
    top5: float | None
    macro_f1: float
    worst_class: float
    worst_tenth: float
    false_head_rate: NotRequired[float | None]
    ece: float
    per_class: list[float | None]
    intervals: NotRequired[dict[str, list[float]]]
    per_class_intervals: NotRequired[list[list[float] | None]]
    prior_sweep: list[PriorRow] | None
    calibration: NotRequired[dict[str, Calibration]]


class PostHocPrior(TypedDict):
    """The row of `prior_sweep` whose `tau` the validation part chose, of each part."""

    tau: float
    chosen_on: str
    validation: PriorRow
    test: NotRequired[PriorRow]


class CheckpointMetrics(TypedDict):
    """The metrics of one checkpoint. `post_hoc` and `temperature` are None without a validation part."""

    epoch: int
    step: NotRequired[int]
    validation: PartMetrics | None
    test: PartMetrics | None
    post_hoc: PostHocPrior | None
    temperature: float | None


class NoneOfThese(TypedDict):
    """Of strange images, which show none of the classes, beside those of a part: their number, and of the files that
    could not be read; the area under the ROC curve, the false positive rate at 95 %; the threshold that validation
    chose, the share of the part's images (mean over classes) that it keeps, and of the strange ones that it refuses."""

    images: int
    passed_over: int
    auroc: float
    fpr95: float
    threshold: float
    kept: float
    refused: float


class RunMetrics(TypedDict):
    """`metrics.json`. `validation` and `test` are those of the best checkpoint where validation chose one, else of the
    last. `train_counts`: training images of each class. `cost`: see `evaluation/cost.py`."""

    method: str
    validation: PartMetrics | None
    test: PartMetrics | None
    last: CheckpointMetrics
    best: CheckpointMetrics | None
    cost: NotRequired[dict[str, float | int | None]]
    bad_images: NotRequired[BadImages]
    class_names: list[str]
    train_counts: list[int]


class DataRecord(TypedDict):
    """What was trained and scored on: `fingerprints`, and `images` (their number), by part."""

    kind: str
    lists: NotRequired[list[str]]
    notes: NotRequired[list[str]]
    fingerprints: dict[str, str]
    images: dict[str, int]


class RunRecord(TypedDict):
    """`run.json`: what a run was started with. `started`: UTC, ISO 8601. `launch`: torchrun's name of the launch.
    `weights`: what the encoder's were read from; of a second stage the first one's checkpoint.
    `class_counts`: training images by class name, in the order of the classes."""

    command: str
    started: str
    versions: dict[str, str]
    machine: dict[str, str | int]
    processes: NotRequired[int]
    launch: NotRequired[str]
    precision: str
    weights: NotRequired[str]
    data: DataRecord
    class_counts: dict[str, int]


class LogLine(msgspec.Struct):
    """What is read of a line of the log: losses and learning rate of 'train', shares of 'validation'."""

    kind: str
    step: int
    epoch: int
    loss: float | None = None
    classification: float | None = None
    contrastive: float | None = None
    lr: float | None = None
    images_per_second: float | None = None
    mean_per_class: float | None = None
    few: float | None = None


def read_log(file: Path) -> list[LogLine]:
    """The log; no lines where there is none. Raises UserError where it is damaged."""
    lines, _, _ = (file.read_bytes() if file.is_file() else b"").rpartition(b"\n")  # without half a line
    try:
        return msgspec.json.Decoder(LogLine).decode_lines(lines)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); move it away, and there are no curves or seconds") from None


def _read(kind: type[T], advice: str, file: Path) -> T:
    """What a file holds. Raises UserError, with the advice, where it is damaged."""
    try:
        # Not msgspec's own decoder, which refuses the escaped bytes of a name that is no UTF-8.
        return msgspec.convert(json.loads(file.read_bytes()), kind)
    except (OSError, ValueError, RecursionError) as error:
        fault = "cannot be read" if isinstance(error, OSError) else "is damaged"
        raise UserError(f"{file} {fault} ({in_words(error)}); {advice}") from None


read_metrics = partial(_read, RunMetrics, "move it away, and write it anew with equipoise evaluate")
read_record = partial(_read, RunRecord, "name another run, or train it anew")
read_bad_images = partial(_read, BadImages, "move it away")
