"""The exceptions for errors of users, and how errors are put into one line."""

import errno
import re
import reprlib
import shlex
import sys
from pathlib import Path
from shutil import which


class UserError(ValueError):
    """Something the user can put right: bad data, a bad recipe, a bad argument.

    The text is one line that says what is wrong, where, and what to do. The command line prints it and exits with
    `code`; any other exception is a bug of ours and shows its traceback.
    """

    code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())  # text from a file may have line ends


class UnreadableError(ValueError):
    """Why a file cannot be read, in our wording. See `reason`."""


class SharedError(UserError):
    """An error that every process of a training raises. The command line prints it once on each host."""


class SaidError(UserError):
    """An error that another process of this host has told the user already."""


class LostRankError(UserError):
    """An exchange with the other ranks failed: one of them has ended, or does not answer."""

    code = 3


class Stopped(Exception):  # noqa: N818 it is no error
    """A signal has stopped a run: 'interrupted' (SIGINT) or 'terminated' (SIGTERM). `command` goes on with it."""

    def __init__(self, how: str, state: str, command: str) -> None:
        super().__init__(how, state, command)  # ranks send it to each other as a pickle, which keeps these
        self.code = {"interrupted": 130, "terminated": 143}[how]

    def __str__(self) -> str:
        how, state, command = self.args
        return f"{how}: {state}; go on with:\n{command}"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def shown(value: object) -> str:
    """A value from a file, shortened for a message."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python refuses to print it
        return "a number of thousands of digits"


def in_words(error: Exception) -> str:
    """An error of the user or of the system, as a message says it."""
    if out_of_memory(error):
        return "there is not enough memory for this on this device; free some, or try another"
    if not isinstance(error, OSError):
        return str(error)
    where = f": {error.filename}" if error.filename else ""
    return (error.strerror or str(error)).lower() + where


# torch has a class of its own only for what its caching allocator cannot get on a GPU.
_OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator|(not enough|out of|Insufficient) memory|_ALLOC(ATION)?_FAILED|std::bad_alloc|allocate memory"
)


def out_of_memory(error: Exception) -> bool:
    """Whether the memory, of the machine or of a GPU, was too small."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return not isinstance(error, ValueError) and _OUT_OF_MEMORY.search(str(error)) is not None


# What only the programmers of a library understand: addresses, classes, places in its source.
_INTERNAL = re.compile(r"0x[0-9a-f]{5,}|<[\w.]+ |<class|\w(Error|Exception)\b|\w::\w|\.(cc|cpp|rs|py):\d")
_OF_PROGRAMMERS = (LookupError, TypeError, AttributeError, AssertionError, UnicodeError, ArithmeticError)


def reason(error: Exception, library: bool = False, otherwise: str = "its content makes no sense") -> str:
    """Why a file cannot be read, whatever was raised for it, in a few words on one line: the system's or ours, and with
    `library` the first line of a library's message if a user can understand it. Else `otherwise`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if out_of_memory(error):
        return "there is not enough memory for it"
    text = str(error).partition("\n")[0].strip()
    clear = library and text and not isinstance(error, _OF_PROGRAMMERS) and not _INTERNAL.search(text)
    return one_line(text[:150]) if clear or isinstance(error, UnreadableError) else otherwise


# Control characters, ends of lines and paragraphs, letters that turn the direction of writing, halves of surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """A text on one line of a terminal. The name of a file may hold anything, also escape sequences."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def own_command() -> str:
    """How a shell finds this program: by its name, or where no environment is activated, by the path of this call."""
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "equipoise" and which("equipoise") is None else "equipoise"


def several(number: int, noun: str) -> str:
    """'1 epoch', '2,000 epochs'."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"
