"""A run folder: the names of its files."""

import json
from pathlib import Path
from typing import Any

from equipoise.authors.flags import AUTHORS_BEST, AUTHORS_LAST
from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # the checkpoints
RECIPE, RECORD, METRICS, LOCK = "recipe.toml", "run.json", "metrics.json", "run.lock"
LOG, CURVES = "metrics.jsonl", "tensorboard"
BAD_IMAGES = "bad-images.json"  # the images that could not be read so far
OBSERVED = "observed.npz"  # what the report draws beside the metrics
AUTHORS_NAMES = {LAST: AUTHORS_LAST, BEST: AUTHORS_BEST}  # our name -> the name that the authors' code gives it


def our_name(file: Path) -> str:
    """What a checkpoint is called here that has one of the authors' names; any other name as it is."""
    return {theirs: ours for ours, theirs in AUTHORS_NAMES.items()}.get(file.name, file.name)


def find_checkpoint(path: Path) -> Path:
    """`path`, or the checkpoint beside it that the authors' code would have called so. Raises UserError where there is
    neither."""
    if path.exists():
        return path
    if path.with_name(our_name(path)).is_file():
        return path.with_name(our_name(path))
    raise UserError(f"there is no run folder or checkpoint at {path}")


def chosen_checkpoint(target: Path) -> Path:
    """The best checkpoint of a run folder where validation chose one, else its last; a file is itself. Raises UserError
    where there is none."""
    if not target.is_dir():
        return find_checkpoint(target)
    found = next((target / name for name in (BEST, LAST) if (target / name).is_file()), None)
    if found is None:
        raise UserError(f"{target} is no run folder: it has neither {BEST} nor {LAST}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; the file is complete or not there at all."""
    with atomic_file(path) as file:
        # A file name that is no UTF-8 is kept readable rather than refused.
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
