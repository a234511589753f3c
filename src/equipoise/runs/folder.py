"""A run folder: the names of its files."""

import json
from pathlib import Path
from typing import Any

from equipoise.authors.flags import AUTHORS_BEST, AUTHORS_LAST
from equipoise.base.errors import UserError
from equipoise.base.files import atomic_file

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # the checkpoints of a run folder
RECIPE, RECORD, METRICS, LOCK = "recipe.toml", "run.json", "metrics.json", "run.lock"
BAD_IMAGES = "bad-images.json"  # those that could not be read so far
OBSERVED = "observed.npz"  # what the report draws beside the figures
AUTHORS_NAMES = {LAST: AUTHORS_LAST, BEST: AUTHORS_BEST}  # of the same in the authors' layout


def find_checkpoint(path: Path) -> Path:
    """`path`, or what it is called here if it is one of the authors' names in a run folder. Raises UserError where
    there is neither."""
    ours = {theirs: ours for ours, theirs in AUTHORS_NAMES.items()}.get(path.name)
    if not path.exists() and ours and path.with_name(ours).is_file():
        return path.with_name(ours)
    if not path.exists():
        raise UserError(f"there is no run folder or checkpoint at {path}")
    return path


def chosen_checkpoint(target: Path) -> Path:
    """The best checkpoint of a run folder where one was chosen, else its last; a file is itself. Raises UserError where
    there is none."""
    if not target.is_dir():
        return find_checkpoint(target)
    found = next((target / name for name in (BEST, LAST) if (target / name).is_file()), None)
    if found is None:
        raise UserError(f"{target} is no run folder: it has neither {BEST} nor {LAST}")
    return found


def write_json(path: Path, value: Any) -> None:
    """JSON, indented, complete or not there at all."""
    with atomic_file(path) as file:
        # A file name that is no UTF-8 is kept readable rather than refused.
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
