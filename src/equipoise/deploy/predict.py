"""A run and image files become classes with probabilities.

What a probability means. With labels y, images x and a class prior q, Bayes' rule says p(y|x) ~ p(x|y) q(y). A network
that was trained with logit adjustment of strength tau has logits f(x) = log p(x|y) + (1 - tau) log p(y) + const(x),
where p(y) is the training prior (`Checkpoint.log_prior_of_logits`; tau = 0 is plain cross-entropy). Then

    scores s(x) = f(x) / T - (1 - tau) log p(y)     `CalibratedNetwork`; T calibrates, fitted on a validation part
    p(y|x) under the prior q = softmax(s(x) + log q(y))

The uniform prior is the default: softmax(s). At tau = 1, as BCL trains, the classes are those that `equipoise evaluate`
scores; with plain cross-entropy those are the classes under the training prior.

Shapes: N images, B of a batch, C classes, K ranked classes of an image, S side of the view.
"""

import csv
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from equipoise.base.device import choose_device
from equipoise.base.errors import UserError, one_line, reason, shown
from equipoise.base.files import atomic_file, parsed_json, regular_file
from equipoise.config.recipe import load_recipe, nearest
from equipoise.data.decode import BadImageError, Pixels, decode, resized
from equipoise.data.folders import SUFFIXES
from equipoise.data.images import ImageFiles, ImageList, Paths
from equipoise.data.lists import BENCHMARKS
from equipoise.deploy.hub import is_hub_folder, read_hub_folder
from equipoise.evaluation.run import figures_of
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, load_checkpoint
from equipoise.runs.folder import chosen_checkpoint
from equipoise.views.loader import worker_count
from equipoise.views.views import evaluation_view

_BATCH = 64
_LARGEST_PRIOR = 2**22  # bytes; that of 8,142 classes has 200,000
_AHEAD = 2  # batches decoded while the network works on one

Prior = str | Path | Mapping[str, float]


class NoFileError(UserError):
    """Of what has an image's name in a folder and is no file; `args` are its path."""

    def __str__(self) -> str:
        return one_line(f"{self.args[0]} is a pipe, a socket, a device or a link to nothing; remove it")


class CalibratedNetwork(nn.Module):
    """uint8 images `[B, 3, S, S]` to scores `[B, C]`, whose softmax is the probability under a uniform class prior."""

    log_prior_C: Tensor

    def __init__(self, network: nn.Module, temperature: float, log_prior_of_logits_C: Tensor) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature
        self.register_buffer("log_prior_C", log_prior_of_logits_C.float(), persistent=False)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        return self.network(images_B3SS) / self.temperature - self.log_prior_C


@dataclass(frozen=True)
class Predicted:
    """The most probable classes of each file that could be read, and an error for each of the others. Iterates over
    (file, ((class, probability), ...)), the most probable first."""

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    ranked_NK: npt.NDArray[np.int64]
    probability_NK: npt.NDArray[np.float64]
    errors: tuple[UserError, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[str, tuple[tuple[str, float], ...]]]:
        for file, ranked_K, probability_K in zip(self.files, self.ranked_NK, self.probability_NK, strict=True):
            names = (self.class_names[index] for index in ranked_K)
            yield file, tuple(zip(names, probability_K.tolist(), strict=True))


@dataclass(frozen=True)
class Classifier:
    """A trained network, ready for use. `model` is on the device, in evaluation mode: uint8 images `[N, 3, S, S]` to
    raw logits `[N, C]`. `temperature` is None where no validation part could fit one; `figures` are those of
    `metrics.json`, where there are any."""

    origin: Path
    checkpoint: Checkpoint
    model: TwoBranchNetwork
    temperature: float | None
    figures: Mapping[str, Any] | None
    device: torch.device

    @cached_property
    def calibrated(self) -> CalibratedNetwork:
        """The network whose scores have the softmax that `predict` returns for the uniform prior."""
        log_prior_C = self.checkpoint.log_prior_of_logits()
        return CalibratedNetwork(self.model, self.temperature or 1.0, log_prior_C).to(self.device).eval()

    def view(self, photo: Pixels) -> Pixels:
        """A decoded image as the network takes it, `[S, S, 3]`: the view that `evaluate` scores."""
        views = self.checkpoint.recipe.views
        return evaluation_view(photo, views.size) if views.policy == "photos" else resized(photo, views.size)

    def predict(
        self,
        paths: str | Path | Sequence[str | Path],
        top: int = 5,
        prior: Prior = "uniform",
        progress: Callable[[int, int], None] | None = None,
    ) -> Predicted:
        """The `top` most probable classes of the images at `paths`, files or folders.

        `prior`: how frequent the classes are where the model is used. 'uniform', 'train' (as in training), a weight for
        each class, or a CSV or JSON file of them. `progress` is called with the number of files done and of all. A file
        that cannot be read is passed over. Raises UserError for a prior that does not fit the classes.
        """
        log_prior_C = self._log_prior(prior)
        top = min(top, len(log_prior_C))
        files, errors = find_images([paths] if isinstance(paths, str | Path) else paths)
        read: list[str] = []
        ranked: list[Tensor] = [torch.empty(0, top, dtype=torch.int64)]
        probability: list[Tensor] = [torch.empty(0, top, dtype=torch.float64)]
        done = 0
        for batch in self._views(files):
            views = [view for view in batch if not isinstance(view, UserError)]
            read += [file for file, view in zip(files[done:], batch, strict=False) if not isinstance(view, UserError)]
            errors += [view for view in batch if isinstance(view, UserError)]
            if views:
                scores_BC = self.scores(np.stack(views)).double() + log_prior_C
                sorted_BC = scores_BC.softmax(1).sort(dim=1, descending=True, stable=True)
                ranked.append(sorted_BC.indices[:, :top])
                probability.append(sorted_BC.values[:, :top])
            done += len(batch)
            if progress is not None:
                progress(done, len(files))
        names = self.checkpoint.class_names
        return Predicted(tuple(read), names, torch.cat(ranked).numpy(), torch.cat(probability).numpy(), tuple(errors))

    @torch.inference_mode()
    def scores(self, views_BSS3: Pixels) -> Tensor:
        """`[B, C]` scores of a batch of views, on the CPU."""
        images_B3SS = torch.from_numpy(views_BSS3).permute(0, 3, 1, 2).to(self.device)
        return self.calibrated(images_B3SS).float().cpu()

    def _views(self, files: Sequence[str]) -> Iterator[list[Pixels | UserError]]:
        """The views of the files batch by batch, or an error; some batches ahead, by one thread a core. Decoding and
        resizing happen outside Python's lock, so threads are as good as processes and start at once."""
        images = as_list(files)

        def view(index: int) -> Pixels | UserError:
            try:
                return self.view(decode(images, index))
            except BadImageError as error:
                return UserError(f"{error.fault}; repair or remove it")

        with ThreadPoolExecutor(worker_count(-1)) as pool:
            ahead: deque[list[Future[Pixels | UserError]]] = deque()
            for start in range(0, len(files), _BATCH):
                ahead.append([pool.submit(view, index) for index in range(start, min(start + _BATCH, len(files)))])
                if len(ahead) > _AHEAD:
                    yield [future.result() for future in ahead.popleft()]
            for batch in ahead:
                yield [future.result() for future in batch]

    def _log_prior(self, prior: Prior) -> Tensor:
        """`[C]` log of the class prior at use, up to a constant."""
        checkpoint = self.checkpoint
        if prior == "uniform":
            return torch.zeros(len(checkpoint.class_names), dtype=torch.float64)
        if prior == "train":
            if not checkpoint.class_counts:
                raise UserError(
                    f"{self.origin} does not say what it was trained on, so its training prior is not known"
                )
            return log_prior(torch.tensor(checkpoint.class_counts))
        named = isinstance(prior, Mapping)
        weights = dict(prior) if named else read_weights(Path(os.path.expanduser(prior)))
        ordered = _in_order(weights, checkpoint.class_names, "the prior" if named else str(prior))
        return torch.tensor(ordered, dtype=torch.float64).log()  # weights are of any scale: 1e300 is no float32


def load(path: str | Path, device: str = "auto") -> Classifier:
    """What is at `path`, ready for use: a run folder (its best checkpoint where one was chosen, else its last), a
    checkpoint, of ours or the BCL authors', or a folder that `equipoise export --to safetensors` wrote.

    Raises UserError where there is none.
    """
    path = Path(os.path.expanduser(path))
    where = choose_device(device)
    if is_hub_folder(path):
        checkpoint, temperature = read_hub_folder(path)
        return Classifier(path, checkpoint, checkpoint.build().to(where), temperature, None, where)
    file = chosen_checkpoint(path)
    checkpoint = load_checkpoint(file)
    if not checkpoint.class_counts and len(checkpoint.class_names) == BENCHMARKS["inat2018"].lists["train"].classes:
        # The authors' file does not say so, but theirs of 8,142 classes are of iNaturalist, which has its own mean.
        checkpoint = replace(checkpoint, recipe=replace(checkpoint.recipe, views=load_recipe("inat2018").views))
    figures = figures_of(file, checkpoint)
    temperature = figures.get("temperature") if figures else None
    return Classifier(file, checkpoint, checkpoint.build().to(where), temperature, figures, where)


# ---------------------------------------------------------------------------------------------- what comes in


def find_images(paths: Sequence[str | Path]) -> tuple[list[str], list[UserError]]:
    """The image files at `paths`, those in folders and their sub-folders by their endings; an error for a folder
    without any, and for what is called like one and is no file."""
    files: list[str] = []
    errors: list[UserError] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(str(path))
            continue
        within = [
            entry
            for entry in sorted(path.rglob("*"))
            if entry.suffix.lower() in SUFFIXES
            and not entry.is_dir()
            and not any(part[0] == "." for part in entry.relative_to(path).parts)  # thumbnails
        ]
        if not within:
            errors.append(UserError(f"{path} holds no images (known endings: {' '.join(sorted(SUFFIXES))})"))
        for entry in within:
            if entry.is_file():
                files.append(str(entry))
            else:
                errors.append(NoFileError(str(entry)))
    return files, errors


def as_list(files: Sequence[str]) -> ImageList:
    """Files of which no label is known, for `decode`."""
    return ImageList("", ImageFiles(Path(), Paths.of(files)), np.zeros(len(files), np.int64), ("",))


def read_weights(file: Path) -> dict[str, float]:
    """Class name -> weight of a JSON object or a CSV file of two columns. Raises UserError for anything else."""
    try:
        if regular_file(file).stat().st_size > _LARGEST_PRIOR:
            raise UserError(f"{file} is no prior: it has more than {_LARGEST_PRIOR:,} bytes")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is no UTF-8 text"
        raise UserError(
            f"--prior must be uniform, train, or a CSV or JSON file; {file} cannot be read ({reason})"
        ) from None
    pairs = _json_pairs(text, file) if file.suffix.lower() == ".json" else _csv_pairs(text, file)
    weights: dict[str, float] = {}
    for name, value in pairs:
        if name in weights:
            raise UserError(f"{file} names the class '{name}' twice")
        weights[name] = value
    return weights


def _json_pairs(text: str, file: Path) -> list[tuple[str, Any]]:
    try:
        # Not a dict: that would hide a class named twice.
        pairs = parsed_json(text.encode(), object_pairs_hook=list[tuple[str, Any]])
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({reason(error, library=True)}); correct it") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(f'{file} must hold one object, {{"class name": weight, ...}}')
    return pairs


def _csv_pairs(text: str, file: Path) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:
        raise UserError(f"{file} is no CSV file ({reason(error, library=True)}); correct it") from None
    for number, row in enumerate(rows):
        if len(row) != 2:
            raise UserError(
                f"{file}, line {number + 1}: there must be two columns, class name and weight, not {len(row)}"
            )
        try:
            pairs.append((row[0], float(row[1])))
        except ValueError:
            if number:  # the first row may be a heading
                raise UserError(
                    f"{file}: the weight of {shown(row[0])} must be a number, not {shown(row[1])}"
                ) from None
    return pairs


def _in_order(weights: Mapping[str, Any], class_names: Sequence[str], where: str) -> list[float]:
    """The weights in the order of the classes. Raises UserError where they are not one number a class, not negative, of
    which one is above 0."""
    for name, weight in weights.items():
        if name not in class_names:
            raise UserError(
                f"{where} names a class '{name}' that the model does not know{nearest(name, [*class_names])}"
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= sys.float_info.max:
            raise UserError(f"{where}: the weight of '{name}' must be a number, 0 or more, not {shown(weight)}")
    missing = [name for name in class_names if name not in weights]
    if missing:
        raise UserError(
            f"{where} lacks {len(missing):,} of the {len(class_names):,} classes (first: '{missing[0]}'); give each "
            "class a weight, 0 where it does not occur"
        )
    if not any(weights.values()):
        raise UserError(f"{where}: one weight at least must be above 0")
    return [float(weights[name]) for name in class_names]


# ---------------------------------------------------------------------------------------------- what goes out


def write_csv(file: Path, predicted: Predicted) -> None:
    """A line an image: file, class_1, probability_1, class_2, ... quoted as RFC 4180 says."""
    top = predicted.ranked_NK.shape[1]
    with atomic_file(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text)
        writer.writerow(
            ["file", *(f"{column}_{rank + 1}" for rank in range(top) for column in ("class", "probability"))]
        )
        for name, classes in predicted:
            writer.writerow([name, *(cell for label, share in classes for cell in (label, f"{share:.6f}"))])
        text.detach()  # flushes; the file itself stays open for `atomic_file`


def predictions_table(predicted: Predicted, classifier: Classifier, prior: str) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "model": str(classifier.origin),
        "epoch": classifier.checkpoint.epoch,
        "prior": prior,
        "temperature": classifier.temperature,
        "predictions": [
            {"file": file, "classes": [{"class": name, "probability": round(share, 6)} for name, share in classes]}
            for file, classes in predicted
        ],
        "passed_over": [str(error) for error in predicted.errors],
    }
