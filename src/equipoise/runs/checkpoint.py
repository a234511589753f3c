"""Training state and files, atomically. Nothing in a file is executed: only tensors and plain values are read."""

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.authors.checkpoints import from_authors, is_authors_table, parameter_names, to_authors
from equipoise.base.errors import UserError, out_of_memory
from equipoise.base.files import atomic_file, is_count, is_filled
from equipoise.base.tensors import load_tensors
from equipoise.config.recipe import Recipe, Views, load_recipe, recipe_from_table, recipe_table
from equipoise.data.images import Parts
from equipoise.data.sources import PARTS
from equipoise.method.encoders import pretrained_normalisation
from equipoise.method.losses import log_prior
from equipoise.method.network import TwoBranchNetwork
from equipoise.runs.folder import LAST, PREVIOUS, RECIPE, find_checkpoint

FORMAT = 2
AUTHORS = "authors"  # the name of a recipe of which only the model is known


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `epoch` and `step` are the numbers done; `best` is the highest score on the validation
    part so far (mean per-class accuracy) and the epoch it was reached in, or None. `fingerprints`: the data's, by
    part. Of a file of the BCL authors, which does not say what it was trained on, `class_counts` is empty, the class
    names are numbers, and of the recipe only the model is known."""

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
        """Write to `path`, which holds the old file or the whole new one at any moment."""
        table = {**_described(self), "weights": self.weights, "optimizer": self.optimizer}
        _write({**table, "digest": _digest(table)}, path)

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
        """The network with these weights, on the CPU, in evaluation mode."""
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
        """`[C]`, float64: log of the class prior, up to a constant, for which the softmax of the raw logits is.

        Training makes softmax(logits + tau * log p) estimate the posterior under the training prior p, so that logits =
        log-likelihood + (1 - tau) * log p: the prior is uniform at tau = 1, and p for plain cross-entropy (tau = 0).
        The BCL authors' code has tau = 1, so that counts which their files lack are not needed.
        """
        tau = 0.0 if self.recipe.method == "ce" else self.recipe.loss.tau
        if not self.class_counts:
            return torch.zeros(len(self.class_names), dtype=torch.float64)
        return (1 - tau) * log_prior(torch.tensor(self.class_counts))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `Checkpoint.save` or the BCL authors' code wrote, onto the CPU. Raises UserError for anything else."""
    path = Path(path)
    table = load_tensors(path, "checkpoint")
    if is_authors_table(table):
        return _from_authors(table, path)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of equipoise; take another")
    if not _is_whole(table):
        raise UserError(f"{path} is damaged: its checksum does not fit; use another one of the run")
    return _from_table(table, table, path)


def _from_table(table: dict[str, Any], state: dict[str, Any], path: Path) -> Checkpoint:
    """What `table` says of a run, with the weights and the optimizer that `state` holds."""
    try:
        best = table["best"]
        checkpoint = Checkpoint(
            recipe=recipe_from_table(table["recipe"], str(path)),
            class_names=tuple(table["class_names"]),
            class_counts=tuple(table["class_counts"]),
            epoch=table["epoch"],
            step=table["step"],
            best=None if best is None else (best[0], best[1]),
            weights=state["weights"],
            optimizer=state["optimizer"],
            fingerprints=table["fingerprints"],
        )
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path} is an incomplete checkpoint; use another one of the run") from None
    if not _is_well_formed(checkpoint):
        raise UserError(
            f"{path} is damaged or was changed, though its checksum fits: no run is in the state that it says; use "
            "another one of the run"
        )
    return checkpoint


def _is_well_formed(checkpoint: Checkpoint) -> bool:
    """Whether everything in it is of its kind: a file may have been written by anybody."""
    names: tuple[Any, ...] = checkpoint.class_names
    counts, best = checkpoint.class_counts, checkpoint.best
    weights: Any = checkpoint.weights
    optimizer: Any = checkpoint.optimizer
    fingerprints: Any = checkpoint.fingerprints

    return (
        len({name for name in names if isinstance(name, str)}) == len(names) > 0
        and len(counts) == len(names)
        and all(map(is_filled, counts))
        and is_count(checkpoint.epoch)
        and is_count(checkpoint.step)
        and checkpoint.epoch <= min(checkpoint.step, checkpoint.recipe.epochs)
        and (best is None or (isinstance(best[0], float) and 0 <= best[0] <= 1 and is_count(best[1])))
        and (best is None or 1 <= best[1] <= checkpoint.epoch)
        and isinstance(weights, dict)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items())
        and isinstance(optimizer, dict)
        and isinstance(optimizer.get("state"), dict)
        and all(
            is_count(index) and isinstance(of, dict) and isinstance(of.get("momentum_buffer"), Tensor)
            for index, of in optimizer["state"].items()
        )
        and isinstance(optimizer.get("param_groups"), list)
        and all(isinstance(group, dict) for group in optimizer["param_groups"])
        and isinstance(fingerprints, dict)
        and all(isinstance(value, str) for pair in fingerprints.items() for value in pair)
    )


def _from_authors(table: dict[str, Any], path: Path) -> Checkpoint:
    """A checkpoint of the BCL authors' code, or one that was written in their layout here."""
    read = from_authors(table, str(path))
    names = parameter_names(read.weights)
    momentum = read.momentum
    optimizer = {
        "state": {index: {"momentum_buffer": momentum[name]} for index, name in enumerate(names) if name in momentum},
        "param_groups": [],
    }
    if isinstance(table.get("equipoise"), dict):
        return _from_table(table["equipoise"], {"weights": read.weights, "optimizer": optimizer}, path)
    unknown = Recipe(name=AUTHORS)
    width = read.weights["classifier.weight"].shape[1]  # 0 stands for it, as in the recipes
    model = replace(
        unknown.model,
        encoder=read.arch,
        classifier="linear" if read.classifier == "linear" else "cosine",
        hidden_dim=0 if read.hidden_dim == width else read.hidden_dim,
        feature_dim=read.feature_dim,
    )
    return Checkpoint(
        recipe=replace(unknown, model=model),
        class_names=tuple(str(label) for label in range(read.classes)),
        class_counts=(),
        epoch=read.epoch,
        step=0,
        best=None,
        weights=read.weights,
        optimizer=optimizer,
        fingerprints={},
    )


def save_for_authors(checkpoint: Checkpoint, path: Path) -> None:
    """Write `checkpoint` in the layout of the BCL authors' code, with what theirs leaves out under a key of its own.

    Raises UserError for a model that their code does not have, and for a checkpoint that is in that layout already.
    """
    groups = checkpoint.optimizer["param_groups"]
    if not groups:  # which is not read: nor is the best accuracy of one of theirs
        raise UserError("the checkpoint is in the authors' layout already, and would lose by being read: copy the file")
    names = parameter_names(checkpoint.weights)
    states = checkpoint.optimizer["state"]
    recipe = checkpoint.recipe
    table = to_authors(
        checkpoint.weights,
        {name: states[index]["momentum_buffer"] for index, name in enumerate(names) if index in states},
        arch=recipe.model.encoder,
        classifier=recipe.model.classifier,
        epoch=checkpoint.epoch,
        best_per_class=checkpoint.best[0] if checkpoint.best else None,
        extra=_described(checkpoint),
        param_group=groups[0],
    )
    _write(table, path)


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a checkpoint but its tensors."""
    return {
        "format": FORMAT,
        "recipe": recipe_table(checkpoint.recipe),
        "class_names": list(checkpoint.class_names),
        "class_counts": list(checkpoint.class_counts),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "best": checkpoint.best,
        "fingerprints": checkpoint.fingerprints,
    }


def _write(table: dict[str, Any], path: Path) -> None:
    """Raises OSError where there is no room, or no folder."""
    try:
        with atomic_file(path) as file:
            torch.save(table, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides a full disk behind an error of its own
            raise error.__context__ from None
        raise


def _is_whole(table: dict[str, Any]) -> bool:
    """Whether a checkpoint has the digest that it says."""
    try:
        return _digest(table) == table.get("digest")
    except (ValueError, TypeError, RuntimeError) as error:  # a number of thousands of digits, a tensor without bytes
        if out_of_memory(error):
            raise
        return False


def _digest(table: dict[str, Any]) -> str:
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


def create_network(recipe: Recipe, classes: int, start: bool) -> TwoBranchNetwork:
    """The network that `recipe` describes; with `start`, from the pretrained weights that it may name. Raises UserError
    where these are of images normalised in another way than a recipe without a mean of its own says."""
    views, model = recipe.views, recipe.model
    if start and model.pretrained and not model.weights and (views.mean, views.std) == (Views().mean, Views().std):
        known = pretrained_normalisation(model.encoder)
        if known is not None and known != (views.mean, views.std):
            mean, std = (" ".join(f"{number:g}" for number in numbers) for numbers in known)
            raise UserError(
                f"the pretrained weights of {model.encoder} are of images of another mean and std than the recipe's; "
                f"add --mean {mean} --std {std}"
            )
    return TwoBranchNetwork(
        recipe.model.encoder,
        classes,
        classifier=recipe.model.classifier,
        size=recipe.views.size,
        contrastive=recipe.method in ("bcl", "supcon+la"),
        prototypes=recipe.method == "bcl",
        hidden_dim=recipe.model.hidden_dim,
        feature_dim=recipe.model.feature_dim,
        pretrained=start and recipe.model.pretrained,
        weights=recipe.model.weights if start else "",
        mean=recipe.views.mean,
        std=recipe.views.std,
    )  # batch_norm is no part of it: it says how the network is trained


def state_on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """The module's state on the CPU, contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder, or of a checkpoint. Raises UserError for one that has none of its own."""
    if (path / RECIPE).is_file():
        return load_recipe(path / RECIPE)
    checkpoint = load_checkpoint(find_checkpoint(path / LAST if path.is_dir() else path))
    if not checkpoint.class_counts:
        raise UserError(f"{path} does not say what it was trained on; name the data with --data FOLDER")
    return checkpoint.recipe


def export_to_authors(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint in the layout of the BCL authors' code. Raises UserError for a model they do not have."""
    save_for_authors(load_checkpoint(checkpoint), out)


def changed_part(parts: Parts, checkpoint: Checkpoint) -> str | None:
    """The first part that is not what the checkpoint was trained with."""
    found = {name: images.fingerprint() for name, images in parts.named().items()}
    return next((name for name in PARTS if found.get(name) != checkpoint.fingerprints.get(name)), None)
