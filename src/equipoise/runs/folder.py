"""A run folder: the names of its files, and its lock: it belongs to one process at a time."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec
from filelock import FileLock, Timeout

from equipoise import __version__
from equipoise.base.errors import UserError, reason
from equipoise.base.files import UNFINISHED, atomic_file
from equipoise.config.reading import recipe_toml
from equipoise.config.recipe import Recipe
from equipoise.runs.records import LogLine

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # the checkpoints
RECIPE, RECORD, METRICS, LOCK = "recipe.toml", "run.json", "metrics.json", "run.lock"
LOG = "metrics.jsonl"
BAD_IMAGES = "bad-images.json"  # the images that could not be read so far
OBSERVED = "observed.npz"  # what the report draws beside the metrics
KNOWN = "known-classes.npz"  # by which images of no class are told
Track = Callable[[dict[str, float], int], object]  # takes figures by name, and the step after which they are
_NAMES_OF_AUTHORS = {"bcl_ckpt.pth.tar": LAST, "bcl_ckpt.best.pth.tar": BEST}  # what their code calls ours


def checkpoints_at(target: Path, *names: str) -> list[Path]:
    """The checkpoints of these names in a run folder. A file is itself or, where there is none, the one beside it that
    the authors' code would have called so."""
    if target.is_dir():
        return [target / name for name in names if (target / name).is_file()]
    target = target if target.exists() else target.with_name(_NAMES_OF_AUTHORS.get(target.name, target.name))
    return [target] if target.exists() else []


def chosen_checkpoint(target: Path) -> Path:
    """The best checkpoint of a run folder, else its last; a file is itself. Raises UserError where there is none."""
    found = checkpoints_at(target, BEST, LAST)
    if not found:
        raise UserError(f"there is no run folder or checkpoint at {target}")
    return found[0]


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON. A file name that is no UTF-8 is kept readable rather than refused."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; the file is complete or not there at all."""
    with atomic_file(path) as file:
        file.write(json_bytes(value))


class RunFolder:
    """A context in which one folder, once `take` has got it, is this process's own. Where it ends with an error of the
    user's or of the system, nothing is left behind, unless there is a checkpoint."""

    def __init__(self) -> None:
        self._path = Path()
        self._lock: FileLock | None = None
        self._created = False
        self.kept = False  # even if the run fails

    def take(self, path: Path, goes_on: bool) -> bool:
        """Make the folder `path`, or take an empty one; with `goes_on`, one that holds a run. Returns False where
        another process has it. Raises UserError where it cannot be made or written into."""
        try:
            created = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise UserError(f"the run folder {path} cannot be had ({reason(error)}); name another with --out") from None
        if not goes_on and (path / RECORD).exists():  # another run has been here since this one was planned
            lock.release()
            return False
        self._path, self._lock, self._created, self.kept = path, lock, created, goes_on
        for leftover in path.glob(f".*{UNFINISHED}"):  # files that a killed run was writing
            leftover.unlink()
        return True

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is None:
            return
        # A bug leaves its evidence. SystemExit comes from rich, where nobody reads what it prints.
        failed = isinstance(error, UserError | OSError | KeyboardInterrupt | SystemExit)
        removed = failed and not self.kept and not (self._path / LAST).exists()
        # The lock goes last: what another process writes then is not ours.
        lock = self._path / LOCK
        for entry in [*(entry for entry in self._path.glob("*") if removed and entry != lock), lock]:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        if removed and self._created:
            with contextlib.suppress(OSError):  # another process has taken it already
                self._path.rmdir()
        self._lock.release()


def is_used(folder: Path) -> bool:
    """Whether a folder holds more than a run leaves that was killed in its first moment."""
    return any(entry.name not in (LOCK, RECIPE) and not entry.name.endswith(UNFINISHED) for entry in folder.iterdir())


def write_record(folder: Path, recipe: Recipe, about: dict[str, Any]) -> None:
    """Write `recipe.toml` and `run.json`: `about` this run, with command, start, versions and commit."""
    with atomic_file(folder / RECIPE) as file:
        file.write(recipe_toml(recipe).encode())
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    record = {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), "equipoise": f"{__version__}{commit()}", **versions},
        **about,
    }
    write_json(folder / RECORD, record)


def commit() -> str:
    """'+' and the commit of this code where it runs from a clone, with '-dirty' if that has changes; else ''."""
    clone = Path(__file__).parents[3]
    if not (clone / ".git").exists() or not shutil.which("git"):
        return ""
    git = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
    said = subprocess.run(git, capture_output=True, encoding="utf-8", check=False).stdout.strip()
    return f"+{said}" if said else ""


class RunLog:
    """The log of the run in `folder`, whose figures `track` gets too, by 'train/loss' and the like, with the step;
    without a folder (all ranks but the first), nothing is written."""

    def __init__(self, folder: Path | None, epoch: int, step: int, track: Track = lambda figures, step: None) -> None:
        """Go on after `epoch` whole epochs and `step` steps: lines of later steps, which will be computed again, are
        dropped."""
        self._lines: IO[str] | None = None
        self._track = track
        if folder is None:
            return
        file = folder / LOG
        if file.exists():
            with file.open("rb") as lines:
                os.truncate(file, sum(map(len, takewhile(lambda line: _is_done(line, epoch, step), lines))))
        self._lines = file.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float | None]) -> None:
        """One line, of 'train' or 'validation', after `step` steps. A value of None (absent) is not tracked.
        Raises OSError where the disk is full."""
        if self._lines is None:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        self._lines.flush()
        self._track({f"{kind}/{name}": value for name, value in values.items() if value is not None}, step)

    def sync(self) -> None:
        """Put what was written on the disk: before a checkpoint, since a run that goes on from it writes no line of
        an earlier step. Raises OSError."""
        if self._lines is not None:
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        if self._lines is not None:
            with contextlib.suppress(OSError):  # of a full disk, which `write` or `sync` has told
                self._lines.close()


def _is_done(line: bytes, epoch: int, step: int) -> bool:
    """Whether a line is whole, and of what is done after so many steps, and epochs that are validated too."""
    try:
        said = msgspec.json.decode(line, type=LogLine)
    except msgspec.DecodeError:  # a killed run has not finished it
        return False
    later = said.step > step or (said.kind == "validation" and said.epoch >= epoch)
    return line.endswith(b"\n") and not later
