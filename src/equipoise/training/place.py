"""Where a run is written and what it starts from: a new folder, or the folder of a run that goes on."""

import contextlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.base.errors import UserError
from equipoise.base.files import real_path
from equipoise.base.world import World
from equipoise.config.recipe import Recipe, field_value, load_recipe, recipe_fields
from equipoise.runs.checkpoint import Checkpoint, load_checkpoint
from equipoise.runs.folder import LAST, METRICS, PREVIOUS, RECIPE, RECORD, find_checkpoint, is_used
from equipoise.runs.records import read_record

AUTO = "auto"  # --resume auto: find out which run

# Fields in which two runs may differ and still be of one comparison: they change where and how often, not what.
FREE_IN_COMPARISON = frozenset({"name", "summary", "device", "workers", "log_every", "checkpoint_minutes"})
# And still be the same run: these change how it is computed.
FREE_IN_RUN = FREE_IN_COMPARISON | {
    *("precision", "compile", "cuda_graph", "deterministic", "data.on_bad_image", "data.allow_outside")
}
# And be trained by ranks together: files may lie elsewhere on each host; fingerprints tell whether they are the same.
DATA_FILES = ("path", "train_list", "val_list", "test_list")
FREE_AMONG_RANKS = FREE_IN_RUN | {"model.weights", *(f"data.{name}" for name in DATA_FILES)}
# And let one go on from the other.
FREE_IN_RESUME = FREE_AMONG_RANKS | {"epochs", "model.pretrained"}


def differing(one: Recipe, other: Recipe, free: frozenset[str]) -> list[tuple[str, Any, Any]]:
    """The fields, without the `free` ones, in which two recipes differ, each with both values."""
    fields = [field for field in recipe_fields() if field.key not in free]
    values = [(field.key, field_value(one, field), field_value(other, field)) for field in fields]
    return [(key, before, now) for key, before, now in values if before != now]


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from. `remark`: which other files of its run cannot be read, if any."""

    path: Path
    checkpoint: Checkpoint
    remark: str = ""


@dataclass(frozen=True)
class Fresh:
    """A new run. `named`: the user chose the folder; if not, another one will do. `sought`: 'auto' found no run."""

    folder: Path
    named: bool
    sought: bool = False


@dataclass(frozen=True)
class WarmStart:
    """A new run that starts from a checkpoint of another run, or of the BCL authors' code. `named`: as in `Fresh`."""

    folder: Path
    named: bool
    start: Start


@dataclass(frozen=True)
class Resume:
    """A run that goes on in its own folder; without a checkpoint (`start` is None) it begins again. `processes`: how
    many have trained it so far, if that is known."""

    folder: Path
    start: Start | None
    processes: int | None = None


@dataclass(frozen=True)
class Finished:
    """A run that is complete. torchrun has restarted the processes, which may have another run to train after it."""

    folder: Path


Place = Fresh | WarmStart | Resume | Finished


def find_place(recipe: Recipe, out: str | Path | None, resume: str | Path | None, world: World) -> Place:
    """Where to write a run of `recipe`: see `prepare`. Raises UserError where a folder or checkpoint will not do."""
    folder = Path(os.path.expanduser(out)) if out else None
    source = Path(os.path.expanduser(resume)) if resume else None
    if resume == AUTO:
        source = _newest_run(recipe, folder)
    elif not resume and (world.restarted or world.launch not in ("", "none")):  # 'none' is torchrun's default name
        source = _newest_run(recipe, folder, world.launch, finished=world.restarted)
        if source and (source / METRICS).exists():
            return Finished(source)
    start = None
    if source:
        run = source if source.is_dir() else source.parent
        own = (run / RECORD).is_file() and (source.is_dir() or source.name in (LAST, PREVIOUS))
        path = find_checkpoint(source)
        start = _last_of(run) if source.is_dir() else Start(path, load_checkpoint(path))
        if own and (folder is None or real_path(folder) == real_path(run)):
            return _resume(run, start)
        if start is None:
            raise UserError(f"{run} has no checkpoint to go on from")
    if folder is not None and (folder.is_file() or (folder.is_dir() and is_used(folder))):
        raise UserError(
            f"{folder} exists and is not empty; go on with it by --resume {folder}, or name another folder with --out"
        )
    path, named = folder or default_folder(recipe), folder is not None
    return WarmStart(path, named, start) if start else Fresh(path, named, sought=resume == AUTO)


def default_folder(recipe: Recipe) -> Path:
    """A folder in `runs` that does not exist yet."""
    stem = f"{recipe.name}-{recipe.method.replace('+', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    # A sweep may start several runs in one second.
    return next(path for n in itertools.count(1) if not (path := Path("runs") / (stem + f"-{n}" * (n > 1))).exists())


def _newest_run(recipe: Recipe, folder: Path | None, launch: str = "", finished: bool = False) -> Path | None:
    """The newest run of this recipe that is not finished, or with `finished` may be; with `launch`, of those that
    torchrun began in it. `folder`: look at no other."""
    found: list[tuple[str, Path]] = []
    for run in [folder] if folder else [record.parent for record in Path("runs").glob(f"*/{RECORD}")]:
        try:
            record, before = read_record(run / RECORD), load_recipe(run / RECIPE)
        except UserError:  # no run, or one that was killed while it made its folder
            continue
        wanted = (not launch or record.get("launch") == launch) and (finished or not (run / METRICS).exists())
        if wanted and not differing(before, recipe, FREE_IN_RUN):
            found.append((record["started"], run))
    return max(found)[1] if found else None


def _last_of(run: Path) -> Start | None:
    """The last checkpoint of a run, or if that cannot be read the one before it; None if it has none."""
    failures: list[str] = []
    for path in (run / LAST, run / PREVIOUS):
        if path.exists():
            try:
                return Start(path, load_checkpoint(path), remark="; ".join(failures))
            except UserError as error:
                failures.append(str(error))
    if failures:
        raise UserError(f"{'; '.join(failures)}: without either, train anew into another folder with --out")
    return None


def _resume(run: Path, start: Start | None) -> Resume:
    processes = None
    with contextlib.suppress(UserError):  # a damaged record is written anew when the run goes on
        processes = read_record(run / RECORD).get("processes")
    return Resume(run, start, processes)
