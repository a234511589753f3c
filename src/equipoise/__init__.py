"""Equipoise: Balanced Contrastive Learning for long-tailed image classification.

Names are imported when they are first used, so that `equipoise --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # pyproject.toml takes it from here

if TYPE_CHECKING:
    from equipoise.checkpoint import load_checkpoint
    from equipoise.errors import UserError
    from equipoise.losses import BalancedContrastiveLoss, LogitAdjustedCrossEntropy
    from equipoise.predict import Classifier, load
    from equipoise.recipe import Recipe, load_recipe
    from equipoise.run import Run
    from equipoise.training import train

_HOME = {
    "BalancedContrastiveLoss": "losses",
    "Classifier": "predict",
    "LogitAdjustedCrossEntropy": "losses",
    "Recipe": "recipe",
    "Run": "run",
    "UserError": "errors",
    "load": "predict",
    "load_checkpoint": "checkpoint",
    "load_recipe": "recipe",
    "train": "training",
}
__all__ = [
    "BalancedContrastiveLoss",
    "Classifier",
    "LogitAdjustedCrossEntropy",
    "Recipe",
    "Run",
    "UserError",
    "load",
    "load_checkpoint",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(import_module(f"equipoise.{_HOME[name]}"), name)
