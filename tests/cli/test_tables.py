"""Tables in narrow terminals and in pipes: names give way, figures never."""

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_folder

LONG = "Carabus (Megodontus) violaceus purpurascens x 174"
# All tables, of long names, with figures of every width.
SHOW_TABLES = """
import sys
from equipoise.cli.tables import FURTHER, print_metrics, print_plan, print_predictions
from equipoise.cli.main import main
from equipoise.deploy.predict import Predicted
import numpy as np

name, folder, columns = sys.argv[1], sys.argv[2], int(sys.argv[3])
figures = dict.fromkeys(("top1", "many", "medium", "few", *FURTHER.values()), 1.0) | {"per_class": [1.0, 0.125]}
figures |= {"intervals": {"top1": [0.8765, 1.0], "few": [0.25, 0.5]}, "per_class_intervals": [[0.0625, 0.9], None]}
results = [(f"{part} {which}", figures) for part in ("validation", "test") for which in ("last", "best")][:columns]
print_metrics(results, "accuracy", {"class_names": [name, "b"], "train_counts": [12345, 3]})
print_plan({"data": f"/{name}/{name}: 12,345 images", "batch": "64"})
shares = np.array([[1.0, 0.234]])
near = [[(name, name, 0.9876, 0)]]
print_predictions(Predicted((f"/{name}/1.png",), (name,), shares.astype(int) * 0, shares, (), near, {}, (None,)))
main(["data", folder])
"""


def show_tables(folder: Path, columns: int, width: int, terminal: bool) -> str:
    """What the tables look like in a terminal, or in a pipe, of that width."""
    words = [sys.executable, "-c", SHOW_TABLES, LONG, str(folder), str(columns)]
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm"}
    if not terminal:
        return subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, stdout=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # at the end of what a terminal says
            while part := os.read(ours, 65536):
                said += part
    os.close(ours)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).replace("\r", "")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "columns"), [(40, 2), (40, 4), (60, 4)])
def test_names_give_way_and_figures_never(width, columns, tmp_path):
    folder = draw_folder(tmp_path / "data", {LONG: 17, "b": 4})
    said = show_tables(folder, columns, width, terminal=True)
    words = re.split(r"[\s]+", said)
    for figure in ("12,348", "12,345", "64", "23.4", "0.988", "17", "4"):
        assert figure in words, figure
    assert words.count("100.0") == columns * 11 + 1, "overall, two groups, seven others, a class; a prediction"
    assert words.count("12.5") == columns
    assert not re.search(r"\d…", said)
    assert LONG not in said
    assert "87.6-100.0" not in said
    if (width, columns) != (40, 4):  # there even the figures need more
        assert max(map(len, said.splitlines())) <= width


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "width"), [(1, 80), (2, 100), (2, 80)])
def test_intervals_are_shown_where_no_figure_folds(columns, width, tmp_path):
    said = show_tables(draw_folder(tmp_path / "data", {LONG: 17, "b": 4}), columns, width, terminal=True)
    lines = [line.split() for line in said.splitlines()]
    assert max(map(len, said.splitlines())) <= width
    intervals = ("87.6-100.0", "25.0-50.0", "6.2-90.0") if (columns, width) != (2, 80) else ()
    assert ["overall", "(top-1)", "12,348", *["100.0", *intervals[:1]] * columns] in lines
    assert ["few", "(1", "class)", "fewer", "than", "20", *["100.0", *intervals[1:2]] * columns] in lines
    assert ["worst", "class", *["100.0"] * columns] in lines
    assert ["b", "3", *["12.5"] * columns] in lines
    assert said.count("6.2-90.0") == len(intervals[2:]) * columns


@pytest.mark.slow
def test_a_pipe_is_as_wide_as_it_must_be(tmp_path):
    said = show_tables(draw_folder(tmp_path / "data", {LONG: 17, "b": 4}), 4, 40, terminal=False)
    assert re.search(rf"^  {re.escape(LONG)} +12,345( +100\.0){{4}} *$", said, re.MULTILINE)
    assert f"/{LONG}/{LONG}: 12,345 images" in said
    assert re.search(rf"^  /{re.escape(LONG)}/1.png +{re.escape(LONG)} +100.0 +{re.escape(LONG)} 23.4 *$", said, re.M)
    assert re.search(rf"^{re.escape(LONG)} +17 █", said, re.MULTILINE)
