"""Progress in the terminal: one line that changes. Where the output is no terminal, a plain line now and then."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
quiet = False  # --quiet: set once, by the command line
_SECONDS_BETWEEN_PLAIN_LINES = 10.0


class ProgressLine:
    """How much of `total` is done, of which `done` was done before. With `shown` false it prints nothing."""

    def __init__(self, done: int, total: int, unit: str, shown: bool = True) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._before, self._total, self._unit = done, total, unit
        shown, terminal = shown and not quiet, sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._plain = shown and not terminal
        self._start = self._last_plain = time.monotonic()
        # Where there is little room, the end of the description goes.
        columns = (TimeRemainingColumn(), TextColumn("left"), BarColumn(bar_width=10), TextColumn("{task.description}"))
        self._bar = Progress(*columns, transient=True, disable=not (shown and terminal))
        self._task = self._bar.add_task("starting", total=total, completed=done)
        self._bar.start()

    def update(self, done: int, text: str) -> None:
        text = f"{self._unit} {done:,}/{self._total:,}  {text}"
        self._bar.update(self._task, completed=done, description=text)
        now = time.monotonic()
        if self._plain and (done == self._total or now - self._last_plain > _SECONDS_BETWEEN_PLAIN_LINES):
            left = (now - self._start) / (done - self._before) * (self._total - done)
            print(f"{text}  {timedelta(seconds=round(left))} left", flush=True)
            self._last_plain = now

    def close(self) -> None:
        self._bar.stop()


def say(text: str) -> None:
    """Print what is neither a result nor an error."""
    if not quiet:
        print(text, flush=True)


def counted(items: Iterable[T], total: int, what: str, images: int = 1) -> Iterator[T]:
    """The items, each of which is for so many of `total` images, with the progress of `what` ('decoding train')."""
    with closing(ProgressLine(0, total, "image")) as line:
        for done, item in enumerate(items, 1):
            yield item
            line.update(min(done * images, total), what)
