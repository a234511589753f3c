"""Equipoise: Balanced Contrastive Learning for long-tailed image classification.

Names are imported when they are first used, so that `equipoise --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"  # pyproject.toml takes it from here

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from equipoise.base.errors import UserError as UserError
    from equipoise.config.reading import load_recipe as load_recipe
    from equipoise.config.recipe import Recipe as Recipe
    from equipoise.deploy.predict import Classifier as Classifier
    from equipoise.deploy.predict import load as load
    from equipoise.evaluation.score import Run as Run
    from equipoise.method.losses import BalancedContrastiveLoss as BalancedContrastiveLoss
    from equipoise.method.losses import LogitAdjustedCrossEntropy as LogitAdjustedCrossEntropy
    from equipoise.runs.checkpoint import load_checkpoint as load_checkpoint
    from equipoise.training.session import train as train

_HOME = {
    "BalancedContrastiveLoss": "method.losses",
    "Classifier": "deploy.predict",
    "LogitAdjustedCrossEntropy": "method.losses",
    "Recipe": "config.recipe",
    "Run": "evaluation.score",
    "UserError": "base.errors",
    "load": "deploy.predict",
    "load_checkpoint": "runs.checkpoint",
    "load_recipe": "config.reading",
    "train": "training.session",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(import_module(f"equipoise.{_HOME[name]}"), name)
