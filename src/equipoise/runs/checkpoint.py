"""Training state and files, atomically. Nothing in a file is executed: only tensors and plain values are read."""

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch
from torch import Tensor, nn

from equipoise.authors.checkpoints import from_authors, is_authors_table, parameter_names, to_authors
from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file
from equipoise.base.tensors import load_tensors
from equipoise.config.recipe import Recipe, Views, load_recipe, recipe_from_table, recipe_table
from equipoise.data.images import Parts
from equipoise.data.sources import PARTS
from equipoise.method.encoders import pretrained_normalisation
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.folder import LAST, PREVIOUS, RECIPE, find_checkpoint
from equipoise.runs.records import Count, Positive, Share

FORMAT = 2
AUTHORS = "authors"  # the name of a recipe of which only the model is known


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `epoch` epochs and `step` steps.

    `best`: the highest mean per-class accuracy on the validation part so far, and the epoch that reached it; None
    without a validation part. `optimizer`: SGD's state. `fingerprints`: the data's, by part. A file of the BCL authors
    does not say what it was trained on: its `class_counts` are empty, its class names are numbers, and of its recipe
    only the model is known.
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

    def save(self, path: Path) -> None:
        """Write to `path`, which holds the old file or the whole new one at any moment. Raises OSError."""
        table = _as_table(self)
        _write({**table, "digest": digest_of(table)}, path)

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
        return network.eval()

    def fits(self, recipe: Recipe, classes: int) -> bool:
        """Whether these are the weights of the network that `recipe` describes. No memory is taken for that network."""
        with torch.device("meta"):
            expected = create_network(recipe, classes, start=False).state_dict()
        shapes = {name: value.shape for name, value in self.weights.items()}
        return shapes == {name: value.shape for name, value in expected.items()}

    def log_prior_of_logits(self) -> Tensor:
        """`[C]`, float64: log of the class prior, up to a constant, under which the softmax of the raw logits is the
        posterior.

        Training makes softmax(logits + tau * log p) estimate the posterior under the training prior p, so that logits =
        log-likelihood + (1 - tau) * log p: the prior is uniform at tau = 1, and p for plain cross-entropy (tau = 0).
        The BCL authors' code has tau = 1, so that the counts, which their files lack, are not needed.
        """
        tau = 0.0 if self.recipe.method == "ce" else self.recipe.loss.tau
        if not self.class_counts:
            return torch.zeros(len(self.class_names), dtype=torch.float64)
        return (1 - tau) * log_prior(torch.tensor(self.class_counts))


# ---------------------------------------------------------------------------------------------- our files


class _Momentum(TypedDict):
    momentum_buffer: Tensor


class _Optimizer(TypedDict):
    state: dict[Count, _Momentum]
    param_groups: list[dict[str, Any]]


class _State(msgspec.Struct):
    """The table in a file, without its format and its digest."""

    recipe: dict[str, Any]
    class_names: tuple[str, ...]
    class_counts: tuple[Positive, ...]
    epoch: Count
    step: Count
    best: tuple[Share, Positive] | None
    weights: dict[str, Tensor]
    optimizer: _Optimizer
    fingerprints: dict[str, str]

    def __post_init__(self) -> None:
        if not len(set(self.class_names)) == len(self.class_names) == len(self.class_counts) > 0:
            raise ValueError("its classes need different names, and a count each")
        if self.epoch > self.step or (self.best is not None and self.best[1] > self.epoch):
            raise ValueError("no run has these numbers of epochs and steps")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `Checkpoint.save` or the BCL authors' code wrote, onto the CPU. Raises UserError for anything else."""
    path = Path(path)
    table = load_tensors(path, "checkpoint")
    if is_authors_table(table):
        return _from_authors(table, path)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of equipoise; take another")
    if digest_of(table) != table.get("digest"):
        raise UserError(f"{path} is damaged: its checksum does not fit; use another one of the run")
    return _from_table(table, path)


def _from_table(table: dict[str, Any], path: Path) -> Checkpoint:
    try:
        state = msgspec.convert(table, _State)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is damaged or was changed ({error}); use another one of the run") from None
    values = msgspec.structs.asdict(state)
    values["recipe"] = recipe_from_table(state.recipe, str(path))
    return Checkpoint(**values)


def _as_table(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"format": FORMAT, **vars(checkpoint), "recipe": recipe_table(checkpoint.recipe)}


def _write(table: dict[str, Any], path: Path) -> None:
    """Raises OSError where there is no room, or no folder."""
    try:
        with atomic_file(path) as file:
            torch.save(table, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides a full disk behind an error of its own
            raise error.__context__ from None
        raise


def digest_of(table: dict[str, Any]) -> str:
    """SHA-256 over all that a checkpoint holds but the digest itself."""
    hasher = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            hasher.update(f"{value.dtype} {list(value.shape)}".encode())
            hasher.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                if key != "digest":
                    hasher.update(f"{key!r}:".encode())
                    add(value[key])
        elif isinstance(value, list | tuple):
            hasher.update(f"{len(value)} entries".encode())
            for entry in value:
                add(entry)
        else:
            hasher.update(f"{value!r};".encode(errors="backslashreplace"))

    add(table)
    return hasher.hexdigest()


# ---------------------------------------------------------------------------------------------- the authors' files


def _from_authors(table: dict[str, Any], path: Path) -> Checkpoint:
    """A checkpoint of the BCL authors' code, or one that `export_to_authors` wrote."""
    read = from_authors(table, str(path))
    momentum = enumerate(parameter_names(read.weights))
    state = {index: {"momentum_buffer": read.momentum[name]} for index, name in momentum if name in read.momentum}
    tensors: dict[str, Any] = {"weights": read.weights, "optimizer": {"state": state, "param_groups": []}}
    if isinstance(table.get("equipoise"), dict):
        return _from_table({**table["equipoise"], **tensors}, path)
    width = read.weights["classifier.weight"].shape[1]
    unknown = Recipe(name=AUTHORS)
    model = replace(
        unknown.model,
        encoder=read.arch,
        classifier="linear" if read.classifier == "linear" else "cosine",
        hidden_dim=0 if read.hidden_dim == width else read.hidden_dim,  # in a recipe, 0 is the encoder's width
        feature_dim=read.feature_dim,
    )
    return Checkpoint(
        recipe=replace(unknown, model=model),
        class_names=tuple(str(label) for label in range(read.classes)),
        class_counts=(),
        epoch=read.epoch,
        step=0,
        best=None,
        fingerprints={},
        **tensors,
    )


def export_to_authors(path: Path, out: Path) -> None:
    """Write the checkpoint at `path` in the layout of the BCL authors' code, with what theirs leaves out under a key of
    its own. Raises UserError for a model that their code does not have, and for a checkpoint in that layout."""
    checkpoint = load_checkpoint(path)
    groups, states = checkpoint.optimizer["param_groups"], checkpoint.optimizer["state"]
    if not groups:  # they are not read from that layout, nor is its best accuracy
        raise UserError("the checkpoint is in the authors' layout already, and would lose by being read: copy the file")
    names = parameter_names(checkpoint.weights)
    described = {key: value for key, value in _as_table(checkpoint).items() if key not in ("weights", "optimizer")}
    table = to_authors(
        checkpoint.weights,
        {name: states[index]["momentum_buffer"] for index, name in enumerate(names) if index in states},
        arch=checkpoint.recipe.model.encoder,
        classifier=checkpoint.recipe.model.classifier,
        epoch=checkpoint.epoch,
        best_per_class=checkpoint.best[0] if checkpoint.best else None,
        extra=described,
        param_group=groups[0],
    )
    _write(table, out)


# ---------------------------------------------------------------------------------------------- recipe, data, network


def create_network(recipe: Recipe, classes: int, start: bool) -> TwoBranchNetwork:
    """The network that `recipe` describes; with `start`, from the pretrained weights that it may name. Raises UserError
    where these are of images normalised in another way, and the recipe has no mean of its own."""
    views, model = recipe.views, recipe.model
    if start and model.pretrained and not model.weights and (views.mean, views.std) == (Views().mean, Views().std):
        known = pretrained_normalisation(model.encoder)
        if known is not None and known != (views.mean, views.std):
            mean, std = (" ".join(f"{number:g}" for number in numbers) for numbers in known)
            raise UserError(
                f"the pretrained weights of {model.encoder} are of images of another mean and std than the recipe's; "
                f"add --mean {mean} --std {std}"
            )
    if not start:
        model = replace(model, pretrained=False, weights="")
    contrastive, prototypes = recipe.method in ("bcl", "supcon+la"), recipe.method == "bcl"
    return TwoBranchNetwork(model, views, classes, contrastive, prototypes)


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
