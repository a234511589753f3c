"""Progress where the output is no terminal: plain lines."""

from equipoise.base.progress import ProgressLine, counted


def test_items_are_counted(capsys):
    assert list(counted("abc", 3, "looking")) == ["a", "b", "c"]
    assert capsys.readouterr().out == "looking: 3 of 3 images\n"


def test_the_last_step_has_a_line(capsys):
    for shown in (True, False):
        line = ProgressLine(done=2, steps=4, epochs=2, shown=shown)
        for step in (3, 4):
            line.update(step, 1, {"loss": 1.5}, 1200.0)
        line.close()
    said = capsys.readouterr().out
    assert said.startswith("step 4/4  epoch 2/2  loss 1.500  1,200 images/s")
    assert said.count("\n") == 1
