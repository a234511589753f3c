"""Where a run is written and what it starts from: a new folder, a checkpoint, or a run that goes on."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError
from equipoise.base.files import real_path
from equipoise.base.world import World
from equipoise.config.reading import load_recipe
from equipoise.config.recipe import Recipe, field_value, recipe_fields
from equipoise.runs.checkpoint import Checkpoint, load_checkpoint
from equipoise.runs.folder import LAST, METRICS, PREVIOUS, RECIPE, RECORD, checkpoints_at, is_used
from equipoise.runs.records import read_record

Named = str | Path | None  # a file or folder that a user names

# Fields in which a recipe may change while a run goes on: they say where and how it is computed, not what.
HOW = ("precision", "compile", "cuda_graph", "deterministic", "data.on_bad_image", "data.allow_outside")
FREE = frozenset({*HOW, "name", "summary", "device", "workers", "log_every", "checkpoint_minutes"})
# Files may be moved, and lie elsewhere on each host: fingerprints tell whether they are the same.
FILES = frozenset({"model.weights", "data.path", "data.train_list", "data.val_list", "data.test_list"})


def differing(one: Recipe, other: Recipe, free: frozenset[str]) -> list[tuple[str, Any, Any]]:
    """The fields, without the `free` ones, in which two recipes differ, each with both values."""
    fields = [field for field in recipe_fields() if field.key not in free]
    values = [(field.key, field_value(one, field), field_value(other, field)) for field in fields]
    return [(key, before, now) for key, before, now in values if before != now]


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from."""

    path: Path
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Place:
    """Where a run is written. `start`: a checkpoint to start from, its own, another run's or of the BCL authors' code.
    `resumes`: the run is there and goes on, or begins again where it has no checkpoint. `named`: no other folder will
    do."""

    folder: Path
    start: Start | None
    resumes: bool
    named: bool = True


def find_place(recipe: Recipe, out: Named, resume: Named, world: World) -> Place:
    """Where to write a run of `recipe`: see `prepare`. Raises UserError where a folder or checkpoint will not do."""
    folder, source = (Path(os.path.expanduser(path)) if path else None for path in (out, resume))
    again = not resume and (world.restarted or world.launch not in ("", "none"))  # 'none' is torchrun's default name
    if resume == "auto" or again:
        source = newest_run(lambda before: not differing(before, recipe, FREE), folder, world if again else None)
    start = None
    if source:
        run = source if source.is_dir() else source.parent
        own = (run / RECORD).is_file() and (source.is_dir() or source.name in (LAST, PREVIOUS))
        start = _first_whole(checkpoints_at(source, LAST, PREVIOUS))
        if own and (folder is None or real_path(folder) == real_path(run)):
            return Place(run, start, resumes=True)
        if start is None:
            raise UserError(f"there is no run folder or checkpoint at {source}")
    if folder is not None and (folder.is_file() or (folder.is_dir() and is_used(folder))):
        raise UserError(
            f"{folder} is there, and not empty: name another with --out, or go on by equipoise train --resume {folder}"
        )
    return Place(folder or default_folder(recipe), start, resumes=False, named=folder is not None)


def default_folder(recipe: Recipe) -> Path:
    """A folder in `runs` that does not exist yet."""
    stem = f"{recipe.name}-{recipe.method.replace('+', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    # A sweep may start several runs in one second.
    return next(path for n in itertools.count(1) if not (path := Path("runs") / (stem + f"-{n}" * (n > 1))).exists())


def newest_run(meant: Callable[[Recipe], bool], folder: Path | None, world: World | None = None) -> Path | None:
    """The newest unfinished run of a recipe that is `meant`, in `folder` or else in `runs`; with `world`, of this
    torchrun launch. After a restart a finished one too, which is then scored again: there may be a run after it."""
    found: list[tuple[str, Path]] = []
    for run in [folder] if folder else [record.parent for record in Path("runs").glob(f"*/{RECORD}")]:
        with contextlib.suppress(UserError):  # no run, or one that was killed while it made its folder
            record = read_record(run / RECORD)
            open_to_go_on = (world is not None and world.restarted) or not (run / METRICS).exists()
            of_launch = world is None or record.get("launch") == world.launch
            if meant(load_recipe(run / RECIPE)) and open_to_go_on and of_launch:
                found.append((record["started"], run))
    return max(found)[1] if found else None


def _first_whole(paths: Sequence[Path]) -> Start | None:
    """The first checkpoint that the disk has not spoiled; None where there is none. Raises UserError where all are."""
    for path in paths[:-1]:
        with contextlib.suppress(UserError):
            return Start(path, load_checkpoint(path))
    return Start(paths[-1], load_checkpoint(paths[-1])) if paths else None
