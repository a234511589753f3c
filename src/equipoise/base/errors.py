"""The exceptions for errors of users, and how errors are put into one line."""

import re
import reprlib
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import which


class UserError(ValueError):
    """Something the user can put right: one line that says what is wrong, where, and what to do. The command line
    prints it and exits with `code`; any other exception is a bug of ours and shows its traceback."""

    code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())  # text from a file may have line ends


class SharedError(UserError):
    """An error that every process of a training raises. The command line prints it once on each host."""


class LostRankError(SharedError):
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
    return _REPR.repr(value)


# torch has a class of its own only for what its caching allocator cannot get on a GPU.
_NO_MEMORY = re.compile("(not enough|out of|Insufficient) memory|allocate memory|_ALLOC(ATION)?_FAILED|std::bad_alloc")


def out_of_memory(error: Exception) -> bool:
    """Whether the memory, of the machine or of a GPU, was too small."""
    text = "" if isinstance(error, ValueError) else str(error)
    return isinstance(error, MemoryError) or _NO_MEMORY.search(text) is not None


# What only the programmers of a library understand: addresses, classes, places in its source.
_INTERNAL = re.compile(r"0x[0-9a-f]{5,}|<\w|\w(Error|Exception)\b|\w::\w|\.(cc|cpp|rs|py):\d")
_OF_PROGRAMMERS = (LookupError, TypeError, AttributeError, AssertionError, UnicodeError, ArithmeticError)


def reason(error: Exception, library: bool = False, otherwise: str = "its content makes no sense") -> str:
    """Why a file cannot be read, whatever was raised for it, in a few words on one line: the system's, and with
    `library` the first line of a library's message if a user can understand it. Else `otherwise`."""
    if out_of_memory(error):
        return "there is not enough memory: free some, or take another device"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error).partition("\n")[0].strip()
    clear = library and text and not isinstance(error, _OF_PROGRAMMERS) and not _INTERNAL.search(text)
    return one_line(text[:150]) if clear else otherwise


def in_words(error: Exception) -> str:
    """An error of the user or of the system, as a message says it."""
    if isinstance(error, UserError):
        return str(error)
    file = getattr(error, "filename", None)
    return reason(error, library=True) + (f": {file}" if file else "")


# Control characters, ends of lines and paragraphs, letters that turn the direction of writing, halves of surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """A text on one line of a terminal. The name of a file may hold anything, also escape sequences."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def own_command() -> str:
    """How a shell finds this program: by its name, or where no environment is activated, by the path of this call."""
    called = Path(sys.argv[0])
    return quoted(called) if called.name == "equipoise" and which("equipoise") is None else "equipoise"


def quoted(word: str | Path) -> str:
    """A word of a command as the system's shell takes it: to that of Windows, single quotes are letters."""
    return subprocess.list2cmdline([str(word)]) if sys.platform == "win32" else shlex.quote(str(word))


def several(number: int, noun: str) -> str:
    """'1 epoch', '2,000 epochs', '3 classes'."""
    return f"{number:,} {noun if number == 1 else f'{noun}es' if noun.endswith('s') else f'{noun}s'}"
