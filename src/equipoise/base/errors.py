"""The exceptions for what a user can cause, and how what a file holds is put into a line."""

import errno
import re
import reprlib
import shlex
import sys
from pathlib import Path
from shutil import which
from unicodedata import category


class UserError(ValueError):
    """Something the user can put right: bad data, a bad recipe, a bad argument.

    The text is one line that says what was wrong, where, and what to do. The command line prints it and exits
    with code 2; any other exception is a bug of ours and shows its traceback.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())  # what a file says of itself may have line ends


class UnreadableError(ValueError):
    """Why a file cannot be read, in words of ours. See `reason`."""


class SharedError(UserError):
    """One that every process of a training raises. The command line prints it once on each host."""


class SaidError(UserError):
    """One that another process of this host has told the user already."""


class Stopped(Exception):  # noqa: N818 it is no error
    """A signal has stopped a run: 'interrupted' (SIGINT) or 'terminated' (SIGTERM). `command` goes on with it."""

    def __init__(self, how: str, state: str, command: str) -> None:
        super().__init__(how, state, command)  # as they are: ranks send it to each other
        self.code = {"interrupted": 130, "terminated": 143}[how]

    def __str__(self) -> str:
        how, state, command = self.args
        return f"{how}: {state}; go on with:\n{command}"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 3, 4, 6, 6


def shown(value: object) -> str:
    """A value from a file as a message shows it: short, whatever it is."""
    try:
        return _REPR.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def in_words(error: Exception) -> str:
    """An error of the user's or of the system's, as a message says it."""
    if out_of_memory(error):
        return "there is not enough memory for this on this device; free some, or try another"
    if not isinstance(error, OSError):
        return str(error)
    where = f": {error.filename}" if error.filename else ""
    return (error.strerror or str(error)).lower() + where


# Of the machine, of GPUs and their libraries, of C++, OpenCV and Pillow. torch has a class of its own for one of them.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|(CUDA|HIP|MPS|XPU).{0,20} out of memory|_ALLOC(ATION)?_FAILED|std::bad_alloc|"
    r"[Cc]annot allocate memory|unable to allocate shared memory|Insufficient memory|^out of memory error"
)


def out_of_memory(error: Exception) -> bool:
    """Whether the memory, of the machine or of a GPU, was too small for what was asked of it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    spoken = isinstance(error, (RuntimeError, OSError)) or type(error).__module__ == "cv2"
    return isinstance(error, MemoryError) or (spoken and _OUT_OF_MEMORY.search(str(error)) is not None)


def lacks_memory(error: Exception, most: int) -> bool:
    """Whether a file could not be read because the machine has less than the `most` bytes that a sound one takes, and
    not because it claims to hold more."""
    if not out_of_memory(error):
        return False
    import numpy as np

    try:
        np.empty(most, np.uint8)
    except MemoryError:
        return True
    return False


# What is for the programmers of a library: addresses, classes, places in its source.
_INSIDE = re.compile(r"0x[0-9a-f]{5,}|<[\w.]+ |<class|\w(Error|Exception)\b|\w::\w|\.(cc|cpp|rs|py):\d")
_OF_PROGRAMMERS = (LookupError, TypeError, AttributeError, AssertionError, UnicodeError, ArithmeticError)


def reason(error: Exception, library: bool = False, otherwise: str = "its content makes no sense") -> str:
    """Why a file cannot be read, whatever was raised for it, in a few words on one line: those of the system or ours;
    with `library`, also the first line of a library's, where a user can make anything of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    said = str(error).partition("\n")[0].strip()
    ours = isinstance(error, UnreadableError)
    spoken = library and said and not isinstance(error, _OF_PROGRAMMERS) and not _INSIDE.search(said)
    return one_line(said[:150]) if ours or spoken else otherwise


# Control characters, halves of surrogates, ends of lines and paragraphs; and what turns the direction of writing.
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}
_TURNS = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def one_line(text: str) -> str:
    """A text on one line of a terminal: a file may be called anything, escape sequences too."""
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if category(letter) in _CONTROLS or letter in _TURNS else letter
        for letter in text
    )


def own_command() -> str:
    """How a shell would find this program: by its name, or where an environment is not activated, as it was called."""
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "equipoise" and which("equipoise") is None else "equipoise"


def several(number: int, noun: str) -> str:
    """'1 epoch', '2,000 epochs'."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"
