"""Numbers of a training run become JSON lines, TensorBoard curves and a line of progress."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from equipoise.base.files import parsed_json, regular_file

T = TypeVar("T")

LONGEST_LINE = 2**16  # bytes, of metrics.jsonl
_SECONDS_BETWEEN_PLAIN_LINES = 10.0


class RunLog:
    """A context: `metrics.jsonl` and TensorBoard events of a run folder. Without a folder (all ranks but the first):
    none. Everything raises OSError where there is no room."""

    def __init__(self, folder: Path | None, epoch: int, step: int) -> None:
        """Begin after `step` steps and `epoch` whole epochs: what the folder has of what will be done again is
        dropped."""
        self._open = folder is not None
        if folder is None:
            return
        file = folder / "metrics.jsonl"
        if file.exists():
            os.truncate(file, _length_of_done(file, epoch, step))
        self._lines = file.open("a", encoding="utf-8")
        try:
            self._curves = _Curves(folder / "tensorboard", step)
        except OSError:
            self._lines.close()
            raise

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float | None]) -> None:
        """One line, `kind` 'train' or 'validation', after `step` steps; `None` (absent) is no point of a curve."""
        if not self._open:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None:
                self._curves.add(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Have what was written on the disk: before a checkpoint that will not write it again."""
        if self._open:
            os.fsync(self._lines.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._open:
            return
        with ExitStack() as stack:
            if error is not None:
                stack.enter_context(suppress(OSError))  # of the same disk: the first error says more
            stack.enter_context(closing(self._lines))
            stack.enter_context(closing(self._curves))


class _Curves:
    """A TensorBoard event file, written at once: the writer that comes with torch has a thread of its own, which ends
    in a traceback where the disk is full."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{step}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:  # what other files have of later steps does not count any more
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, name: str, value: float, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        point = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._write(Event(wall_time=time.time(), step=step, summary=point))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _length_of_done(file: Path, epoch: int, step: int) -> int:
    """Bytes of the file up to the first line of something later, or one that a killed run has not finished. An epoch is
    whole when it is validated: its last step may be done without."""
    length = 0
    with regular_file(file).open("rb") as lines:
        for line in iter(lambda: lines.readline(LONGEST_LINE), b""):
            try:
                said = parsed_json(line)
                later = said["step"] > step or (said["kind"] == "validation" and said["epoch"] >= epoch)
            except (ValueError, KeyError, TypeError):
                break
            if later or not line.endswith(b"\n"):
                break
            length += len(line)
    return length


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
