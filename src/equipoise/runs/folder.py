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
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

import msgspec
from filelock import FileLock, Timeout

from equipoise import __version__
from equipoise.base.errors import UserError
from equipoise.base.files import UNFINISHED, atomic_file
from equipoise.config.recipe import Recipe
from equipoise.config.writing import recipe_toml
from equipoise.runs.records import LogLine

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # the checkpoints
RECIPE, RECORD, METRICS, LOCK = "recipe.toml", "run.json", "metrics.json", "run.lock"
LOG, CURVES = "metrics.jsonl", "tensorboard"
BAD_IMAGES = "bad-images.json"  # the images that could not be read so far
OBSERVED = "observed.npz"  # what the report draws beside the metrics
KNOWN = "known-classes.npz"  # by which images of no class are told
_NAMES_OF_AUTHORS = {"bcl_ckpt.pth.tar": LAST, "bcl_ckpt.best.pth.tar": BEST}  # what their code calls ours


def find_checkpoint(path: Path) -> Path:
    """`path`, or the checkpoint beside it that the authors' code would have called so. Raises UserError where there is
    neither."""
    ours = path.with_name(_NAMES_OF_AUTHORS.get(path.name, path.name))
    found = next((file for file in (path, ours) if file.exists()), None)
    if found is None:
        raise UserError(f"there is no run folder or checkpoint at {path}")
    return found


def chosen_checkpoint(target: Path) -> Path:
    """The best checkpoint of a run folder where validation chose one, else its last; a file is itself. Raises UserError
    where there is none."""
    if not target.is_dir():
        return find_checkpoint(target)
    found = next((target / name for name in (BEST, LAST) if (target / name).is_file()), None)
    if found is None:
        raise UserError(f"{target} is no run folder: it has neither {BEST} nor {LAST}")
    return found


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON. A file name that is no UTF-8 is kept readable rather than refused."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; the file is complete or not there at all."""
    with atomic_file(path) as file:
        file.write(json_bytes(value))


class RunFolder:
    """A context in which one folder, once `take` has got it, is this process's own.

    A block that ends with an error of the user's or of the system leaves nothing behind, unless there is a checkpoint.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._lock: FileLock | None = None
        self._created = self._kept = False

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
            cannot, why = "written into" if goes_on else "made", (error.strerror or str(error)).lower()
            raise UserError(f"the run folder {path} cannot be {cannot} ({why}); name another with --out") from None
        if not goes_on and (path / RECORD).exists():  # another run has been here since this one was planned
            lock.release()
            return False
        self._path, self._lock, self._created, self._kept = path, lock, created, goes_on
        for leftover in path.glob(f".*{UNFINISHED}"):  # files that a killed run was writing
            leftover.unlink()
        return True

    def keep(self) -> None:
        """Leave the folder even if the run fails: its log shows why."""
        self._kept = True

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is None:
            return
        # A bug leaves its evidence. SystemExit comes from rich, where nobody reads what it prints.
        failed = isinstance(error, UserError | OSError | KeyboardInterrupt | SystemExit)
        removed = failed and not self._kept and not (self._path / LAST).exists()
        for entry in self._path.glob("*") if removed else ():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink(missing_ok=True)
        (self._path / LOCK).unlink(missing_ok=True)  # last: from here on another process may take the folder
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
        "versions": {"python": platform.python_version(), "equipoise": f"{__version__}{_commit()}", **versions},
        **about,
    }
    write_json(folder / RECORD, record)


def _commit() -> str:
    """'+' and the commit of this code where it runs from a clone, with '-dirty' if that has changes; else ''."""
    if not (Path(__file__).parents[3] / ".git").exists():
        return ""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git
        return ""
    return f"+{done.stdout.strip()}"


Kind = Literal["train", "validation"]


class RunLog:
    """A context that writes the log of the run in `folder`; without a folder (all ranks but the first), nothing.

    Every method raises OSError where the disk is full.
    """

    def __init__(self, folder: Path | None, epoch: int, step: int) -> None:
        """Go on after `epoch` whole epochs and `step` steps: lines and points of later steps, which will be computed
        again, are dropped."""
        self._lines: IO[str] | None = None
        self._curves: SummaryWriter | None = None
        if folder is None:
            return
        file = folder / LOG
        if file.exists():
            os.truncate(file, _length_of_done(file, epoch, step))
        with contextlib.suppress(ImportError):  # where TensorBoard is not installed there are no curves
            from torch.utils import tensorboard  # takes a second to import

            # TensorBoard drops what earlier files have from the next step on.
            self._curves = tensorboard.SummaryWriter(str(folder / CURVES), purge_step=step + 1)
        self._lines = file.open("a", encoding="utf-8")

    def write(self, kind: Kind, step: int, epoch: int, values: dict[str, float | None]) -> None:
        """One line, after `step` steps. A value of None (absent) is no point of a curve."""
        if self._lines is None:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None and self._curves is not None:
                self._curves.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Put what was written on the disk: before a checkpoint, since a run that goes on from it writes no line of
        an earlier step."""
        if self._curves is not None:
            self._curves.flush()
        if self._lines is not None:
            os.fsync(self._lines.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for opened in filter(None, (self._curves, self._lines)):
            try:
                opened.close()
            except OSError:
                if error is None:  # on a full disk closing fails too: the first error says more
                    raise


def _length_of_done(file: Path, epoch: int, step: int) -> int:
    """Bytes of the file up to the first line of something later, or up to one that a killed run has not finished. An
    epoch is whole when it is validated: its last step alone does not make it whole."""
    length = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                said = msgspec.json.decode(line, type=LogLine)
            except msgspec.DecodeError:
                break
            later = said.step > step or (said.kind == "validation" and said.epoch >= epoch)
            if later or not line.endswith(b"\n"):
                break
            length += len(line)
    return length
