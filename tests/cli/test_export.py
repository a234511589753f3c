"""`equipoise export`: its files, their names, and what is refused."""

import shutil
import subprocess

import pytest
from conftest import refusal

from equipoise.cli.main import main


@pytest.fixture
def run(odd_run, tmp_path):
    return shutil.copytree(odd_run, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("form", ["onnx", "torch-export", "safetensors"])
def test_export_to_a_full_disk(form, odd_run, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this needs the right to mount a small disk")
    try:
        out = str(disk / "model.onnx" if form == "onnx" else disk / "model")
        said = refusal(capsys, "export", str(odd_run), "--to", form, "--out", out)
        assert "no space left on device" in said.lower()
        assert out in said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_export_writes_beside_the_checkpoint(run, odd_run, tmp_path, capsys):
    """Each form, by its default name; the safetensors folder can be exported and predicted with in turn."""
    for form, name in (("onnx", "best.onnx"), ("torch-export", "best.pt2"), ("safetensors", "best-safetensors")):
        assert main(["export", str(run), "--to", form]) == 0
        said = capsys.readouterr().out
        assert said.endswith(f"written: {run / name}\n")
        assert (run / name).exists()
        assert ("checked on 16 made-up images: scores differ from the model's by" in said) == (form != "safetensors")
    images = str(odd_run.parent / "data" / "val")
    folder, out = str(run / "best-safetensors"), str(tmp_path / "again.onnx")
    assert main(["export", folder, "--to", "onnx", "--out", out]) == 0
    assert main(["predict", folder, images]) == 0
    assert "best-safetensors, epoch" in capsys.readouterr().out
    assert main(["export", str(run / "last.pt"), "--to", "torch-export"]) == 0
    assert (run / "last.pt2").is_file()
    said = refusal(capsys, "export", str(run), "--to", "safetensors")
    assert said.endswith("best-safetensors could not be written (directory not empty); name another folder with --out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "tflite"], "argument --to: invalid choice: 'tflite'"),
        (["--to", "onnx", "--out", "no/x"], "--out must be a new file or a .onnx file"),
        (["--to", "safetensors", "--out", "no/x"], "no/x could not be written (no such file or directory)"),
    ],
)
def test_refusals_of_export(arguments, sentence, odd_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "export", str(odd_run), *arguments)
    assert said.startswith(sentence), said
    said = refusal(capsys, "export", str(tmp_path), "--to", "onnx")
    assert said == f"there is no run folder or checkpoint at {tmp_path}"
    assert list(tmp_path.iterdir()) == []
