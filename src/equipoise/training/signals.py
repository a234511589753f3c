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
        self._asked: dict[str, int] = dict.fromkeys(("save", *_STOPPING.values()), 0)
        self._before: dict[int, Any] = {}
        self._stopping = False
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
        """How often each thing was asked for since the last time; `save` asks for that too. Ranks add up their votes,
        and all `read` the sum."""
        # Two names change hands at once: a signal between two lines would be lost.
        asked, self._asked = self._asked, dict.fromkeys(self._asked, 0)
        return [asked.pop("save") + save, *asked.values()]

    @staticmethod
    def read(votes: list[float]) -> tuple[bool, str | None]:
        """Whether to save now, and how the run was stopped if it was."""
        save, interrupted, terminated = votes
        how = "terminated" if terminated else "interrupted" if interrupted else None
        return bool(save) or how is not None, how

    def leave_if_stopped(self, state: str, resume_command: str) -> None:
        """Raise Stopped if this process was asked to stop and has not voted on it yet. All is saved already."""
        for how in _STOPPING.values():
            if self._asked[how]:
                raise Stopped(how, state, resume_command)

    def stop_at_once(self, state: str, resume_command: str) -> None:
        """From now on there is nothing to save: a signal ends the run at once, in this state."""
        self._at_once = state, resume_command
        self.leave_if_stopped(state, resume_command)

    def _handle(self, number: int, _: FrameType | None) -> None:
        how = _STOPPING.get(number)
        if how is None:
            self._asked["save"] += 1
        elif self._stopping:
            # Slurm sends SIGTERM to every process, and torchrun sends it on to the same ones: that is the same request.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        else:
            self._stopping = True
            if self._at_once is not None:
                raise Stopped(how, *self._at_once)
            self._asked[how] += 1
            if os.environ.get("RANK", "0") == "0":
                print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr, flush=True)
