"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import IO


def real_path(path: Path) -> Path:
    """The path without links. `Path.resolve` raises RuntimeError for links in a circle, before Python 3.13."""
    return Path(os.path.realpath(path))


UNFINISHED = ".equipoise-part"  # the end of the name of a file that is being written


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[IO[bytes]]:
    """A file to write that takes its name only when it is complete and on the disk. A link stays, and the file that it
    leads to is written. Raises OSError."""
    path = real_path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(new_file_mode())
        Path(temporary).replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def new_file_mode() -> int:
    """The permissions that the user's umask leaves a new file; those of temporary files are narrower."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Let the new names in a folder survive a loss of power."""
    with contextlib.suppress(OSError):  # Windows cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
