"""Numbers of a training run become lines of `metrics.jsonl` and TensorBoard curves."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import msgspec

from equipoise.runs.folder import CURVES, LOG

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Kind = Literal["train", "validation"]


class RunLog:
    """A context that writes the log of the run in `folder`; without a folder (all ranks but the first), nothing.

    Every method raises OSError where the disk is full.
    """

    def __init__(self, folder: Path | None, epoch: int, step: int) -> None:
        """Go on after `epoch` whole epochs and `step` steps: lines and points of later steps, which will be computed
        again, are dropped."""
        self._lines = self._curves = None
        if folder is None:
            return
        file = folder / LOG
        if file.exists():
            os.truncate(file, _length_of_done(file, epoch, step))
        self._curves = _open_curves(folder / CURVES, step)
        self._lines = file.open("a", encoding="utf-8")

    def write(self, kind: Kind, step: int, epoch: int, values: dict[str, float | None]) -> None:
        """One line, after `step` steps. A value of None (absent) is no point of a curve."""
        if self._lines is None:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None and self._curves is not None:
                self._curves.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Put what was written on the disk: before a checkpoint, since a run that goes on from it writes no line of
        an earlier step."""
        if self._curves is not None:
            self._curves.flush()
        if self._lines is not None:
            os.fsync(self._lines.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for opened in filter(None, (self._curves, self._lines)):
            try:
                opened.close()
            except OSError:
                if error is None:  # on a full disk closing fails too: the first error says more
                    raise


def _open_curves(folder: Path, step: int) -> "SummaryWriter | None":
    """The writer of TensorBoard's files; None, and a line that says so, where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import
    except ImportError:
        print("no TensorBoard curves are written: it is not installed (pip install tensorboard)", flush=True)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)  # TensorBoard drops what earlier files have from there on


class _Line(msgspec.Struct):
    kind: Kind
    step: int
    epoch: int


def _length_of_done(file: Path, epoch: int, step: int) -> int:
    """Bytes of the file up to the first line of something later, or up to one that a killed run has not finished. An
    epoch is whole when it is validated: its last step alone does not make it whole."""
    length = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                said = msgspec.json.decode(line, type=_Line)
            except msgspec.DecodeError:
                break
            later = said.step > step or (said.kind == "validation" and said.epoch >= epoch)
            if later or not line.endswith(b"\n"):
                break
            length += len(line)
    return length
