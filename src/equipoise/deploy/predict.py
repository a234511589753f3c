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
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from equipoise.base.device import choose_device, exact_float32
from equipoise.base.errors import UserError
from equipoise.base.world import ALONE
from equipoise.config.reading import load_recipe
from equipoise.data.folders import find_images, unlabelled
from equipoise.data.images import ImageList
from equipoise.deploy.hub import CONFIG, read_hub_folder
from equipoise.evaluation.features import nearest, open_encoded_batches
from equipoise.evaluation.none_of_these import KnownClasses, read_known
from equipoise.evaluation.score import unchanged_data
from equipoise.evaluation.shift import estimate_prior, in_class_order, read_weights
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.checkpoint import Checkpoint, described, figures_of, load_checkpoint
from equipoise.runs.folder import BEST, LAST, METRICS, chosen_checkpoint, json_bytes
from equipoise.views.loader import Batches, open_batches, worker_count
from equipoise.views.views import view_settings

_BATCH = 32

Prior = str | Path | Mapping[str, float]
# A training image, its class, the cosine of its features with those of another, its row in the training part.
Neighbour = tuple[str, str, float, int]


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
    images, where they were asked for. `estimated`: the class prior, where it was asked for. `strange`: of each image
    whether it shows none of the classes, None where that cannot be said."""

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    ranked_NK: npt.NDArray[np.int64]
    probability_NK: npt.NDArray[np.float64]
    errors: tuple[UserError, ...]
    neighbours: Sequence[Sequence[Neighbour]]
    estimated: Mapping[str, float]
    strange: Sequence[bool | None]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[str, tuple[tuple[str, float], ...]]]:
        for file, ranked_K, probability_K in zip(self.files, self.ranked_NK, self.probability_NK, strict=True):
            yield file, tuple(zip((self.class_names[c] for c in ranked_K), probability_K.tolist(), strict=True))


@dataclass(frozen=True)
class Classifier:
    """A trained network, ready for use. `model` is on the device, in evaluation mode: uint8 images `[N, 3, S, S]` to
    raw logits `[N, C]`. `temperature`: None where validation fitted none. `metrics`: the checkpoint's, if any. `known`:
    what tells images of none of the classes, if it was found out."""

    origin: Path
    checkpoint: Checkpoint
    model: TwoBranchNetwork
    temperature: float | None
    metrics: Mapping[str, Any] | None
    device: torch.device
    known: KnownClasses | None = None

    @cached_property
    def calibrated(self) -> CalibratedNetwork:
        """The network whose scores have the softmax that `predict` returns for the uniform prior."""
        log_prior_C = self.checkpoint.log_prior_of_logits()
        return CalibratedNetwork(self.model, self.temperature or 1.0, log_prior_C).to(self.device).eval()

    @property
    def calibration(self) -> str:
        """Whether probabilities are calibrated and, if not, why."""
        if self.temperature:
            return f"calibrated (temperature {self.temperature:.3g})"
        if self.metrics:
            fitted = "no temperature fits the validation part best"
            why = fitted if self.metrics["validation"] else "there was no validation part to fit a temperature"
        elif self.origin.name in (BEST, LAST):
            file = self.origin.with_name(METRICS)
            why = f"{file} is missing, or of another step; equipoise evaluate {self.origin.parent} writes it"
        else:
            why = f"{self.origin} holds no temperature"
        return f"not calibrated: {why}"

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
        (`estimate_prior` of these images but the strange ones; the scores of all are kept for it), a weight for each
        class, or a CSV file of weights. `progress` is called with the number of files done and of all files. `explain`:
        how many of the nearest training images to find for each. A file that cannot be read is left out and becomes one
        of the `errors`. Raises UserError for a prior that does not fit the classes, and where training images are asked
        for that are gone.
        """
        names = self.checkpoint.class_names
        log_prior_C = None if prior == "estimate" else self._log_prior(prior)
        train = self.train if explain else None
        files, errors = find_images([paths] if isinstance(paths, str | Path) else paths)
        settings, cpu = view_settings(self.checkpoint.recipe), torch.device("cpu")  # for a GPU too, threads read them
        scores, features, ranked = [torch.empty(0, len(names))], list[Tensor](), list[tuple[Tensor, Tensor]]()
        likenesses = [torch.empty(0)]
        with closing(open_batches(unlabelled(files), settings, cpu, worker_count(-1), skip=True)) as batches:
            for number, (batch, _) in enumerate(batches.evaluation_of(np.arange(len(files)), _BATCH), 1):
                if not len(batch.labels_G):
                    continue  # none of them can be read
                images_B3SS = batch.images_VB3SS[0].to(self.device)
                with torch.inference_mode(), exact_float32():
                    hidden_BF = self.model.encode(images_B3SS)
                    scores.append(self.calibrated(hidden_BF).cpu())  # the network passes features on
                    if train:
                        features.append(hidden_BF)
                    if self.known:
                        likenesses.append(self.known(hidden_BF).cpu())
                if log_prior_C is not None:  # else the scores of all images are needed first
                    ranked += [_most_probable(scores_BC, log_prior_C, top) for scores_BC in scores]
                    scores.clear()
                progress(min(number * _BATCH, len(files)), len(files))
        read = [file for index, file in enumerate(files) if index not in batches.bad]
        errors += [UserError(error.fault) for _, error in sorted(batches.bad.items())]
        strange = (torch.cat(likenesses) < self.known.threshold).tolist() if self.known else [None] * len(read)
        estimated: dict[str, float] = {}
        if log_prior_C is None:
            kept_N = torch.tensor([not one for one in strange], dtype=torch.bool)
            prior_C = estimate_prior(torch.cat(scores)[kept_N].numpy())
            estimated, log_prior_C = dict(zip(names, prior_C.tolist(), strict=True)), torch.from_numpy(prior_C).log()
        ranked += [_most_probable(scores_BC, log_prior_C, top) for scores_BC in scores]
        near = self._neighbours(*train, torch.cat(features), explain) if train and read else [()] * len(read)
        probability_NK, ranked_NK = (torch.cat(column).numpy() for column in zip(*ranked, strict=True))
        return Predicted(tuple(read), names, ranked_NK, probability_NK, tuple(errors), near, estimated, strange)

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
        cosines_MK, rows_MK = (found.tolist() for found in nearest(self.model, batches, asked_MF, k)[0])
        name, names, labels_N = images.images.name, images.class_names, images.labels_N
        both = (zip(*of_one, strict=True) for of_one in zip(rows_MK, cosines_MK, strict=True))
        return [[(name(row), names[labels_N[row]], cosine, row) for row, cosine in of_one] for of_one in both]

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
    a checkpoint, ours or the BCL authors', or a folder that `equipoise export --to safetensors` wrote. `recipe`: the
    one whose views a checkpoint of the BCL authors was trained with, which it does not say; 'inat2018' has another
    mean. Raises UserError where there is no model.

    >>> predicted = equipoise.load("runs/first").predict(["picture.png"], top=3)
    >>> [(file, len(classes)) for file, classes in predicted]
    [('picture.png', 3)]
    """
    path = Path(os.path.expanduser(path))
    where = choose_device(device)
    if (path / CONFIG).is_file():
        checkpoint, temperature, known = read_hub_folder(path)
        model = checkpoint.build().to(where)
        return Classifier(path, checkpoint, model, temperature, None, where, known and known.to(where))
    file = chosen_checkpoint(path)
    checkpoint = load_checkpoint(file)
    if not checkpoint.class_counts:
        checkpoint = replace(checkpoint, recipe=replace(checkpoint.recipe, views=load_recipe(recipe).views))
    metrics = figures_of(file, checkpoint)
    temperature = metrics and metrics["temperature"]
    known, model = read_known(file, checkpoint.step), checkpoint.build().to(where)
    return Classifier(file, checkpoint, model, temperature, metrics, where, known and known.to(where))


def as_csv(predicted: Predicted) -> bytes:
    """A line an image: file, class_1, probability_1, class_2, ... and, where asked for, neighbour_1,
    neighbour_class_1, neighbour_cosine_1, ...; last none_of_these: 1, 0, or nothing where that cannot be said. Quoted
    as RFC 4180 says."""
    near = max(map(len, predicted.neighbours), default=0)
    of_near = near, ("neighbour", "neighbour_class", "neighbour_cosine")
    groups = (predicted.ranked_NK.shape[1], ("class", "probability")), of_near
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    headings = (f"{name}_{rank + 1}" for ranks, names in groups for rank in range(ranks) for name in names)
    writer.writerow(["file", *headings, "none_of_these"])
    for (file, classes), neighbours, strange in zip(predicted, predicted.neighbours, predicted.strange, strict=True):
        cells = (
            cell
            for *names, share in (*classes, *(near[:3] for near in neighbours))
            for cell in (*names, f"{share:.6f}")
        )
        writer.writerow([file, *cells, "" if strange is None else int(strange)])
    return text.getvalue().encode("utf-8", "backslashreplace")


def as_json(predicted: Predicted, classifier: Classifier, prior: str) -> bytes:
    """The predictions, what they were made with, and the files that were passed over."""
    predictions = [
        {
            "file": file,
            "classes": [{"class": name, "probability": round(share, 6)} for name, share in classes],
            "none_of_these": strange,
            "neighbours": [{"file": of, "class": name, "cosine": round(x, 6)} for of, name, x, _ in neighbours],
        }
        for (file, classes), neighbours, strange in zip(predicted, predicted.neighbours, predicted.strange, strict=True)
    ]
    table = {
        "model": str(classifier.origin),
        "checkpoint": described(classifier.origin, classifier.checkpoint),
        "epoch": classifier.checkpoint.epoch,
        "prior": prior,
        "estimated_prior": predicted.estimated,
        "temperature": classifier.temperature,
        "predictions": predictions,
        "passed_over": [str(error) for error in predicted.errors],
    }
    return json_bytes(table)
