"""Training state and files, atomically. Nothing in a file is executed: only tensors and plain values are read."""

import contextlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from equipoise.authors.checkpoints import from_authors
from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file, load_tensors
from equipoise.config.reading import load_recipe, recipe_from_table
from equipoise.config.recipe import Recipe
from equipoise.data.images import Parts
from equipoise.data.sources import PARTS
from equipoise.method.methods import objective_of
from equipoise.method.network import ScaledClassifier, TwoBranchNetwork
from equipoise.method.tuning import merge_low_rank
from equipoise.runs.folder import BEST, LAST, METRICS, PREVIOUS, RECIPE, chosen_checkpoint
from equipoise.runs.records import CheckpointMetrics, read_metrics
from equipoise.views.draws import sampled_counts

FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `epoch` epochs and `step` steps.

    `best`: the highest mean per-class accuracy on the validation part so far, and the epoch that reached it; None
    without a validation part. `optimizer`: SGD's state. `fingerprints`: the data's, by part. `objective`: what the
    method keeps from step to step. `raw`: those that training goes on with, where `weights` are averaged over the steps
    (`optim.ema`). A file of the BCL authors does not say what it was trained on: its `class_counts` are empty, its
    class names are numbers, and of its recipe only the model is known.
    """

    recipe: Recipe
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    epoch: int
    step: int
    best: tuple[float, int] | None
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    fingerprints: dict[str, str]
    objective: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to `path`, which holds the old file or the whole new one at any moment. Raises OSError."""
        try:
            with atomic_file(path) as file:
                torch.save({"format": FORMAT, **vars(self), "recipe": asdict(self.recipe)}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides a full disk behind an error of its own
                raise error.__context__ from None
            raise

    def save_last(self, folder: Path) -> None:
        """Write the folder's last checkpoint and keep the one before it, in case the disk spoils this one."""
        last, previous = folder / LAST, folder / PREVIOUS
        if last.exists():
            previous.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without links
                os.link(last, previous)
        self.save(last)

    def build(self) -> TwoBranchNetwork:
        """The network on the CPU in evaluation mode. Raises UserError for weights that do not fit or are not finite."""
        if spoilt := [name for name, value in self.weights.items() if not bool(value.isfinite().all())]:
            raise UserError(f"the checkpoint's weights are not all finite (first: {spoilt[0]}); use an earlier one")
        network = self.network(self.recipe, len(self.class_names))
        merge_low_rank(network)
        return network.eval()

    def network(self, recipe: Recipe, classes: int, going_on: bool = False) -> TwoBranchNetwork:
        """The network that `recipe` describes, with these weights; `going_on`, with those that training goes on with.
        Raises UserError where they do not fit."""
        network = create_network(recipe, classes, start=False)
        try:
            network.load_state_dict((going_on and self.raw) or self.weights)
        except RuntimeError:
            own = f"method {self.recipe.method}, {self.recipe.model.encoder}, {len(self.class_names):,} classes"
            other = f"method {recipe.method} with a {recipe.model.encoder} and {classes:,} classes"
            raise UserError(f"the checkpoint's weights ({own}) do not fit {other}; use another one") from None
        return network

    def merged(self) -> "Checkpoint":
        """The same network without LoRA's additions: they are in the weights."""
        if self.recipe.model.tune != "lora":
            return self
        recipe = replace(self.recipe, model=replace(self.recipe.model, tune="full"))
        return replace(self, recipe=recipe, weights=state_on_cpu(self.build()))

    def log_prior_of_logits(self) -> Tensor:
        """`[C]`, float64: log of the class prior, up to a constant, under which the softmax of the raw logits is the
        posterior. Where the counts are not known, as in the BCL authors' files, they do not matter: tau is 1.
        """
        counts, epochs = self.class_counts or [1] * len(self.class_names), self.recipe.epochs
        drawn_C = sampled_counts(counts, self.recipe.data.sampler, max(self.epoch - 1, 0) / epochs)  # of the last one
        return objective_of(self.recipe, drawn_C.tolist()).log_prior_of_logits(self.epoch / epochs)


def described(file: Path, checkpoint: Checkpoint) -> str:
    """Which checkpoint of its run the one in `file` is, as every table says it: a run folder has two."""
    if file.name == BEST:
        return f"best checkpoint (epoch {checkpoint.epoch}), which validation chose"
    if file.name != LAST:
        return f"epoch {checkpoint.epoch}"
    instead = f"{BEST} is another, which validation chose" if checkpoint.best else "validation chose none"
    return f"last checkpoint (epoch {checkpoint.epoch}; {instead})"


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `Checkpoint.save` or the BCL authors' code wrote, onto the CPU. Raises UserError for anything else.

    >>> network = equipoise.load_checkpoint("runs/first/last.pt").build()
    >>> network(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape
    torch.Size([2, 10])
    """
    path = Path(path)
    table = load_tensors(path, "checkpoint")
    if zipfile.is_zipfile(path) and not _is_whole(path):
        raise UserError(f"{path} is damaged: a checksum in it does not fit; take another one of the run")
    if isinstance(table, dict) and isinstance(table.get("state_dict"), Mapping):
        recipe, epoch, weights = from_authors(table, str(path))
        names = tuple(str(label) for label in range(len(weights["classifier.weight"])))
        return Checkpoint(recipe, names, (), epoch, 0, None, weights, {"state": {}}, {})
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of equipoise; take another")
    return msgspec.convert({**table, "recipe": recipe_from_table(table["recipe"], str(path))}, Checkpoint)


def _is_whole(path: Path) -> bool:
    """Whether all in a file of `torch.save` has the CRC-32 that it was written with. torch does not look."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # what zipfile raises for a damaged directory is of many kinds
        return False


def create_network(recipe: Recipe, classes: int, start: bool) -> TwoBranchNetwork:
    """The network that `recipe` describes; with `start`, with the pretrained weights that it may name."""
    network = TwoBranchNetwork(recipe, classes, start)
    if start and isinstance(network.classifier, ScaledClassifier):
        scaled, first = network.classifier, load_checkpoint(recipe.model.weights).build().classifier
        if type(first) is not type(scaled.of) or first.weight.shape != scaled.weight.shape:
            kind = f"{recipe.model.classifier} classifier of {classes:,} classes"
            raise UserError(f"{recipe.model.weights} has no {kind} to be scaled: name another run")
        scaled.of.load_state_dict(first.state_dict(), strict=False)  # one with an anchor has its start too
    return network


def state_on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """The module's state on the CPU, contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder, or of a checkpoint. Raises UserError for a checkpoint that has none of its own."""
    if (path / RECIPE).is_file():
        return load_recipe(path / RECIPE)
    checkpoint = load_checkpoint(chosen_checkpoint(path))
    if not checkpoint.class_counts:
        raise UserError(f"{path} does not say what it was trained on; name the data with --data FOLDER")
    return checkpoint.recipe


def refuse_changed(data: str, parts: Parts, checkpoint: Checkpoint, path: Path, of: Sequence[str] = PARTS) -> None:
    """Raise UserError where one of these parts of the data is not what the checkpoint at `path` was trained with."""
    found = {name: images.fingerprint() for name, images in parts.named().items()}
    for name in of:
        if found.get(name) != checkpoint.fingerprints.get(name):
            raise UserError(
                f"the {name} part of {data} is not what {path} was trained with (images were added, removed or "
                "renamed); restore it, or name the data it was trained on with --data"
            )


def figures_of(file: Path, checkpoint: Checkpoint) -> CheckpointMetrics | None:
    """What the `metrics.json` beside a checkpoint's file says of it; None where that is absent or of another step."""
    written = file.with_name(METRICS)
    if file.name not in (LAST, BEST) or not written.is_file():
        return None
    figures = read_metrics(written)["last" if file.name == LAST else "best"]
    return figures if figures and figures.get("step") == checkpoint.step else None
