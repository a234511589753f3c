"""Numbers of a training run become JSON lines, TensorBoard curves and a line of progress."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_SECONDS_BETWEEN_PLAIN_LINES = 10.0


class RunLog:
    """`metrics.jsonl` and TensorBoard events of a run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin after `step` steps: what the folder has of later ones, which will be done again, is dropped."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        file = folder / "metrics.jsonl"
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
        self._lines = file.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float | None]) -> None:
        """One line, `kind` 'train' or 'validation', after `step` steps; `None` (absent) is no point of a curve."""
        self._lines.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None:
                self._curves.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._lines.close()
        self._curves.close()


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a line of progress about them: `what` is done to `total` images. See `ProgressLine`."""
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
    """Where training is: epoch, loss terms, images/s, time left. In a terminal one line that changes; elsewhere, as
    in a file, a plain line now and then. With `shown` false, nothing."""

    def __init__(self, done: int, steps: int, epochs: int, shown: bool) -> None:
        """`done` of `steps` steps are behind already."""
        self._done, self._steps, self._epochs = done, steps, epochs
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._plain = shown and not sys.stdout.isatty()
        self._start = self._last_plain = time.monotonic()
        if shown and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("left"), transient=True)
            self._task = self._bar.add_task("starting", total=steps, completed=done)
            self._bar.start()

    def update(self, step: int, epoch: int, values: dict[str, float], rate: float) -> None:
        """After `step` steps, in `epoch` (from 0), at `rate` images/s."""
        terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        text = f"epoch {epoch + 1}/{self._epochs}  {terms}  {rate:,.0f} images/s"
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._plain and (step == self._steps or now - self._last_plain > _SECONDS_BETWEEN_PLAIN_LINES):
            left = (now - self._start) / (step - self._done) * (self._steps - step)
            print(f"step {step}/{self._steps}  {text}  {timedelta(seconds=round(left))} left", flush=True)
            self._last_plain = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
