"""A run folder belongs to one process at a time: it is taken, locked, and given back empty if nothing came of it."""

import contextlib
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
from typing import IO, Any

from equipoise import __version__
from equipoise.base.device import describe_machine
from equipoise.base.errors import UserError
from equipoise.base.files import UNFINISHED, atomic_file
from equipoise.config.recipe import recipe_toml
from equipoise.runs.folder import BAD_IMAGES, BEST, LAST, LOCK, METRICS, PREVIOUS, RECIPE, RECORD, write_json
from equipoise.training.plan import Plan, default_folder


class RunFolder:
    """A context in which a folder is this process's own, once `take` has been called.

    What makes training fail before its first checkpoint, and is no bug, leaves nothing behind.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._folder = plan.folder
        self._created = self._kept = False
        self._lock: IO[bytes] | None = None

    def take(self) -> Path:
        """The folder that was got: another one than planned where that was taken meanwhile and the user had not named
        it. Raises UserError if it cannot be had."""
        place = self._plan.place
        while not self._take():
            if place.named:
                raise UserError(
                    f"another run is writing into {self._folder}; wait for it, or name another folder with --out"
                )
            self._folder = default_folder(self._plan.recipe)
        for leftover in self._folder.glob(f".*{UNFINISHED}"):  # files that a killed run was writing
            if not leftover.is_dir():
                leftover.unlink(missing_ok=True)
        (self._folder / METRICS).unlink(missing_ok=True)
        if place.resumed is None:  # it begins again: what could not be read may have been repaired
            (self._folder / BAD_IMAGES).unlink(missing_ok=True)
        elif place.taken:
            if place.resumed.path.name == PREVIOUS:
                (self._folder / LAST).unlink(missing_ok=True)  # the damaged one must not become the previous one
            if place.resumed.best is not None:
                place.resumed.best.save(self._folder / BEST)
        _write_record(self._plan, self._folder)
        return self._folder

    def keep(self) -> None:
        """Leave the folder whatever comes: what was logged shows how it came about."""
        self._kept = True

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # SystemExit: by rich, where nobody reads what it prints.
        self._leave(isinstance(error, UserError | OSError | KeyboardInterrupt | SystemExit))

    def _leave(self, by_the_user: bool = True) -> None:
        if self._lock is None:
            return
        kept = self._kept or self._plan.place.taken or (self._folder / LAST).exists()
        if by_the_user and not kept:
            _empty(self._folder)
        (self._folder / LOCK).unlink(missing_ok=True)  # last: another process may take the folder from here on
        if by_the_user and not kept and self._created:
            with contextlib.suppress(OSError):
                self._folder.rmdir()
        self._lock.close()
        self._lock = None

    def _take(self) -> bool:
        """Make the folder, or take an empty one, or that of the run that goes on; of two runs that want it, one gets
        it."""
        folder = self._folder
        try:
            self._created = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder / LOCK)
            if lock and (folder / RECORD).exists() and not self._plan.place.taken:
                lock.close()
                lock = None
            self._lock = lock
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            cannot = "written into" if self._plan.place.taken else "made"
            raise UserError(f"the run folder {folder} cannot be {cannot} ({reason}); name another with --out") from None
        return lock is not None


def _locked(path: Path) -> IO[bytes] | None:
    """The file, locked for as long as it is open; None if another process has it. The end of a process frees it."""
    while True:
        file = path.open("ab")
        if not _lock(file):
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # between opening and locking it, whoever had it has removed it: a lock of it keeps nobody out


def _lock(file: IO[bytes]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder are not found out
        return True
    try:
        # Not `flock`: that one passes to the loader's processes, which live for seconds after a kill -9.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system that cannot lock
        return True
    return True


def _empty(folder: Path) -> None:
    """Take back all that was put into a folder but its lock."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)


def _write_record(plan: Plan, folder: Path) -> None:
    with atomic_file(folder / RECIPE) as file:
        file.write(recipe_toml(plan.recipe).encode())
    parts = plan.parts
    record: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            "equipoise": __version__,
            **{name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        },
        "machine": describe_machine(plan.device),
        "processes": plan.world.size,
        "launch": plan.world.launch,
        "precision": plan.precision,
        "git": _git_state(),
        "data": {
            "kind": parts.kind,
            "lists": parts.described,
            "notes": parts.notes,
            "fingerprints": {name: part.fingerprint() for name, part in parts.named().items()},
            "images": {name: len(part) for name, part in parts.named().items()},
        },
        "class_counts": dict(zip(parts.train.class_names, parts.train.class_counts, strict=True)),
    }
    if plan.resumed is not None:
        checkpoint = plan.resumed.checkpoint
        record["resumed"] = {
            "from": str(plan.resumed.path), "after_epoch": checkpoint.epoch, "after_step": checkpoint.step,
        }  # fmt: skip
    write_json(folder / RECORD, record)


def _git_state() -> dict[str, Any] | None:
    """Commit of the code that trains and whether it has changes; None where git does not know: the package is
    installed, so that its version says it all, or there is no git, or the repository is another user's."""
    here = Path(__file__)
    # In a git hook, they name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here.parent, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment may lie within another project's repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
