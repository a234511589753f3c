"""A recipe becomes a plan: its data read, everything refused that cannot be trained, nothing written yet."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise import __version__
from equipoise.base.device import choose_device, choose_precision
from equipoise.base.errors import SharedError, UserError, several
from equipoise.base.files import UNFINISHED, real_path
from equipoise.base.world import ALONE, World
from equipoise.config.recipe import Recipe, field_value, load_recipe, recipe_fields
from equipoise.data.decode import bad_images, no_image_left
from equipoise.data.images import DIGITS, ImageList, Parts, imbalance_factor
from equipoise.data.lists import BENCHMARKS, find_list
from equipoise.data.sources import LISTS, open_data, source_of
from equipoise.runs.checkpoint import Checkpoint, changed_part, load_checkpoint
from equipoise.runs.folder import BEST, LAST, LOCK, METRICS, PREVIOUS, RECIPE, RECORD, find_checkpoint
from equipoise.runs.records import read_record
from equipoise.views.loader import steps_per_epoch
from equipoise.views.views import view_settings

AUTO = "auto"  # --resume auto: find out which run
# Fields that say where and how is computed, not what: they may differ where a run goes on, and between ranks.
_FREE = {
    *("name", "summary", "device", "precision", "compile", "cuda_graph", "deterministic"),
    *("workers", "log_every", "checkpoint_minutes"),
    *("data.on_bad_image", "data.allow_outside"),
}
_PLACES = ("path", "train_list", "val_list", "test_list")
# How long, what it started from, and where the data lie: that they are the same is seen from their fingerprints.
_FREE_IN_RESUME = {*_FREE, "epochs", "model.pretrained", "model.weights", *(f"data.{name}" for name in _PLACES)}


@dataclass(frozen=True)
class Resumed:
    """The checkpoint from which a run goes on. `in_place`: in the run folder that it lies in. `remark`: what is wrong
    with others, and what comes of it. `processes`: how many have trained it, if that is known. `best`: what takes the
    place of a best one that cannot be read."""

    path: Path
    checkpoint: Checkpoint
    in_place: bool
    remark: str = ""
    processes: int | None = None
    best: Checkpoint | None = None


@dataclass(frozen=True)
class Place:
    """Where a run is to be written. `named`: by the user; else another name will do if it is taken meanwhile. `taken`:
    a run's own folder, in which it goes on, or begins again if it had no checkpoint yet. `done`: that run is finished;
    torchrun has started the processes anew for what comes after it. `sought`: 'auto' has found no run to go on with."""

    folder: Path
    named: bool
    taken: bool
    resumed: Resumed | None
    done: bool = False
    sought: bool = False


@dataclass(frozen=True)
class Plan:
    """What a training run is about to do. Nothing has been written yet."""

    recipe: Recipe
    parts: Parts
    device: torch.device
    precision: str
    steps_per_epoch: int
    place: Place
    world: World

    def at(self, folder: Path) -> "Plan":
        """The plan in another folder."""
        return replace(self, place=replace(self.place, folder=folder))

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def resumed(self) -> Resumed | None:
        return self.place.resumed

    def describe(self) -> dict[str, str]:
        """The plan for people: what, and its value."""
        train = self.parts.train
        counts, names = train.class_counts, train.class_names
        largest, smallest = counts.index(max(counts)), counts.index(min(counts))
        held = {name: len(part) for name, part in self.parts.named().items() if name != "train"}
        return {
            "recipe": f"{self.recipe.name}, method {self.recipe.method}, seed {self.recipe.seed}",
            "data": f"{self.recipe.data.path} ({self.parts.kind})",
            **({"lists": "; ".join(self.parts.described)} if self.parts.described else {}),
            **({"note": "; ".join(self.parts.notes)} if self.parts.notes else {}),
            "images": f"{len(train):,} to train on"
            + "".join(f", {count:,} for {name}" for name, count in held.items()),
            "classes": f"{len(counts):,}, from {counts[largest]:,} images ({names[largest]}) "
            f"to {counts[smallest]:,} ({names[smallest]}): imbalance factor {imbalance_factor(counts):.4g}",
            "network": f"{self.recipe.model.encoder} at {self.recipe.views.size} pixels, "
            f"{self.recipe.model.classifier} classifier",
            "device": f"{self.device}, {self.precision}"
            + (
                f", {self.world.size} processes, BatchNorm {self.recipe.model.batch_norm}"
                if self.world.size > 1
                else ""
            ),
            "steps": f"{several(self.recipe.epochs, 'epoch')} of {self.steps_per_epoch:,}: "
            f"{several(self.recipe.epochs * self.steps_per_epoch, 'step')} of {self.recipe.batch_size} images"
            + self._parts_of_batch(),
            **({"goes on": self._resumed_from()} if self.place.taken or self.resumed or self.place.sought else {}),
            "run folder": str(self.folder),
        }

    def _parts_of_batch(self) -> str:
        if not 0 < self.recipe.micro_batch < self.recipe.batch_size // self.world.size:
            return ""
        batch_norm = "" if self.recipe.model.batch_norm == "frozen" else ", which BatchNorm, if any, is over"
        return f", {self.recipe.micro_batch} at a time{batch_norm}"

    def _resumed_from(self) -> str:
        if self.place.done:
            return "no further: it is finished"
        if self.place.sought:
            where = self.folder if self.place.named else "runs"
            return f"with none: a new run begins, since {where} holds no unfinished one of this recipe"
        if self.resumed is None:
            return "from its beginning: it had no checkpoint yet"
        checkpoint, remark = self.resumed.checkpoint, self.resumed.remark
        steps = f"from {self.resumed.path}, after epoch {checkpoint.epoch}"
        if checkpoint.step % self.steps_per_epoch:
            steps = f"from {self.resumed.path}, after step {checkpoint.step}"
        if self.place.taken and checkpoint.recipe.epochs != self.recipe.epochs:
            steps += (
                f"; {several(self.recipe.epochs, 'epoch')} instead of {checkpoint.recipe.epochs}: so the learning rate "
                "changes"
            )
        before, now = self.resumed.processes, self.world.size
        if before not in (None, now) and self.recipe.model.batch_norm == "per-rank":
            steps += f"; {now} processes instead of {before}: so BatchNorm is over more or fewer images at a time"
        return f"{steps} ({remark})" if remark else steps


def prepare(
    recipe: Recipe, out: str | Path | None = None, resume: str | Path | None = None, world: World = ALONE
) -> Plan:
    """Read the data and check that `recipe` can be trained on it, into the folder `out`.

    `resume` is a run folder, or a checkpoint, to go on from: one of a run, which goes on in its own folder unless `out`
    is another, or one of the BCL authors' code. 'auto' is the newest unfinished run of the same recipe, where there is
    one; a process that torchrun has started anew goes on with the run that it was.

    Raises UserError for what the user must put right; writes nothing. With several ranks, all call it and all raise.
    """
    recipe = _with_absolute_paths(recipe)
    place = world.first_makes(lambda: _find_place(recipe, out, resume, world))
    plan = world.each_makes(lambda: _prepare(recipe, place, world))
    _refuse_different_ranks(plan)
    for part in plan.parts.named().values():
        _refuse_bad_images(part, plan)
    return plan


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as it can be trained again from anywhere. A benchmark's lists that were found below the working
    directory become lists of the recipe."""

    def absolute(path: str) -> str:
        return path if path in (DIGITS, "") else str(real_path(Path(os.path.expanduser(path))))

    data = recipe.data
    files = {name: absolute(getattr(data, name)) for name in _PLACES}
    if data.benchmark and not source_of(recipe).lists:
        lists = BENCHMARKS[data.benchmark].lists
        found = {part: find_list(Path(files["path"]), data.benchmark, part) for part in lists}
        complete = all(found[part] or not known.blob for part, known in lists.items())
        if complete and any(file and not file.is_absolute() for file in found.values()):
            files |= {LISTS[part].removeprefix("data."): str(file.resolve()) for part, file in found.items() if file}
    model = replace(recipe.model, weights=absolute(recipe.model.weights))
    return replace(recipe, data=replace(data, **files), model=model)


def _prepare(recipe: Recipe, place: Place, world: World) -> Plan:
    _refuse_batches(recipe, world)
    if recipe.data.path not in (DIGITS, "") and real_path(place.folder).is_relative_to(recipe.data.path):
        raise UserError(f"the run folder {place.folder} would lie inside the data; name one outside with --out")
    folder = str(place.folder)
    if folder.encode(errors="replace").decode() != folder:  # torch maps no file of such a name
        raise UserError(f"the run folder {folder} has a name that is no UTF-8; name another with --out")
    parts = open_data(recipe)
    if recipe.batch_size > len(parts.train):
        raise UserError(
            f"batch_size ({recipe.batch_size}) is larger than the training part ({len(parts.train)} images); "
            f"set --batch-size {max(2, len(parts.train) // 4)} or so"
        )
    last_batch = len(parts.train) % recipe.batch_size
    if recipe.model.batch_norm == "synchronised" and 1 < last_batch < 2 * world.size:
        raise UserError(
            f"the last batch of an epoch has {last_batch} images, but with model.batch_norm = synchronised each of "
            f"{world.size} processes needs two; change --batch-size, or set model.batch_norm to per-rank"
        )
    _refuse_single_images(recipe, last_batch, world)
    if place.resumed is not None:
        _refuse_unfitting(place, recipe, parts)
    if 1 < world.local_size <= torch.cuda.device_count() and recipe.device.startswith("cuda:"):
        raise UserError(f"{world.local_size} processes on this host cannot all take {recipe.device}; set --device cuda")
    device = choose_device(recipe.device, world.local_rank)
    return Plan(
        recipe,
        parts,
        device,
        choose_precision(recipe.precision, device),
        steps_per_epoch(len(parts.train), recipe.batch_size),
        place,
        world,
    )


def _refuse_batches(recipe: Recipe, world: World) -> None:
    if recipe.micro_batch and recipe.model.batch_norm == "synchronised" and world.size > 1:
        raise UserError(
            "with --micro-batch, BatchNorm is over a micro-batch of one process, and cannot be synchronised; set "
            "model.batch_norm to per-rank or frozen"
        )
    if recipe.batch_size % world.size:
        below = max(recipe.batch_size // world.size, 2) * world.size  # BatchNorm needs two images
        raise UserError(
            f"batch_size ({recipe.batch_size}) is that of all {world.size} processes together, and no multiple of "
            f"{world.size}; set --batch-size {below} or {below + world.size}"
        )
    if recipe.batch_size < 2 * world.size:
        raise UserError(
            f"batch_size ({recipe.batch_size}) gives each of {world.size} processes one image; BatchNorm needs two: "
            f"set --batch-size {2 * world.size} or {3 * world.size}"
        )


def _refuse_single_images(recipe: Recipe, last_batch: int, world: World) -> None:
    """Raise UserError where BatchNorm would be over one view of one image."""
    part = recipe.micro_batch
    if not part or recipe.model.batch_norm == "frozen" or len(view_settings(recipe).kinds) > 1:
        return
    for rows in {recipe.batch_size, last_batch}:
        share = world.share(rows)
        images = share.stop - share.start
        if images > part and images // -(-images // part) == 1:
            raise UserError(
                f"micro_batch ({part}) would leave BatchNorm a single image; set --micro-batch 3 or more, or "
                "model.batch_norm to frozen"
            )


def _refuse_bad_images(images: ImageList, plan: Plan) -> None:
    """Raise UserError for the first image whose header is no image's. If such are skipped, for a class of the training
    part that has no other, and for another part that has none. Each rank looks at its share."""
    world, skip = plan.world, plan.recipe.data.on_bad_image == "skip"
    share = np.arange(world.rank, len(images), world.size)

    def look() -> list[int]:
        bad: list[int] = []
        for index, error in zip(share.tolist(), bad_images(images.take(share)), strict=False):
            if error is not None and not skip:
                raise error
            bad += [index] if error else []
        return bad

    bad = [index for of_rank in world.gather_objects(world.each_makes(look)) for index in of_rank]
    left_C = np.array(images.class_counts) - np.bincount(images.labels_N[bad], minlength=len(images.class_names))
    if images is plan.parts.train and left_C.min() == 0:
        raise SharedError(str(no_image_left(images, int(left_C.argmin()))))
    if not left_C.any():
        raise SharedError(f"{images.origin}: none of the {len(images):,} images can be read; repair them")


def _refuse_different_ranks(plan: Plan) -> None:
    """Raise SharedError where another rank has another recipe, other data, or another version."""
    said: dict[str, Any] = {
        field.key: field_value(plan.recipe, field)
        for field in recipe_fields()
        if field.key not in {*_FREE, "model.weights", *(f"data.{name}" for name in _PLACES)}
    }
    said |= {f"the {name} images": part.fingerprint() for name, part in plan.parts.named().items()}
    said |= {"the number of steps": plan.steps_per_epoch, "the precision": plan.precision}
    said |= {"the kind of device": plan.device.type}
    said |= {"the version of equipoise": __version__, "the version of torch": torch.__version__}
    all_said = plan.world.gather_objects(said)
    for rank, other in enumerate(all_said):
        for name in {**all_said[0], **other}:
            one, two = all_said[0].get(name), other.get(name)
            if one != two:
                raise SharedError(
                    f"rank {rank} has {name} = {two}, but rank 0 has {one}: start all ranks with the same recipe "
                    "and data"
                )


# ---------------------------------------------------------------------------------------------- the run's folder


def _find_place(recipe: Recipe, out: str | Path | None, resume: str | Path | None, world: World) -> Place:
    folder = Path(os.path.expanduser(out)) if out else None
    launch = world.launch if world.restarted or world.launch != "none" else ""
    sought = resume == AUTO
    if sought:
        resume = next(_runs_of(recipe, folder), None)
    elif not resume and launch:
        resume = next(_runs_of(recipe, folder, launch, also_finished=world.restarted), None)
        if resume and (Path(resume) / METRICS).exists():
            return Place(Path(resume), True, True, None, done=True)
    if resume:
        path = Path(os.path.expanduser(resume))
        resumed, run = _open_resumed(path, folder)
        if run is not None:
            return Place(run, True, True, resumed)
    else:
        resumed = None
    if folder is not None and (folder.is_file() or (folder.is_dir() and _is_used(folder))):
        raise UserError(
            f"{folder} exists and is not empty; go on with it by --resume {folder}, or name another folder with --out"
        )
    return Place(folder or default_folder(recipe), folder is not None, False, resumed, sought=sought and not resumed)


def _is_used(folder: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed in its first moment."""
    return any(entry.name not in (LOCK, RECIPE) and not entry.name.endswith(UNFINISHED) for entry in folder.iterdir())


def _runs_of(recipe: Recipe, folder: Path | None, launch: str = "", also_finished: bool = False) -> Iterator[Path]:
    """Run folders, newest first, with this recipe and without figures; with `launch`, those that torchrun began in it.
    With `folder`, only that one."""
    found: list[tuple[str, Path]] = []
    for run in [folder] if folder else [record.parent for record in Path("runs").glob(f"*/{RECORD}")]:
        try:
            record, before = read_record(run / RECORD), load_recipe(run / RECIPE)
        except UserError:  # no run, or one that was killed while it made its folder
            continue
        of_launch = not launch or record.get("launch") == launch
        wanted = of_launch and (also_finished or not (run / METRICS).exists())
        if wanted and not _differing(before, recipe, _FREE):
            found.append((record["started"], run))
    return (run for _, run in sorted(found, reverse=True))


def _open_resumed(path: Path, out: Path | None) -> tuple[Resumed | None, Path | None]:
    """The checkpoint to go on from (None: the run has none yet), and the run folder to do it in (None: another one)."""
    run = path if path.is_dir() else path.parent
    own = (run / RECORD).is_file() and (path.is_dir() or path.name in (LAST, PREVIOUS))
    in_place = own and (out is None or real_path(out) == real_path(run))
    if not path.is_dir():
        path = find_checkpoint(path)
        resumed = Resumed(path, load_checkpoint(path), in_place)
        return (_with_best(resumed, run), run) if in_place else (resumed, None)
    if not (run / LAST).exists() and not (run / PREVIOUS).exists():
        if not in_place:
            raise UserError(f"{run} has no checkpoint to go on from")
        return None, run
    for name in (LAST, PREVIOUS, BEST) if in_place else ():
        if (run / name).is_dir():
            raise UserError(f"{run / name} is a folder, where a checkpoint belongs; move it away")
    processes = None
    if in_place:
        with contextlib.suppress(UserError):  # a damaged one is written anew when the run goes on
            processes = read_record(run / RECORD).get("processes")
    try:
        resumed = Resumed(run / LAST, load_checkpoint(run / LAST), in_place, processes=processes)
    except UserError as error:
        if not (run / PREVIOUS).exists():
            raise
        try:
            before = load_checkpoint(run / PREVIOUS)
        except UserError as second:
            raise UserError(f"{error}; {second}: without either, train anew into another folder with --out") from None
        resumed = Resumed(run / PREVIOUS, before, in_place, str(error), processes)
    return (_with_best(resumed, run), run) if in_place else (resumed, None)


def _with_best(resumed: Resumed, run: Path) -> Resumed:
    """Where the best checkpoint cannot be read: with another one of the same weights, or with none, so that an epoch
    that follows becomes the best."""
    checkpoint = resumed.checkpoint
    if checkpoint.best is None:
        return resumed
    score, epoch = checkpoint.best
    try:
        load_checkpoint(run / BEST)
        return resumed
    except UserError as error:
        remarks = [resumed.remark] if resumed.remark else []
        remarks.append(str(error))
    step = epoch * steps_per_epoch(sum(checkpoint.class_counts), checkpoint.recipe.batch_size)
    for name in (LAST, PREVIOUS):
        with suppress(UserError):
            same = load_checkpoint(run / name)
            if same.step == step:
                remark = "; ".join([*remarks, f"it is written anew, with the weights of {name}"])
                return replace(resumed, remark=remark, best=replace(same, epoch=epoch, best=(score, epoch)))
    remark = "; ".join([*remarks, "the best of the epochs that follow takes its place"])
    return replace(resumed, remark=remark, checkpoint=replace(checkpoint, best=None))


def _refuse_unfitting(place: Place, recipe: Recipe, parts: Parts) -> None:
    """Raise UserError where the recipe or the data cannot go on from the checkpoint."""
    assert place.resumed is not None
    path, checkpoint = place.resumed.path, place.resumed.checkpoint
    if checkpoint.epoch >= recipe.epochs and (not place.taken or (place.folder / METRICS).exists()):
        raise UserError(
            f"{path} has trained {several(checkpoint.epoch, 'epoch')} already, of {recipe.epochs}; set --epochs higher"
        )
    if len(checkpoint.class_names) != len(parts.train.class_names):
        raise UserError(
            f"{path} knows {len(checkpoint.class_names):,} classes, but {recipe.data.path} has "
            f"{len(parts.train.class_names):,}"
        )
    of_authors = not checkpoint.class_counts  # of whose recipe only the model is known
    changed = changed_part(parts, checkpoint)
    if not of_authors and (changed == "train" or (changed and place.taken)):
        raise UserError(
            f"the {changed} part of {recipe.data.path} is not what {path} was trained with (images were added, removed "
            "or renamed); restore it, name the data it was trained on, or start a new run"
        )
    for key, before, now in _differing(checkpoint.recipe, recipe, _FREE_IN_RESUME):
        in_model = key.startswith("model.") and key != "model.batch_norm"
        if in_model or (place.taken and not of_authors):
            raise UserError(
                f"{path} was trained with {key} = {before}, not {now}: a run goes on under its own recipe; "
                "change it back, or start a new run"
            )
    steps = steps_per_epoch(len(parts.train), recipe.batch_size)
    if place.taken and not 0 <= checkpoint.step - checkpoint.epoch * steps <= steps:
        raise UserError(
            f"{path} is damaged or was changed: after {checkpoint.epoch} epochs of {steps} steps no run has done "
            f"{checkpoint.step} steps; use another one of the run"
        )


def _differing(one: Recipe, other: Recipe, free: set[str]) -> list[tuple[str, Any, Any]]:
    """The fields in which two recipes differ, those called `free` left out, with both values."""
    values = [
        (field.key, field_value(one, field), field_value(other, field))
        for field in recipe_fields()
        if field.key not in free
    ]
    return [(key, before, now) for key, before, now in values if before != now]


def default_folder(recipe: Recipe) -> Path:
    method = recipe.method.replace("+", "-")
    stem = f"{recipe.name}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    # A sweep may start several runs in one second.
    return next(path for n in itertools.count(1) if not (path := Path("runs") / (stem + f"-{n}" * (n > 1))).exists())
