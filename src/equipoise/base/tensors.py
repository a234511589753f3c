"""A file that `torch.save` wrote becomes its table: tensors on the CPU and plain values. Nothing in it is executed, and
what it takes in memory is bounded by its size.

torch's own reader with `weights_only` calls nothing but a few harmless functions. It believes a file's numbers, though:
one of a hundred bytes may unpack to gigabytes, or name more of a tensor than the file holds, and then memory is read
that is not the tensor's. So the file is looked through first, and its tensors are measured before they are touched.
"""

import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.base.errors import UnreadableError, UserError, lacks_memory, reason
from equipoise.base.files import regular_file

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_PICKLES_OF_OLD_FILES = 5  # magic number, protocol, system, the table, keys of the tensors
_FEW_INSTRUCTIONS = 300_000  # a checkpoint of a ResNet-50 has 30,000
_MOST_TUPLES = 40_000  # three a tensor; a tuple in a tuple in a tuple, as a key, overflows the stack from 80,000 on
_DEPTH = 10
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8,
           torch.int16, torch.int32, torch.int64}  # fmt: skip
_ASKED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's refusal to run it


def load_tensors(path: Path, what: str) -> object:
    """The table in a file that `torch.save` wrote. `what` the file should be is for messages: 'checkpoint'.

    Raises UserError for a file that cannot be read, is no such file, or asks for anything to be run.
    """
    size = 0
    try:
        with regular_file(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4)
            zipped = start == _ZIP
            if not zipped and start[:1] != _PICKLE:
                raise UnreadableError("no file of torch's")
            file.seek(0)
            _look_through_zip(file, size) if zipped else _look_through(file, _PICKLES_OF_OLD_FILES, size)
        with warnings.catch_warnings(), _numbers_of_numpy():
            warnings.simplefilter("ignore")  # of what is odd about a file that is then refused
            # Of a mapped file no tensor can name more than the file has.
            table = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return _Copier(4 * size + 2**20).copy(table)
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {path}") from None
    except Exception as error:  # a damaged file may make torch raise anything
        if lacks_memory(error, 4 * size + 2**20):
            raise MemoryError from None
        asked = _ASKED.search(str(error))
        needless = asked and f"it asks for '{asked[1][:80]}', which no {what} needs; nothing of it was run"
        why = needless or reason(error)
        raise UserError(f"{path} is no {what} that can be read ({why}); take another, or copy it anew") from None


# ---------------------------------------------------------------------------------------------- before it is read


def _look_through_zip(file: Any, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        # torch would read another directory than Python does, with another program in it.
        if archive.comment or not _has_one_directory(file, archive.start_dir, size):
            raise UnreadableError("it has two directories")
        entries = archive.infolist()
        # torch packs nothing. Entries that lie upon each other would add up to more than the file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UnreadableError("it is packed")
        if sum(entry.file_size for entry in entries) > size:
            raise UnreadableError("it claims more than it has")
        for entry in entries:
            if entry.orig_filename.lower().endswith(".pkl"):  # torch does not mind the case
                with archive.open(entry) as program:
                    _look_through(program, 1, size)


def _has_one_directory(file: Any, start: int, size: int) -> bool:
    """Whether the directory is where the file's end says that it is: torch goes there; Python looks for it just before
    the end."""
    file.seek(max(0, size - 98))  # the records of large files, 56 and 20 bytes, and the last one, 22
    tail = file.read(98)
    said = int.from_bytes(tail[-6:-2], "little")
    if said == 2**32 - 1:
        said = int.from_bytes(tail[48:56], "little")
    return tail[-22:-18] == b"PK\x05\x06" and said == start


def _look_through(file: Any, pickles: int, size: int) -> None:
    """Raise UnreadableError for pickles that would make more objects than a file of that size may have: an instruction
    is one byte, an object 64 and more."""
    instructions, tuples = _FEW_INSTRUCTIONS + size // 8, _MOST_TUPLES
    for _ in range(pickles):
        for instruction, _, _ in pickletools.genops(file):
            instructions -= 1
            tuples -= "TUPLE" in instruction.name
            if instructions < 0 or tuples < 0:
                raise UnreadableError("it makes more objects than a network has")


# ---------------------------------------------------------------------------------------------- while it is read


class _Kind:
    """What a pickled dtype becomes: its name. NumPy's own would make a number of any size of it."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, _: object) -> None:
        """Byte order and the like, which is this machine's or makes a wrong number."""


def _number(kind: object, content: object) -> float:
    """What a pickled NumPy number becomes. Old files have its bytes as text."""
    name = kind.name if isinstance(kind, _Kind) else None
    if name not in ("f2", "f4", "f8"):
        raise UnreadableError("a number of an unknown kind")
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(content, bytes) or len(content) != int(name[1]):
        raise UnreadableError("a number without its bytes")
    return float(np.frombuffer(content, f"<{name}")[0])


@contextmanager
def _numbers_of_numpy() -> Generator[None]:
    """Let torch read a NumPy number, as the accuracy in a checkpoint of the BCL authors may be one, without NumPy."""
    allowed: list[Any] = [
        (_number, "numpy.core.multiarray.scalar"),  # before NumPy 2
        (_number, "numpy._core.multiarray.scalar"),
        (_Kind, "numpy.dtype"),
        # Since NumPy 1.25 a kind has a class of its own.
        *((_Kind, f"numpy.dtypes.Float{bits}DType") for bits in (16, 32, 64)),
    ]
    with torch.serialization.safe_globals(allowed):
        yield


# ---------------------------------------------------------------------------------------------- after it is read


class _Copier:
    """Copies what a file held, tensors out of the mapped file, once each however often it is named."""

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes
        self._copies: dict[int, Any] = {}

    def copy(self, value: Any, depth: int = 0) -> Any:
        """Raises UnreadableError where it goes too deep (in a circle, too) or is larger than its file."""
        if not isinstance(value, Tensor | Mapping | list | tuple):
            return value
        if depth == _DEPTH:
            raise UnreadableError("its tables go too deep")
        if id(value) not in self._copies:
            # The original is kept too: another object would else get its id.
            self._copies[id(value)] = self._new(value, depth + 1), value
        return self._copies[id(value)][0]

    def _new(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return {key: self.copy(entry, depth) for key, entry in value.items()}
        copies = [self.copy(entry, depth) for entry in value]
        return copies if isinstance(value, list) else tuple(copies)

    def _tensor(self, tensor: Tensor) -> Tensor:
        odd = tensor.is_nested or tensor.dtype not in _DTYPES
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or odd:
            raise UnreadableError("a tensor of a kind that no network has")
        self._left -= tensor.numel() * tensor.element_size()
        if self._left < 0:
            raise UnreadableError("its tensors are larger than it is")
        return tensor.detach().clone()
