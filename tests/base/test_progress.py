"""Progress where the output is no terminal: plain lines."""

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
