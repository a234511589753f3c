"""Names of classes: which are the same although written otherwise, and which look alike."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from equipoise.base.errors import UserError, several
from equipoise.data.images import Indices

_NAMED = 10  # classes, in a message
_ALIKE = "differ in capitals, blanks or look-alike letters only"


def normal(name: str) -> str:
    """A class's name as it is compared and kept: in Unicode's composed form (NFC), without blanks around it. macOS
    writes the same letter decomposed."""
    return unicodedata.normalize("NFC", name).strip()


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes, each once, by their letters, or by their values where all are numbers (2 before 10)."""
    distinct = set(map(normal, names))
    if all(name.isascii() and name.isdigit() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def look_alikes(names: Sequence[str]) -> list[str]:
    """A line for each two names of `names` that look alike."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(_bare(name), name), name) for name in names]
    what = f"{_ALIKE}: if they are one, give them one name"
    return [f"classes '{one}' and '{other}' {what}" for one, other in pairs if one != other]


def numbered(words: Sequence[str], names: Sequence[str], origin: str, part: str = "train part") -> Indices:
    """The label of each word: its place in `names`, the classes of `part`. Raises UserError, which names `origin`, for
    words that are no class, and says where they look like one."""
    numbers = {normal(name): label for label, name in enumerate(names)}
    if unknown := [word for word in dict.fromkeys(words) if normal(word) not in numbers]:
        raise UserError(f"{origin}: {unknown_classes(unknown, names, part)}")
    return np.array([numbers[normal(word)] for word in words], np.int64)


def unknown_classes(unknown: Sequence[str], names: Iterable[str], part: str) -> str:
    """The message about classes that are not among `names`, the classes of `part`."""
    known = {_bare(name): name for name in names}
    for name in unknown:
        if other := known.get(_bare(name)):
            return f"class '{name}' is '{other}' in the {part}: they {_ALIKE}; give them one name"
    listed = ", ".join(f"'{name}'" for name in unknown[:_NAMED])
    more = f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else ""
    return f"{several(len(unknown), 'class')} unknown to the {part}: {listed}{more}"


def _bare(name: str) -> str:
    """What is left of a name without what readers overlook."""
    return re.sub(r"[\s_]", "", unicodedata.normalize("NFKC", name).casefold())
