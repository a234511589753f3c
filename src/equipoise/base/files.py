"""Files that are written whole or not at all."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from equipoise.base.errors import UserError, reason


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


# ---------------------------------------------------------------------------------------------- until callers change


def regular_file(path: Path) -> Path:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    return path


def parsed_json(content: bytes, **hooks: Any) -> Any:
    return json.loads(content, **hooks)


def read_json(path: Path, most_bytes: int, kind: Any, advice: str) -> Any:
    """What a JSON file holds, if it `fits` the kind. Raises UserError, which says what to do by `advice`, where it does
    not, is damaged, or has more than `most_bytes`."""
    try:
        size = regular_file(path).stat().st_size
        if size > most_bytes:
            raise ValueError(f"it has {size:,} bytes")
        value = parsed_json(path.read_bytes())
        place = misfit(value, kind)
        if place is not None:
            raise ValueError(f"{place.removeprefix('.') or 'all of it'} is missing, or is not what belongs there")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({reason(error, library=True)}); {advice}") from None
    return value


ABSENT = object()  # the kind of what need not be there
_LARGEST = 3.4e38  # of float32, in which everything is computed


def fits(value: object, kind: Any) -> bool:
    """Whether a value from a file is of a kind: a type; what a function says yes to; None; one of a tuple of kinds; a
    list `[kind]`; a table `{str: kind}` of any names, or `{name: kind, ...}` of these at least."""
    return misfit(value, kind) is None


def misfit(value: object, kind: Any, where: str = "") -> str | None:
    """The first place where a value is not of a kind, as in `data.images.train`; None where it `fits`."""
    if isinstance(kind, list) and isinstance(value, list):
        places = (misfit(entry, kind[0], f"{where}[{index}]") for index, entry in enumerate(value))
    elif isinstance(kind, dict) and isinstance(value, dict):
        if str in kind and not all(map(is_text, value)):
            return where
        of_each = dict.fromkeys(value, kind[str]) if str in kind else kind
        places = (misfit(value.get(name, ABSENT), one, f"{where}.{name}") for name, one in of_each.items())
    elif isinstance(kind, tuple):
        return None if any(fits(value, one) for one in kind) else where
    else:
        simple = value is kind or (isinstance(kind, type) and isinstance(value, kind))
        return None if simple or (callable(kind) and not isinstance(kind, type) and kind(value)) else where
    return next((place for place in places if place is not None), None)


def is_text(value: object) -> bool:
    """Text that can be written down. (Half a pair of UTF-16 is none; what stands for a byte of a file's name is.)"""
    try:
        return isinstance(value, str) and os.fsdecode(os.fsencode(value)) == value
    except UnicodeEncodeError:
        return False


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_share(value: object) -> bool:
    """Between 0 and 1, but for what float32 rounds."""
    return is_number(value) and 0 <= value <= 1.00001  # pyright: ignore[reportOperatorIssue] is a number


def is_positive(value: object) -> bool:
    return is_number(value) and value > 0  # pyright: ignore[reportOperatorIssue] is a number


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def is_filled(value: object) -> bool:
    """A count above 0."""
    return is_count(value) and value != 0
