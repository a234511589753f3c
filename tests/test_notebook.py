"""The notebook in examples/, run from its first cell to its last, but for the one that installs."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "equipoise_colab.ipynb"


@pytest.fixture
def clothes(shared_data, tmp_path) -> Path:
    """A zip file of a folder with a few photographs of each of four classes, with a long tail."""
    folder = tmp_path / "elsewhere" / "my clothes"
    for part, counts in {"train": (20, 10, 6, 4), "test": (4, 4, 4, 4)}.items():
        for name, count in zip(("t-shirt", "shoes", "hat", "skirt"), counts, strict=True):
            (folder / part / name).mkdir(parents=True)
            for file in sorted((shared_data / "clothing" / part / name).iterdir())[:count]:
                shutil.copy(file, folder / part / name)
    return Path(shutil.make_archive(str(tmp_path / "mine"), "zip", folder.parent, folder.name))


@pytest.mark.long
@pytest.mark.parametrize("pictures", ["digits", "clothes"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_the_notebook_runs(pictures, request, tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without what it printed"
    cells = {cell.id: cell for cell in notebook.cells}
    notebook.cells.remove(cells["install"])
    if pictures == "clothes":
        cells["where"].source = f"PICTURES = {str(request.getfixturevalue('clothes'))!r}"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the weights are those of the installed package
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()

    def said(name: str) -> str:
        outputs = cells[name].outputs
        return "".join(output.get("text", "") or output["data"].get("text/plain", "") for output in outputs)

    assert f"imbalance factor {50 if pictures == 'digits' else 5}" in said("pictures")
    assert "mean over classes" in said("train")
    assert "<iframe srcdoc=" in cells["report"].outputs[-1]["data"]["text/html"]
    assert said("predict").count("%") == 18
    assert "written: model.onnx" in said("export")
    assert (tmp_path / "model.onnx").stat().st_size > 10_000_000
