"""Files that are written whole or not at all; and files of tensors, from which no code runs."""

import contextlib
import os
import re
import secrets
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file

from equipoise.base.errors import UserError, out_of_memory, reason

UNFINISHED = ".equipoise-part"  # the end of the name of a file that is being written
# In checkpoints of the BCL authors' code the best accuracy may be a number of NumPy's, also of one before NumPy 2.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS_OF_NUMPY: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8")),
]
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message: the function that it did not call


def real_path(path: Path) -> Path:
    """The path without links. `Path.resolve` raises RuntimeError for links in a circle, before Python 3.13."""
    return Path(os.path.realpath(path))


def cache_folder(what: str) -> Path:
    """Where to keep what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equipoise" / what


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
        with contextlib.suppress(OSError):  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name is to survive a loss of power
            finally:
                os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def load_tensors(path: Path, what: str) -> object:
    """The table in a file of safetensors or of `torch.save`, on the CPU. `what` the file should be is for messages.
    Raises UserError for a file that cannot be read, is no such file, or names a function that no network needs;
    MemoryError or torch's error where the memory is too small."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMBERS_OF_NUMPY):
            warnings.simplefilter("ignore")  # about the format of old files
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {path}") from None
    except Exception as error:  # both libraries raise anything for a damaged file
        if out_of_memory(error):
            raise
        function = _REFUSED.search(str(error))
        why = f"it asks for '{function[1]}', which was not run" if function else reason(error)
        raise UserError(f"{path} is no {what} that can be read ({why}); take another, or copy it anew") from None
