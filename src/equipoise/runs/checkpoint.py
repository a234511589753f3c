"""Training state and files, atomically. Nothing in a file is executed: only tensors and plain values are read."""

import os
import shutil
import zipfile
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from equipoise.authors.checkpoints import from_authors, is_authors_table
from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file, load_tensors
from equipoise.config.reading import load_recipe, recipe_from_table
from equipoise.config.recipe import Recipe
from equipoise.data.images import Parts
from equipoise.data.sources import PARTS
from equipoise.method.methods import objective_of
from equipoise.method.network import ScaledClassifier, TwoBranchNetwork
from equipoise.method.tuning import merge_low_rank
from equipoise.runs.folder import BEST, LAST, METRICS, PREVIOUS, RECIPE, find_checkpoint
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
            try:
                os.link(last, previous)
            except OSError:  # a file system without links
                shutil.copyfile(last, previous)
        self.save(last)

    def build(self) -> TwoBranchNetwork:
        """The network with these weights, on the CPU, in evaluation mode. Raises UserError for weights that are not
        finite, or are those of another network."""
        spoilt = [name for name, value in self.weights.items() if not bool(value.isfinite().all())]
        if spoilt:
            raise UserError(
                f"the checkpoint's weights are not all finite numbers (first: {spoilt[0]}); use an earlier one"
            )
        if not self.fits(self.recipe, len(self.class_names)):
            raise UserError(
                f"the checkpoint's weights do not fit the {self.recipe.model.encoder} and {len(self.class_names):,} "
                "classes that it names; use another one"
            )
        network = create_network(self.recipe, len(self.class_names), start=False)
        network.load_state_dict(self.weights)
        merge_low_rank(network)
        return network.eval()

    def merged(self) -> "Checkpoint":
        """The same network without LoRA's additions: they are in the weights."""
        if self.recipe.model.tune != "lora":
            return self
        recipe = replace(self.recipe, model=replace(self.recipe.model, tune="full"))
        return replace(self, recipe=recipe, weights=state_on_cpu(self.build()))

    def fits(self, recipe: Recipe, classes: int) -> bool:
        """Whether these are the weights of the network that `recipe` describes."""
        expected = _shapes(Recipe(method=recipe.method, model=recipe.model, views=recipe.views), classes)
        return expected == {name: value.shape for name, value in self.weights.items()}

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
    """Read what `Checkpoint.save` or the BCL authors' code wrote, onto the CPU. Raises UserError for anything else."""
    path = Path(path)
    table = load_tensors(path, "checkpoint")
    if zipfile.is_zipfile(path) and not _is_whole(path):
        raise UserError(f"{path} is damaged: a checksum in it does not fit; take another one of the run")
    if is_authors_table(table):
        recipe, epoch, weights = from_authors(table, str(path))
        names = tuple(str(label) for label in range(len(weights["classifier.weight"])))
        return Checkpoint(recipe, names, (), epoch, 0, None, weights, {"state": {}}, {})
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of equipoise; take another")
    recipe = recipe_from_table(table.get("recipe", {}), str(path))
    try:
        return msgspec.convert({**table, "recipe": recipe}, Checkpoint)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is damaged or was changed ({error}); take another one of the run") from None


def _is_whole(path: Path) -> bool:
    """Whether all in a file of `torch.save` has the CRC-32 that it was written with. torch does not look."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # what zipfile raises for a damaged directory is of many kinds
        return False


@lru_cache(maxsize=8)
def _shapes(recipe: Recipe, classes: int) -> dict[str, torch.Size]:
    """Of the weights of a network. No memory is taken for it."""
    with torch.device("meta"):
        state = create_network(recipe, classes, start=False).state_dict()
    return {name: value.shape for name, value in state.items()}


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
    checkpoint = load_checkpoint(find_checkpoint(path / LAST if path.is_dir() else path))
    if not checkpoint.class_counts:
        raise UserError(f"{path} does not say what it was trained on; name the data with --data FOLDER")
    return checkpoint.recipe


def changed_part(parts: Parts, checkpoint: Checkpoint) -> str | None:
    """The first part that is not what the checkpoint was trained with."""
    found = {name: images.fingerprint() for name, images in parts.named().items()}
    return next((name for name in PARTS if found.get(name) != checkpoint.fingerprints.get(name)), None)


def figures_of(file: Path, checkpoint: Checkpoint) -> CheckpointMetrics | None:
    """What the `metrics.json` beside a checkpoint's file says of it; None where it says nothing, or was written after
    another step, as while a resumed run is being trained."""
    written = file.with_name(METRICS)
    if file.name not in (LAST, BEST) or not written.is_file():
        return None
    figures = read_metrics(written)["last" if file.name == LAST else "best"]
    return figures if figures and figures.get("step") == checkpoint.step else None
