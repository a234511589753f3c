"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import IO

UNFINISHED = ".equipoise-part"  # the end of the name of a file that is being written


def real_path(path: Path) -> Path:
    """The path without links. `Path.resolve` raises RuntimeError for links in a circle, before Python 3.13."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[IO[bytes]]:
    """A file to write that takes its name only when it is complete and on the disk. A link stays, and the file that it
    leads to is written. Raises OSError."""
    path = real_path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        with contextlib.suppress(OSError):  # Windows cannot
            _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _sync_folder(folder: Path) -> None:
    """Let the new names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
