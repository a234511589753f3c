"""Progress where the output is no terminal: plain lines; and in one."""

import contextlib
import os
import pty
import re
import subprocess
import sys

from equipoise.base import progress
from equipoise.base.progress import ProgressLine, counted


def test_the_last_step_has_a_line(capsys):
    for shown in (True, False):
        line = ProgressLine(done=2, total=4, unit="step", shown=shown)
        for step in (3, 4):
            line.update(step, "loss 1.500")
        line.close()
    assert list(counted("abc", 3, "looking")) == ["a", "b", "c"]
    said = "step 4/4  loss 1.500  0:00:00 left\nimage 3/3  looking  0:00:00 left\n"
    assert capsys.readouterr().out == said


IN_A_TERMINAL = """
import sys
from equipoise.base.progress import ProgressLine
line = ProgressLine(done=0, total=2, unit="step")
line.update(2, "loss 1.500")
line.close()
"""


def in_a_terminal(**environment: str) -> str:
    """What a progress line writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
    with subprocess.Popen([sys.executable, "-c", IN_A_TERMINAL], stdout=theirs, env=environment):
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 4096):
                said += piece
    os.close(ours)
    return said.decode()


COLOUR = r"\x1b\[[\d;]*3\dm"


def test_a_terminal_has_colours_unless_it_is_asked_for_none():
    said = in_a_terminal(TERM="xterm-256color")
    assert re.search(COLOUR, said)
    assert "step 2/2  loss 1.500" in said
    said = in_a_terminal(TERM="xterm-256color", NO_COLOR="1")
    assert "step 2/2  loss 1.500" in said
    assert not re.search(COLOUR, said)
    assert in_a_terminal(TERM="dumb") == "step 2/2  loss 1.500  0:00:00 left\r\n"


def test_quiet_is_without_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, "quiet", True)
    assert list(counted("abc", 3, "looking")) == ["a", "b", "c"]
    progress.say("it begins")
    assert capsys.readouterr().out == ""
