"""Training state and files, atomically. Nothing in a file is executed: only tensors and plain values are read."""

import contextlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from equipoise.errors import UserError
from equipoise.model import TwoBranchNetwork
from equipoise.recipe import Recipe, recipe_from_table, recipe_table

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `epoch` and `step` are the numbers done; `best` is the highest score on the validation
    part so far (mean per-class accuracy) and the epoch it was reached in, or None. `fingerprints`: the data's, by
    part."""

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
        with atomic_file(path) as file:
            torch.save(
                {
                    "format": FORMAT,
                    "recipe": recipe_table(self.recipe),
                    "class_names": list(self.class_names),
                    "class_counts": list(self.class_counts),
                    "epoch": self.epoch,
                    "step": self.step,
                    "best": self.best,
                    "weights": self.weights,
                    "optimizer": self.optimizer,
                    "fingerprints": self.fingerprints,
                },
                file,
            )

    def build(self) -> TwoBranchNetwork:
        """The network with these weights, on the CPU, in evaluation mode."""
        network = create_network(self.recipe, len(self.class_names), pretrained=False)
        network.load_state_dict(self.weights)
        return network.eval()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `Checkpoint.save` wrote, onto the CPU. Raises UserError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd about a file that is then refused
            table = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise UserError(f"{path} is not a checkpoint that can be read (damaged, or no checkpoint)") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of equipoise")
    try:
        best = table["best"]
        return Checkpoint(
            recipe=recipe_from_table(table["recipe"], str(path)),
            class_names=tuple(table["class_names"]),
            class_counts=tuple(table["class_counts"]),
            epoch=table["epoch"],
            step=table["step"],
            best=None if best is None else (best[0], best[1]),
            weights=table["weights"],
            optimizer=table["optimizer"],
            fingerprints=table["fingerprints"],
        )
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path} is an incomplete checkpoint; use another one of the run") from None


def create_network(recipe: Recipe, classes: int, pretrained: bool) -> TwoBranchNetwork:
    """The network that `recipe` describes."""
    return TwoBranchNetwork(
        recipe.model.encoder,
        classes,
        classifier=recipe.model.classifier,
        size=recipe.views.size,
        contrastive=recipe.method in ("bcl", "supcon+la"),
        prototypes=recipe.method == "bcl",
        hidden_dim=recipe.model.hidden_dim,
        feature_dim=recipe.model.feature_dim,
        pretrained=pretrained,
        mean=recipe.views.mean,
        std=recipe.views.std,
    )


def state_on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """The module's state on the CPU, contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[IO[bytes]]:
    """A file to write that takes its name only when it is complete and on the disk."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would lock out whoever the run is shared with
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
