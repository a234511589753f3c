"""Signals become requests that the training loop honours between two steps, when all its state is whole."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from equipoise.base.errors import Stopped

_STOPPING: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Requests:
    """SIGUSR1 asks to save and go on, SIGINT and SIGTERM to save and stop; a second one of these stops at once.

    A context: the handlers that were there before come back with its end. Outside the main thread nothing is handled.
    """

    def __init__(self) -> None:
        self._save = False
        self._stop = ""  # how, once it was asked for
        self._before: dict[int, Any] = {}
        self._at_once: tuple[str, str] | None = None

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            saving = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
            self._before = {number: signal.signal(number, self._handle) for number in (*saving, *_STOPPING)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def votes(self, save: bool = False) -> list[int]:
        """Whether to save, as `save` or a signal since the last time says, to be interrupted, to be terminated: 0 or 1
        each. Ranks add up their votes, and all `read` the sum."""
        save, self._save = save or self._save, False
        return [int(save), *(int(self._stop == how) for how in _STOPPING.values())]

    @staticmethod
    def read(votes: list[float]) -> tuple[bool, str | None]:
        """Whether to save now, and how the run was stopped if it was."""
        save, interrupted, terminated = votes
        how = "terminated" if terminated else "interrupted" if interrupted else None
        return bool(save) or how is not None, how

    def leave_if_stopped(self, state: str, resume_command: str) -> None:
        """Raise Stopped if this process was asked to stop. All is saved already."""
        if self._stop:
            raise Stopped(self._stop, state, resume_command)

    def stop_at_once(self, state: str, resume_command: str) -> None:
        """From now on there is nothing to save: a signal ends the run at once, in this state."""
        self._at_once = state, resume_command
        self.leave_if_stopped(state, resume_command)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number not in _STOPPING:
            self._save = True
        elif not self._stop:
            self._stop = _STOPPING[number]
            if self._at_once is not None:
                raise Stopped(self._stop, *self._at_once)
            if os.environ.get("RANK", "0") == "0":
                print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr, flush=True)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        # Slurm sends SIGTERM to every process, and torchrun sends it on to the same ones: that is the same request.
        elif "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
