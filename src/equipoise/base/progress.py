"""Progress in the terminal: one line that changes. Where the output is no terminal, a plain line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_SECONDS_BETWEEN_PLAIN_LINES = 10.0


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, one for each of `total` images, with the progress of `what` ('looking at images')."""
    terminal = sys.stdout.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()
    with Progress(*columns, transient=True, disable=not terminal) as bar:
        task = bar.add_task(what, total=total)
        for done, item in enumerate(items, 1):
            yield item
            bar.advance(task)
            if not terminal and (done == total or time.monotonic() - last > _SECONDS_BETWEEN_PLAIN_LINES):
                print(f"{what}: {done:,} of {total:,} images", flush=True)
                last = time.monotonic()


class ProgressLine:
    """The progress of a training: epoch, loss terms, images/s, time left. With `shown` false it prints nothing."""

    def __init__(self, done: int, steps: int, epochs: int, shown: bool) -> None:
        """`done`: steps that an earlier process has trained, of `steps` in all."""
        self._done, self._steps, self._epochs = done, steps, epochs
        terminal = sys.stdout.isatty()
        self._plain = shown and not terminal
        self._start = self._last_plain = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("left"), transient=True, disable=not (shown and terminal))
        self._task = self._bar.add_task("starting", total=steps, completed=done)
        self._bar.start()

    def update(self, step: int, epoch: int, values: dict[str, float], rate: float) -> None:
        """After `step` steps, in `epoch` (from 0), at `rate` images/s."""
        terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        text = f"epoch {epoch + 1}/{self._epochs}  {terms}  {rate:,.0f} images/s"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if self._plain and (step == self._steps or now - self._last_plain > _SECONDS_BETWEEN_PLAIN_LINES):
            left = (now - self._start) / (step - self._done) * (self._steps - step)
            print(f"step {step}/{self._steps}  {text}  {timedelta(seconds=round(left))} left", flush=True)
            self._last_plain = now

    def close(self) -> None:
        self._bar.stop()
