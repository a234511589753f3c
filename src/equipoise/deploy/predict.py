"""A trained model and image files become classes with probabilities.

A network trained with logit adjustment of strength tau has logits f(x) = log p(x|y) + (1 - tau) log p(y) + const(x),
p(y) being the training prior; for any other prior q, the temperature T and why this is so: docs/probabilities.md.

    scores s(x) = f(x) / T - (1 - tau) log p(y)     `CalibratedNetwork`
    p(y|x) under the prior q = softmax(s(x) + log q(y))

Shapes: N images, B of a batch, C classes, K ranked classes of an image, S side of the view.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from equipoise.base.device import choose_device, exact_float32
from equipoise.base.errors import UserError, reason, shown
from equipoise.base.world import ALONE
from equipoise.config.reading import load_recipe
from equipoise.data.decode import BadImageError, Pixels, decode, in_order, resized
from equipoise.data.folders import images_below
from equipoise.data.images import ImageFiles, ImageList
from equipoise.deploy.hub import CONFIG, read_hub_folder
from equipoise.evaluation.features import open_encoded_batches
from equipoise.evaluation.neighbours import nearest
from equipoise.evaluation.score import unchanged_data
from equipoise.evaluation.shift import estimate_prior
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, described, figures_of, load_checkpoint
from equipoise.runs.folder import BEST, LAST, METRICS, chosen_checkpoint, json_bytes
from equipoise.views.loader import Batches, worker_count
from equipoise.views.views import evaluation_view

_BATCH = 32

Prior = str | Path | Mapping[str, float]
Neighbour = tuple[str, str, float]  # a training image, its class, the cosine of its features with those of another


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
    """The most probable classes of each image that could be read, and an error for each of the others. Iterates over
    (file, ((class, probability), ...)), the most probable class first. `neighbours`: of each image the nearest training
    images, where they were asked for. `estimated`: the class prior, where it was asked for."""

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    ranked_NK: npt.NDArray[np.int64]
    probability_NK: npt.NDArray[np.float64]
    errors: tuple[UserError, ...]
    neighbours: Sequence[Sequence[Neighbour]]
    estimated: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[str, tuple[tuple[str, float], ...]]]:
        for file, ranked_K, probability_K in zip(self.files, self.ranked_NK, self.probability_NK, strict=True):
            names = (self.class_names[index] for index in ranked_K)
            yield file, tuple(zip(names, probability_K.tolist(), strict=True))


@dataclass(frozen=True)
class Classifier:
    """A trained network, ready for use. `model` is on the device, in evaluation mode: uint8 images `[N, 3, S, S]` to
    raw logits `[N, C]`. `temperature`: None where validation fitted none. `metrics`: the checkpoint's, if any."""

    origin: Path
    checkpoint: Checkpoint
    model: TwoBranchNetwork
    temperature: float | None
    metrics: Mapping[str, Any] | None
    device: torch.device

    @cached_property
    def calibrated(self) -> CalibratedNetwork:
        """The network whose scores have the softmax that `predict` returns for the uniform prior."""
        log_prior_C = self.checkpoint.log_prior_of_logits()
        return CalibratedNetwork(self.model, self.temperature or 1.0, log_prior_C).to(self.device).eval()

    @property
    def described(self) -> str:
        """Which checkpoint of its run this is."""
        return described(self.origin, self.checkpoint)

    @property
    def calibration(self) -> str:
        """Whether probabilities are calibrated and, if not, why."""
        if self.temperature:
            return f"calibrated (temperature {self.temperature:.3g})"
        if self.metrics and self.metrics["validation"]:
            why = "no temperature fits the validation part best"
        elif self.metrics:
            why = "there was no validation part to fit a temperature"
        elif self.origin.name in (BEST, LAST):
            file, command = self.origin.with_name(METRICS), f"equipoise evaluate {self.origin.parent} writes it"
            why = f"{file} is {'of another step' if file.exists() else 'missing'}; {command}"
        else:
            why = f"{self.origin} holds no temperature"
        return f"not calibrated: {why}"

    def view(self, photo: Pixels) -> Pixels:
        """A decoded image as the network takes it, `[S, S, 3]`: the view that `equipoise evaluate` scores."""
        views = self.checkpoint.recipe.views
        return evaluation_view(photo, views.size) if views.policy == "photos" else resized(photo, views.size)

    def predict(
        self,
        paths: str | Path | Sequence[str | Path],
        top: int = 5,
        prior: Prior = "uniform",
        progress: Callable[[int, int], None] = lambda done, files: None,
        explain: int = 0,
    ) -> Predicted:
        """The `top` most probable classes of the images at `paths`, files or folders.

        `prior` is how frequent the classes are where the model is used: 'uniform', 'train' (as in training), 'estimate'
        (`estimate_prior` of these images, whose scores are kept for it), a weight for each class, or a CSV file of
        weights. `progress` is called with the number of files done and of all files. `explain`: how many of the nearest
        training images to find for each. A file that cannot be read is left out and becomes one of the `errors`. Raises
        UserError for a prior that does not fit the classes, and where training images are asked for that are gone.
        """
        names = self.checkpoint.class_names
        log_prior_C = None if prior == "estimate" else self._log_prior(prior)
        train = self.train if explain else None
        top = min(top, len(names))
        files, errors = find_images([paths] if isinstance(paths, str | Path) else paths)
        scores = [torch.empty(0, len(names))]  # without a prior yet
        ranked = [(torch.empty(0, top, dtype=torch.float64), torch.empty(0, top, dtype=torch.int64))]
        read, features = list[str](), list[Tensor]()
        for start, batch in self._batches(files):
            views = [view for view in batch if not isinstance(view, UserError)]
            read += [file for file, view in zip(files[start:], batch, strict=False) if not isinstance(view, UserError)]
            errors += [error for error in batch if isinstance(error, UserError)]
            if views:
                images_B3SS = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(self.device)
                with torch.inference_mode(), exact_float32():
                    if train:
                        features.append(images_B3SS := self.model.encode(images_B3SS))  # which the network passes on
                    scores_BC = self.calibrated(images_B3SS).cpu()
                if log_prior_C is None:
                    scores.append(scores_BC)
                else:
                    ranked.append(_most_probable(scores_BC, log_prior_C, top))
            progress(start + len(batch), len(files))
        estimated: dict[str, float] = {}
        if log_prior_C is None:
            prior_C = estimate_prior(torch.cat(scores).numpy())
            estimated |= zip(names, prior_C.tolist(), strict=True)
            ranked += [_most_probable(scores_BC, torch.from_numpy(prior_C).log(), top) for scores_BC in scores]
        near = self._neighbours(*train, torch.cat(features), explain) if train and features else [()] * len(read)
        probability_NK, ranked_NK = (torch.cat(column).numpy() for column in zip(*ranked, strict=True))
        return Predicted(tuple(read), names, ranked_NK, probability_NK, tuple(errors), near, estimated)

    @cached_property
    def train(self) -> tuple[ImageList, Batches]:
        """The training images and their features, which are computed unless they were before. Raises UserError where
        the images are not known, have changed or are gone."""
        checkpoint, origin = self.checkpoint, self.origin
        if not checkpoint.fingerprints:
            raise UserError(f"{origin} does not say what it was trained on, which explains it; name a run folder")
        try:
            images = unchanged_data(checkpoint, origin).train
        except UserError as error:
            fault = str(error).partition(";")[0]  # what follows is advice for other commands
            raise UserError(f"without its training images nothing explains {origin}: {fault}") from None
        model = replace(checkpoint.recipe.model, tune="frozen")  # of any run, the encoder is done with learning
        recipe = replace(checkpoint.recipe, model=model)
        batches = open_encoded_batches(recipe, images, self.model, self.device, ALONE)
        batches.prepare()
        return images, batches

    def _neighbours(self, images: ImageList, batches: Batches, asked_MF: Tensor, k: int) -> list[list[Neighbour]]:
        cosines_MK, rows_MK = (found.tolist() for found in nearest(self.model, batches, asked_MF, k))
        about_N = [(images.images.name(row), images.class_names[c]) for row, c in enumerate(images.labels_N)]
        both = zip(rows_MK, cosines_MK, strict=True)
        return [[(*about_N[row], cosine) for row, cosine in zip(*of_one, strict=True)] for of_one in both]

    def _batches(self, files: Sequence[str]) -> Iterator[tuple[int, list[Pixels | UserError]]]:
        """The number of the first file, and the views of a batch of files, or errors. Threads decode the next batches
        meanwhile: decoding and resizing run outside Python's lock."""
        images = as_list(files)

        def view(index: int) -> Pixels | UserError:
            try:
                return self.view(decode(images, index))
            except BadImageError as error:
                return UserError(error.fault)

        views = in_order(view, range(len(files)), worker_count(-1))
        for start in range(0, len(files), _BATCH):
            yield start, list(islice(views, _BATCH))

    def _log_prior(self, prior: Prior) -> Tensor:
        """`[C]`, float64: log of the class prior where the model is used, up to a constant."""
        names, counts = self.checkpoint.class_names, self.checkpoint.class_counts
        if prior == "uniform":
            return torch.zeros(len(names), dtype=torch.float64)
        if prior == "train":
            if not counts:
                raise UserError(f"{self.origin} has no counts of its training images; name another --prior than train")
            return log_prior(torch.tensor(counts))
        weights = prior if isinstance(prior, Mapping) else read_weights(Path(os.path.expanduser(prior)))
        return torch.from_numpy(in_class_order(weights, names)).log()


def _most_probable(scores_BC: Tensor, log_prior_C: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The probabilities and the classes `[B, top]`, the most probable first."""
    sorted_BC = (scores_BC.double() + log_prior_C).softmax(1).sort(dim=1, descending=True, stable=True)
    return sorted_BC.values[:, :top], sorted_BC.indices[:, :top]


def load(path: str | Path, device: str = "auto", recipe: str = "imagenet-lt") -> Classifier:
    """The model at `path`, ready for use: a run folder (its best checkpoint where validation chose one, else its last),
    a checkpoint, ours or the BCL authors', or a folder that `equipoise export --to safetensors` wrote.

    `recipe`: the one whose views a checkpoint of the BCL authors was trained with, which it does not say; 'inat2018'
    has another mean. Raises UserError where there is no model.
    """
    path = Path(os.path.expanduser(path))
    where = choose_device(device)
    if (path / CONFIG).is_file():
        checkpoint, temperature = read_hub_folder(path)
        return Classifier(path, checkpoint, checkpoint.build().to(where), temperature, None, where)
    file = chosen_checkpoint(path)
    checkpoint = load_checkpoint(file)
    if not checkpoint.class_counts:
        checkpoint = replace(checkpoint, recipe=replace(checkpoint.recipe, views=load_recipe(recipe).views))
    metrics = figures_of(file, checkpoint)
    temperature = metrics["temperature"] if metrics else None
    return Classifier(file, checkpoint, checkpoint.build().to(where), temperature, metrics, where)


def find_images(paths: Sequence[str | Path]) -> tuple[list[str], list[UserError]]:
    """The image files at `paths`: each file, and in folders and their sub-folders those that are images. An error for
    each other file there, and for each folder without images; what is hidden is passed over."""
    files: list[str] = []
    errors: list[UserError] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(str(path))
            continue
        try:
            found = images_below(path)
        except UserError as error:  # a link without an end
            errors.append(error)
            continue
        files += [str(path / name) for name, why in found.items() if not why]
        others = [(path / name, why) for name, why in found.items() if why]
        errors += [UserError(f"{file} is no image that can be read ({why})") for file, why in others]
        if all(found.values()):
            errors.append(UserError(f"{path} holds no images"))
    return files, errors


def as_list(files: Sequence[str]) -> ImageList:
    """Files without known labels, for `decode`."""
    return ImageList("", ImageFiles.of(Path(), files), np.zeros(len(files), np.int64), ("",))


def read_weights(file: Path) -> dict[str, float]:
    """Class name -> weight, of a CSV file of two columns, with or without a heading. Raises UserError for another file;
    `in_class_order` checks the weights."""
    try:
        pairs = [row for row in csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig"))) if row]
        if pairs and not any(letter.isdigit() for letter in pairs[0][-1]):
            del pairs[0]  # the heading
        weights = {str(name): float(weight) for name, weight in pairs}
    except (OSError, ValueError, csv.Error) as error:
        known = "--prior is uniform, train, estimate, or a CSV file of classes and their weights"
        raise UserError(f"{known}; {file} cannot be read so ({reason(error, library=True)})") from None
    if len(weights) < len(pairs):
        raise UserError(f"{file} names a class twice")
    return weights


def in_class_order(weights: Mapping[str, float], class_names: Sequence[str]) -> npt.NDArray[np.float64]:
    """The weights in the order of the classes. Raises UserError unless there is one finite number, 0 or more, for each
    class, and one above 0."""
    if differing := sorted(weights.keys() ^ set(class_names)):
        fault = "is no class of the model" if differing[0] in weights else "has no weight"
        raise UserError(f"the prior must weigh all classes, and no other: {shown(differing[0])} {fault}")
    weights_C = np.array([weights[name] for name in class_names], np.float64)
    if not np.isfinite(weights_C).all() or weights_C.min() < 0 or not weights_C.any():
        raise UserError("each weight of the prior must be a finite number, 0 or more, and one at least above 0")
    return weights_C


def as_csv(predicted: Predicted) -> bytes:
    """A line an image: file, class_1, probability_1, class_2, ... and, where asked for, neighbour_1,
    neighbour_class_1, neighbour_cosine_1, ... quoted as RFC 4180 says."""
    near = max(map(len, predicted.neighbours), default=0)
    of_near = near, ("neighbour", "neighbour_class", "neighbour_cosine")
    groups = (predicted.ranked_NK.shape[1], ("class", "probability")), of_near
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    headings = (f"{name}_{rank + 1}" for ranks, names in groups for rank in range(ranks) for name in names)
    writer.writerow(["file", *headings])
    for (file, classes), neighbours in zip(predicted, predicted.neighbours, strict=True):
        cells = (cell for *names, share in (*classes, *neighbours) for cell in (*names, f"{share:.6f}"))
        writer.writerow([file, *cells])
    return text.getvalue().encode("utf-8", "backslashreplace")


def as_json(predicted: Predicted, classifier: Classifier, prior: str) -> bytes:
    """The predictions, what they were made with, and the files that were passed over."""
    table = {
        "model": str(classifier.origin),
        "checkpoint": classifier.described,
        "epoch": classifier.checkpoint.epoch,
        "prior": prior,
        "estimated_prior": predicted.estimated,
        "temperature": classifier.temperature,
        "predictions": [
            {
                "file": file,
                "classes": [{"class": name, "probability": round(share, 6)} for name, share in classes],
                "neighbours": [{"file": of, "class": name, "cosine": round(x, 6)} for of, name, x in neighbours],
            }
            for (file, classes), neighbours in zip(predicted, predicted.neighbours, strict=True)
        ],
        "passed_over": [str(error) for error in predicted.errors],
    }
    return json_bytes(table)
