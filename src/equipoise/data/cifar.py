"""CIFAR-10 and CIFAR-100 as their authors publish them become image lists, in the archives' own order.

Two forms each, as a folder or as the `.tar.gz`, which is read without being unpacked: the *binary* one, records of one
(CIFAR-100: two) label bytes and 3,072 pixel bytes; and the *python* one, pickles. A pickle is a program. Here it is run
by an unpickler that knows no function but the few inert stand-ins below, so nothing of it is executed.
"""

import gzip
import io
import pickle
import pickletools
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from equipoise.base.errors import UnreadableError, UserError, reason
from equipoise.base.files import regular_file
from equipoise.data.images import ImageList, Indices, PixelArrays

_PIXELS = 3 * 32 * 32
_LARGEST_FILE = 300_000_000  # the largest file of the archives has 155 MB: more is none of them
_LARGEST_NAMES = 100_000  # bytes of the file of class names, of which the largest has 1,500
_MOST_UNPACKED = 3  # times the packed size: of the published archives it is 1.1
_MOST_INSTRUCTIONS = 1_000_000  # of a pickle: those of the archives have up to 250,000
_MOST_TUPLES = 1_000  # an array has six of them


@dataclass(frozen=True)
class CifarArchive:
    """Where an archive is: the folder of its files, or the `.tar.gz`. `classes`: 10 or 100; `form`: python, binary."""

    path: Path
    classes: int
    form: str

    def files(self) -> list[Path]:
        """The folder or the packed archive, and of a folder the files that are read."""
        wanted = [name for names in _FILES[self.classes, self.form].values() for name in names]
        return [self.path, *(self.path / name for name in wanted if self.path.is_dir())]


# Folder in the archive -> its archive, classes and form; of two that lie together the first is read.
_KNOWN = {
    "cifar-10-batches-py": ("cifar-10-python.tar.gz", 10, "python"),
    "cifar-10-batches-bin": ("cifar-10-binary.tar.gz", 10, "binary"),
    "cifar-100-python": ("cifar-100-python.tar.gz", 100, "python"),
    "cifar-100-binary": ("cifar-100-binary.tar.gz", 100, "binary"),
}
_FILES = {
    (10, "python"): {
        "train": [f"data_batch_{n}" for n in range(1, 6)],
        "test": ["test_batch"],
        "names": ["batches.meta"],
    },
    (10, "binary"): {
        "train": [f"data_batch_{n}.bin" for n in range(1, 6)],
        "test": ["test_batch.bin"],
        "names": ["batches.meta.txt"],
    },
    (100, "python"): {"train": ["train"], "test": ["test"], "names": ["meta"]},
    (100, "binary"): {"train": ["train.bin"], "test": ["test.bin"], "names": ["fine_label_names.txt"]},
}


def find_cifar(root: Path) -> CifarArchive | None:
    """The archive at `root`: its `.tar.gz`, its unpacked folder, or a folder that holds one of these; None where there
    is none. Names alone are looked at. Raises UserError where both CIFAR-10 and CIFAR-100 lie there."""
    names = {root.name, root.resolve().name}  # `.` has no name of its own, and a link may have another
    for folder, (archive, classes, form) in _KNOWN.items():
        if (folder in names and root.is_dir()) or (archive in names and root.is_file()):
            return CifarArchive(root, classes, form)
    if not root.is_dir():
        return None
    found = [
        CifarArchive(path, classes, form)
        for folder, (archive, classes, form) in _KNOWN.items()
        for path in (root / folder, root / archive)
        if path.exists()
    ]
    if len({archive.classes for archive in found}) > 1:
        raise UserError(
            f"{root} holds both CIFAR-10 and CIFAR-100; name one of them: {found[0].path} or {found[-1].path}"
        )
    return found[0] if found else None


def open_cifar(archive: CifarArchive) -> dict[str, ImageList]:
    """The parts `train` and `test`, images uint8 `[N, 32, 32, 3]` in the archive's order; of CIFAR-100 the fine labels.

    Raises UserError naming the file that is missing, damaged, or asks for code to be run.
    """
    wanted = _FILES[archive.classes, archive.form]
    content = _read(archive, [name for names in wanted.values() for name in names])
    python = archive.form == "python"
    names = _names(archive, content, wanted["names"][0])
    parts: dict[str, ImageList] = {}
    for part in ("train", "test"):
        pixels: list[npt.NDArray[np.uint8]] = []
        labels: list[Indices] = []
        for file in wanted[part]:
            where = f"{archive.path}/{file}"
            if file not in content:
                raise UserError(f"{file} is missing in {archive.path}; take the archive anew")
            read = _of_pickle if python else _of_records
            pixels_NP, labels_N = read(content.pop(file), where, archive.classes)
            wrong = labels_N[(labels_N < 0) | (labels_N >= len(names))]
            if len(wrong):
                raise UserError(f"{where} has label {wrong[0]}, but the classes are 0 to {len(names) - 1}")
            pixels.append(pixels_NP)
            labels.append(labels_N)
        planes_N3HW = np.concatenate(pixels).reshape(-1, 3, 32, 32)
        images = PixelArrays(f"{archive.path} ({part})", np.ascontiguousarray(planes_N3HW.transpose(0, 2, 3, 1)))
        parts[part] = ImageList(str(archive.path), images, np.concatenate(labels), names)
    return parts


def _names(archive: CifarArchive, content: Mapping[str, bytes], file: str) -> tuple[str, ...]:
    """The class names; numbers where the archive's file of them is missing."""
    if file not in content:
        return tuple(str(label) for label in range(archive.classes))
    where = f"{archive.path}/{file}"
    if len(content[file]) > _LARGEST_NAMES:
        raise UserError(f"{where} has {len(content[file]):,} bytes, far more than names; take the archive anew")
    if archive.form == "binary":
        found: object = content[file].split()
    else:
        key = b"label_names" if archive.classes == 10 else b"fine_label_names"
        found = _field(_unpickle(content[file], where), key, where)
    if not isinstance(found, list) or not found or not all(isinstance(name, bytes | str) for name in found):
        raise UserError(f"{where} names no classes; take the archive anew")
    names = tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in found)
    if not len(set(names)) == len(names) == archive.classes:
        raise UserError(f"{where} does not name {archive.classes} different classes; take the archive anew")
    return names


# ---------------------------------------------------------------------------------------------- files


def _read(archive: CifarArchive, wanted: Sequence[str]) -> dict[str, bytes]:
    """The content of those of the wanted files that are there."""
    if archive.path.is_dir():
        files = {name: archive.path / name for name in wanted if (archive.path / name).is_file()}
        for file in files.values():
            _refuse_size(file.stat().st_size, str(file))
        return {name: file.read_bytes() for name, file in files.items()}
    content: dict[str, bytes] = {}
    try:
        with gzip.open(regular_file(archive.path)) as unpacked:
            most = _MOST_UNPACKED * archive.path.stat().st_size + 2**24
            with tarfile.open(fileobj=_Limited(unpacked, most), mode="r|") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] else every one of them is kept, and millions of empty ones pack well
                    name = member.name.rpartition("/")[2]
                    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                    if name in wanted and plain:  # a sparse one claims what it does not hold
                        _refuse_size(member.size, f"{archive.path}/{name}")
                        file = tar.extractfile(member)
                        assert file is not None, "it is a file"
                        content[name] = file.read()
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{archive.path} is damaged ({reason(error)}); take the archive anew") from None
    return content


class _Limited(io.RawIOBase):
    """A file that ends with an error after `most` bytes: what a small archive unpacks to may fill any memory."""

    def __init__(self, file: gzip.GzipFile, most: int) -> None:
        self._file = file
        self._left = most

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(content)
        if self._left < 0:
            raise UnreadableError("it unpacks to far more than the published archives do")
        return content


def _refuse_size(size: int, where: str) -> None:
    if size > _LARGEST_FILE:
        raise UserError(f"{where} has {size:,} bytes; no file of the published archives is that large")


def _of_records(content: bytes, where: str, classes: int) -> tuple[npt.NDArray[np.uint8], Indices]:
    """Pixels `[N, 3072]` and labels `[N]` of a binary file. CIFAR-100: a coarse label, then the fine one."""
    labels = 1 if classes == 10 else 2
    if not content or len(content) % (labels + _PIXELS):
        raise UserError(
            f"{where} has {len(content):,} bytes, which are no whole number of images; take the archive anew"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + _PIXELS)
    return records[:, labels:], records[:, labels - 1].astype(np.int64)


def _of_pickle(content: bytes, where: str, classes: int) -> tuple[npt.NDArray[np.uint8], Indices]:
    """Pixels `[N, 3072]` and labels `[N]` of a pickled file."""
    table = _unpickle(content, where)
    pixels, labels = _field(table, b"data", where), _field(table, b"labels" if classes == 10 else b"fine_labels", where)
    pixels_NP = pixels.value if isinstance(pixels, _Array) else None
    if pixels_NP is None or pixels_NP.ndim != 2 or pixels_NP.shape[1] != _PIXELS:
        raise UserError(f"{where}: its data are no images of {_PIXELS:,} bytes each; take the archive anew")
    if not isinstance(labels, list) or not all(type(label) is int and -1 < label < 256 for label in labels):
        raise UserError(f"{where}: its labels are no whole numbers from 0 to 255; take the archive anew")
    if len(labels) != len(pixels_NP) or not labels:
        raise UserError(f"{where} has {len(pixels_NP):,} images, but {len(labels):,} labels; take the archive anew")
    return pixels_NP, np.array(labels, np.int64)


def _field(table: object, key: bytes, where: str) -> object:
    """What a pickled table holds under a key, as Python 2 (bytes) or Python 3 (text) wrote it."""
    if isinstance(table, dict):
        for name in (key, key.decode()):
            if name in table:
                return table[name]
    raise UserError(f"{where} has no '{key.decode()}'; take the archive anew")


# ---------------------------------------------------------------------------------------------- pickles


class _Array:
    """What a pickled uint8 array becomes: its bytes are looked at when it is filled, and nothing is called."""

    value: npt.NDArray[np.uint8] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnreadableError("an array's state has five parts")
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Kind) or kind.name not in ("u1", "|u1"):
            raise UnreadableError("its array does not hold bytes")
        if not (isinstance(shape, tuple) and shape and all(type(side) is int and side >= 0 for side in shape)):
            raise UnreadableError("its array has no shape")
        # Python 3 writes bytes at the old protocols as text to be encoded: see `_encode`.
        if not isinstance(content, bytes) or fortran:
            raise UnreadableError("its array is no plain row of bytes")
        size = 1
        for side in shape:
            size *= side
        if size != len(content):
            raise UnreadableError(f"its array claims {size} bytes and has {len(content)}")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


class _Kind:
    """What a pickled dtype becomes: its name."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name.decode("ascii", "replace") if isinstance(name, bytes) else name

    def __setstate__(self, _: object) -> None:
        """Byte order and the like, which bytes do not have."""


class _ArrayClass:
    """Stands where a pickle names the class of arrays."""


def _new_array(*_: object) -> _Array:
    return _Array()


def _of_buffer(content: object, kind: object, shape: object, order: object) -> _Array:
    """As protocol 5 writes arrays."""
    array = _Array()
    content = bytes(content) if isinstance(content, bytearray) else content
    array.__setstate__((1, shape, kind, order != "C", content))
    return array


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """As Python 3 writes bytes at protocols below 3."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnreadableError("its bytes are not encoded as Python encodes them")
    return text.encode("latin1")


_STAND_INS: Mapping[str, Callable[..., object]] = {
    "numpy.ndarray": _ArrayClass,
    "numpy.dtype": _Kind,
    "_codecs.encode": _encode,
    **{f"numpy.{core}.multiarray._reconstruct": _new_array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _of_buffer for core in ("core", "_core")},
}


class _ForeignError(Exception):
    """A pickle asks for something that is no part of an archive."""


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage]
    """Python's own unpickler, not the one in C: that takes memory for as many objects as a file claims to have."""

    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get(f"{module}.{name}")
        if stand_in is None:
            raise _ForeignError(f"{module}.{name}")
        return stand_in

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportPrivateUsage]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Kind):  # else it would set attributes of the stand-ins themselves
            raise _ForeignError("build of what is no array")
        pickle._Unpickler.load_build(self)  # pyright: ignore

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> Any:
        raise _ForeignError(f"persistent object {str(pid)[:40]}")


def _refuse_program(content: bytes) -> None:
    """Raise UnreadableError for a pickle of more instructions, or more tuples, than an archive's: one byte can make an
    object of 64, and a tuple in a tuple in a tuple, as a key, overflows the stack from 80,000 on."""
    tuples = 0
    for number, (instruction, _, _) in enumerate(pickletools.genops(content)):
        tuples += "TUPLE" in instruction.name
        if number > _MOST_INSTRUCTIONS or tuples > _MOST_TUPLES:
            raise UnreadableError("it is a longer program than the published files are")


def _unpickle(content: bytes, where: str) -> object:
    try:
        _refuse_program(content)
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _ForeignError as error:
        asked = re.sub(r"[^\w.]", "?", str(error))[:80]
        raise UserError(
            f"{where} asks for '{asked}', which the published archive does not; nothing of it was run"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything; nothing but the stand-ins above was called
        raise UserError(f"{where} is damaged ({reason(error)}); take the archive anew") from None
