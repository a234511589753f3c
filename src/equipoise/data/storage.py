"""Data on other machines, by fsspec's URLs (s3://, gs://, https://, ...): files are copied whole to this machine, where
all else reads them."""

import errno
import hashlib
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock

from equipoise.base.errors import UserError, in_words, quoted, reason
from equipoise.base.files import UNFINISHED, atomic_file, cache_folder
from equipoise.base.progress import ProgressLine

_SETS = (".tar", ".parquet", "classnames.txt")  # ends of names; what ends otherwise is a folder
_TAGS = ("size", "ETag", "etag", "blob_id", "Last-Modified", "mtime")  # of a file: they change with it
_PATIENCE = {"total": None, "sock_connect": 10, "sock_read": 60}  # seconds, of https; else all must be done in 300


def folder_of(url: str, version: object = "") -> Path:
    """The folder of this machine for what is at a URL."""
    said, identity = re.sub(r"[^\w.-]+", "-", url)[-60:], hashlib.sha256(f"{url}{version}".encode())
    return cache_folder("storage") / f"{said}-{identity.hexdigest()[:12]}"


def copied(url: str, inner: Sequence[str] | None = None) -> Path:
    """The folder with copies of what is at a URL: of a file, of several as `train-{000000..000011}.tar`, or, with
    `inner`, of all tars and Parquet files in a folder, and in its folders of these names. Where one has changed, it is
    another folder. The ranks of this machine begin each with its own files, and wait for what others copy. Raises
    UserError for what cannot be read, and OSError for a full disk."""
    url, mark, signature = url.partition("?")
    with _in_one_line(url):
        fs = _file_system(url)
        fs.invalidate_cache()  # else what was listed once is never listed anew
        base, names = _named(fs, url.rstrip("/"), inner)
        told = [fs.info(f"{base}/{name}{mark}{signature}") for name in names]
    folder = folder_of(url, [(name, *map(of.get, _TAGS)) for name, of in zip(names, told, strict=True)])
    rank, ranks = (int(os.environ.get(key, default)) for key, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    todo = [name for name in dict.fromkeys([*names[rank::ranks], *names]) if not (folder / name).exists()]
    with closing(ProgressLine(0, len(todo), "file", rank == 0)) as line:
        for done, path in enumerate((folder / name for name in todo), 1):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                for left in path.parent.glob(f".{path.name}.*{UNFINISHED}"):  # of a killed process
                    left.unlink()
                if not path.exists():
                    download(f"{base}/{path.relative_to(folder).as_posix()}{mark}{signature}", path, UserError)
            line.update(done, f"copied from {url} to {folder}")
    return folder


def download(url: str, path: Path, absent: type[Exception] = FileNotFoundError) -> None:
    """Copy a file. Raises `absent` where there is none, UserError where it cannot be read, and OSError for a full
    disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, _in_one_line(url.partition("?")[0], absent):
        _file_system(url).get_file(url, file.name)


def _file_system(url: str) -> Any:
    """fsspec's, which keeps one in each process."""
    options: dict[str, Any] = {}
    if url.startswith("http"):
        options = {"client_kwargs": {"timeout": import_module("aiohttp").ClientTimeout(**_PATIENCE)}}
    return import_module("fsspec.core").url_to_fs(url, **options)[0]


def _named(fs: Any, url: str, inner: Sequence[str] | None) -> tuple[str, list[str]]:
    """The folder in which the files of `copied` are, and their paths in it."""
    base, _, last = url.rpartition("/")
    if several := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", last):
        start, first, final, end = several.groups()
        return base, [f"{start}{number:0{len(first)}}{end}" for number in range(int(first), int(final) + 1)]
    if last.lower().endswith((".zip", ".gz", ".tgz", ".7z", ".rar")):  # to list it over https would be to read it
        raise UserError(f"{url} cannot be read (an archive: unpack it)")
    return (base, [last]) if inner is None or last.endswith(_SETS) else (url, sorted(_listed(fs, url, inner)))


def _listed(fs: Any, url: str, inner: Sequence[str]) -> Iterator[str]:
    for entry in fs.ls(url, detail=True):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if entry["type"] == "directory" and name in inner:
            yield from (f"{name}/{within}" for within in _listed(fs, f"{url}/{name}", ()))
        elif name.endswith(_SETS):
            yield name


@contextmanager
def _in_one_line(url: str, absent: type[Exception] = UserError) -> Generator[None]:
    """What a file system raises, which may be anything, as `download` says."""
    try:
        yield
    except ImportError as error:
        package = getattr(error.__cause__, "name", error.name)
        raise UserError(f"{url} needs {package}: {quoted(sys.executable)} -m pip install {package}") from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of https: the network's
        if isinstance(cause, FileNotFoundError):
            missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
            raise (UserError(in_words(missing)) if absent is UserError else missing) from None
        if isinstance(cause, UserError) or (isinstance(cause, OSError) and cause.errno == errno.ENOSPC):
            raise
        why = reason(cause, library=True)
        raise UserError(f"{url} cannot be read ({why}): look at the address, the credentials and the network") from None
