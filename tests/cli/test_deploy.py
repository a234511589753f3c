"""The words of `predict` and `export`, as a user types them."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess

import pytest
from conftest import ODD_NAMES, draw_picture

from equipoise.cli.main import main
from equipoise.cli.tables import FURTHER, print_figures
from equipoise.runs.checkpoint import load_checkpoint


@pytest.fixture
def part_folder(odd_run):
    return odd_run.parent / "data" / "test"


def test_predict_shows_a_table(odd_run, part_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert main(["predict", str(odd_run), str(part_folder), str(tmp_path / "broken.jpg"), "--top", "2"]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if ".png" in line]
    assert len(lines) == 18
    assert all(re.search(r"\.png +\S.* +\d+\.\d +\S.* \d+\.\d *$", line) for line in lines)
    assert any("<b>x & y<" in line for line in lines)
    temperature = json.loads((odd_run / "metrics.json").read_text())["best"]["temperature"]
    assert temperature is not None
    epoch = load_checkpoint(odd_run / "best.pt").epoch
    expected = f"best.pt, epoch {epoch}; class prior: uniform; calibrated (temperature {temperature:.3g})"
    assert expected in said.out
    assert re.search(r"18 images predicted in [\d.]+ s \([\d,]+ a second\), 1 passed over", said.out)
    reason = "it is no image: not JPEG, PNG, GIF, BMP, TIFF, WebP or PPM"
    assert said.err == f"passed over: {tmp_path}/broken.jpg cannot be read ({reason}); repair or remove it\n"


def test_predict_of_many_shows_some(odd_run, tmp_path, capsys):
    draw_picture(tmp_path / "0.png", 0, 0)
    for number in range(1, 50):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{number}.png")
    for number in range(25):
        (tmp_path / f"bad{number}.png").write_bytes(b"")
    assert main(["predict", str(odd_run), str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "(40 of 50 images; --csv FILE or --json FILE writes all of them)" in said.out
    assert said.err.count("passed over:") == 21
    assert "passed over: 5 more" in said.err


def test_predict_passes_over_what_is_no_file_in_one_line(odd_run, tmp_path, capsys, monkeypatch):
    draw_picture(tmp_path / "in" / "b.png", 0, 0)
    os.mkfifo(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "c.JPG").symlink_to("nothing")
    (tmp_path / "in" / "d.jpg").symlink_to("d.jpg")
    monkeypatch.chdir(tmp_path / "in")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("e.png")  # the name of a socket must be short
    (tmp_path / "in" / "folder.png").mkdir()
    (tmp_path / "in" / "link-to-picture.png").symlink_to("b.png")
    (tmp_path / "in" / "no-picture").symlink_to("nothing")
    words = ["predict", str(odd_run), str(tmp_path / "in"), "--json", str(tmp_path / "p.json")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"passed over: pipes, sockets, devices and links to nothing: 4 (first: {tmp_path}/in/a.png); remove them\n"
    )
    assert "2 images predicted in" in said.out
    assert "4 passed over" in said.out
    passed_over = json.loads((tmp_path / "p.json").read_text())["passed_over"]
    assert [line.partition(" ")[0].rpartition("/")[2] for line in passed_over] == ["a.png", "c.JPG", "d.jpg", "e.png"]


def test_predict_writes_csv_and_json(odd_run, part_folder, tmp_path, capsys):
    words = ["predict", str(odd_run), str(part_folder), str(tmp_path / "absent.png")]
    assert main([*words, "--csv", str(tmp_path / "p.csv"), "--prior", "train", "--top", "9"]) == 0
    said = capsys.readouterr().out
    assert f"written: {tmp_path / 'p.csv'}" in said
    assert "class prior: train" in said
    assert ".png" not in said, "the file instead of the table"
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [{row[f"class_{rank}"] for rank in (1, 2, 3)} for row in rows] == [set(ODD_NAMES)] * 18
    assert main([*words, "--json", str(tmp_path / "p.json"), "--prior", "train"]) == 0
    table = json.loads((tmp_path / "p.json").read_text())
    assert table["prior"] == "train"
    assert table["passed_over"] == [
        f"{tmp_path}/absent.png cannot be read (no such file or directory); repair or remove it"
    ]
    for row, entry in zip(rows, table["predictions"], strict=True):
        assert row["file"] == entry["file"]
        assert row["class_1"] == entry["classes"][0]["class"]
        assert float(row["probability_1"]) == entry["classes"][0]["probability"]


def test_without_a_temperature_it_is_said(odd_run, part_folder, tmp_path, capsys):
    shutil.copy(odd_run / "best.pt", tmp_path / "best.pt")
    assert main(["predict", str(tmp_path), str(part_folder)]) == 0
    assert (
        "not calibrated: plain softmax, since there is no validation part, or it fits no temperature"
        in capsys.readouterr().out
    )


def refusal(capsys, *words: str) -> list[str]:
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("equipoise: ")
    return [line.removeprefix("equipoise: ") for line in said]


def test_nothing_predicted_is_an_error(odd_run, tmp_path, capsys):
    words = ["predict", str(odd_run), str(tmp_path / "absent.png"), "--csv", str(tmp_path / "p.csv")]
    first, last = refusal(capsys, *words)
    assert (
        first == f"passed over: {tmp_path}/absent.png cannot be read (no such file or directory); repair or remove it"
    )
    assert last == "nothing was predicted: no image could be read"
    assert list(tmp_path.iterdir()) == []


def test_refusals_of_predict(odd_run, part_folder, tmp_path, capsys):
    run, images = str(odd_run), str(part_folder)
    for words, sentence in (
        ([run, images, "--top", "0"], "--top must be at least 1, not 0"),
        ([run, images, "--top", "x"], "argument --top: invalid int value: 'x' (see equipoise predict --help)"),
        (
            [run, images, "--csv", f"{tmp_path}/a/b"],
            f"--csv must be a file in a folder that is there, not {tmp_path}/a/b",
        ),
        ([run, images, "--json", str(tmp_path)], f"--json must be a file in a folder that is there, not {tmp_path}"),
        ([run], "the following arguments are required: IMAGES_OR_FOLDER (see equipoise predict --help)"),
        ([str(tmp_path / "no"), images], f"there is no run folder or checkpoint at {tmp_path}/no"),
        ([run, images, "--csv", "a", "--json", "b"], "argument --json: not allowed with argument --csv (see equipoise"),
        (
            [run, images, "--prior", "even"],
            "--prior must be uniform, train, or a CSV or JSON file; even cannot be read",
        ),
    ):
        (said,) = refusal(capsys, "predict", *words)
        assert said.startswith(sentence)


def test_a_pipe_is_not_replaced(odd_run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (said,) = refusal(capsys, "predict", str(odd_run), str(odd_run.parent / "data"), "--csv", str(tmp_path / "pipe"))
    assert said == f"--csv must be a file in a folder that is there, not {tmp_path / 'pipe'}"
    assert (tmp_path / "pipe").is_fifo()


def test_links_that_lead_nowhere(odd_run, tmp_path, capsys):
    (tmp_path / "broken.json").symlink_to(tmp_path / "no" / "x.json")
    (tmp_path / "circle.json").symlink_to("circle.json")
    for flag, words in {"--json": ["predict", str(odd_run), str(odd_run)], "--out": ["report", str(odd_run)]}.items():
        (said,) = refusal(capsys, *words, flag, str(tmp_path / "broken.json"))
        assert said == f"{flag} must be a file in a folder that is there, not {tmp_path / 'broken.json'}"
    (said,) = refusal(capsys, "export", str(odd_run), "--to", "safetensors", "--out", str(tmp_path / "broken.json"))
    assert said.startswith(f"{tmp_path / 'broken.json'} exists and is not empty; name another folder")
    picture = tmp_path / "photo.png"
    draw_picture(picture, 0, 0)
    assert main(["predict", str(odd_run), str(picture), "--json", str(tmp_path / "circle.json")]) == 0
    assert not (tmp_path / "circle.json").is_symlink()


def test_a_link_to_something_else_does_not_replace_it(odd_run, tmp_path, capsys):
    before = (odd_run / "metrics.json").read_bytes()
    (tmp_path / "mine.json").symlink_to(odd_run / "metrics.json")
    (said,) = refusal(capsys, "predict", str(odd_run), str(odd_run), "--json", str(tmp_path / "mine.json"))
    assert said == f"--json would replace {tmp_path / 'mine.json'}, which is something else; name another file"
    assert (odd_run / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("name", ["best.pt", "recipe.toml", "metrics.json", "observed.npz", "photo.png"])
def test_what_something_else_is_in_is_not_replaced(name, odd_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(odd_run, run)
    draw_picture(run / "photo.png", 0, 0)
    before = (run / name).read_bytes()
    (said,) = refusal(capsys, "predict", str(run), str(run / "photo.png"), "--json", str(run / name))
    assert said == f"--json would replace {run / name}, which is something else; name another file"
    (said,) = refusal(capsys, "report", str(run), "--out", str(run / name))
    assert said.startswith(f"--out would replace {run / name}, ")
    assert (run / name).read_bytes() == before


@pytest.mark.parametrize("weights", [(1e308, 1e308, 1e308), (3, 1e300, 1e308), (1e-320, 1e-320, 0)])
def test_priors_of_any_scale(weights, odd_run, tmp_path):
    (tmp_path / "prior.json").write_text(json.dumps(dict(zip(ODD_NAMES, weights, strict=True))))
    draw_picture(tmp_path / "photo.png", 0, 0)
    words = ["--prior", str(tmp_path / "prior.json"), "--json", str(tmp_path / "out.json")]
    assert main(["predict", str(odd_run), str(tmp_path / "photo.png"), *words]) == 0
    (image,) = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert sum(found["probability"] for found in image["classes"]) == pytest.approx(
        1, abs=1e-5
    )  # each has six decimals


@pytest.mark.parametrize("form", ["onnx", "torch-export", "safetensors"])
def test_export_to_a_full_disk(form, odd_run, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("this needs the right to mount a small disk")
    try:
        (said,) = refusal(capsys, "export", str(odd_run), "--to", form, "--out", str(disk / "model.onnx"))
        assert "no space left on device" in said.lower()
        assert str(disk / "model.onnx") in said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_figures_stay_where_a_class_name_is_long(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    figures = dict.fromkeys(("top1", "many", "medium", "few", *FURTHER.values()), 0.5) | {"per_class": [0.125, 0.875]}
    results = [("last checkpoint", figures), ("best checkpoint", figures)]
    print_figures(results, "title", {"class_names": ["a very long name " * 8, "b"], "train_counts": [200, 3]})
    said = capsys.readouterr().out
    assert [line.split()[-2:] for line in said.splitlines() if "very" in line or " b " in line] == [
        ["12.5", "12.5"],
        ["87.5", "87.5"],
    ]
    assert "fewer than 20" in said
    assert max(map(len, said.splitlines())) <= 80


def test_export_writes_beside_the_checkpoint(odd_run, tmp_path, capsys):
    """Each form, by its default name; the safetensors folder can be exported and predicted with in turn."""
    run = tmp_path / "run"
    shutil.copytree(odd_run, run)
    for form, name in (("onnx", "best.onnx"), ("torch-export", "best.pt2"), ("safetensors", "best-safetensors")):
        assert main(["export", str(run), "--to", form]) == 0
        said = capsys.readouterr().out
        assert said.endswith(f"written: {run / name}\n")
        assert (run / name).exists()
        checked = "checked on 16 images: no score differs from the model's by more than" in said
        assert checked == (form != "safetensors")
    images = str(odd_run.parent / "data" / "val")
    folder, out = str(run / "best-safetensors"), str(tmp_path / "again.onnx")
    assert main(["export", folder, "--to", "onnx", "--images", images, "--out", out]) == 0
    assert main(["predict", folder, images]) == 0
    assert "best-safetensors, epoch" in capsys.readouterr().out
    assert main(["export", str(run / "last.pt"), "--to", "torch-export"]) == 0
    assert (run / "last.pt2").is_file()
    (said,) = refusal(capsys, "export", str(run), "--to", "safetensors")
    assert said == f"{run / 'best-safetensors'} exists and is not empty; name another folder with --out"


def test_refusals_of_export(odd_run, tmp_path, capsys):
    for words, sentence in (
        (["--to", "tflite"], "argument --to: invalid choice: 'tflite'"),
        ([], "the following arguments are required: --to"),
        (
            ["--to", "safetensors", "--images", "x"],
            "--images goes with --to onnx or torch-export, not with safetensors",
        ),
        (
            ["--to", "onnx", "--out", f"{tmp_path}/a/b"],
            f"--out must be a file in a folder that is there, not {tmp_path}/a/b",
        ),
        (
            ["--to", "safetensors", "--out", f"{tmp_path}/a/b"],
            f"--out must be in a folder that is there, not {tmp_path}/a/b",
        ),
        (["--to", "authors"], "the BCL authors' code knows resnet50 and resnext50, not resnet8; nothing was written"),
    ):
        (said,) = refusal(capsys, "export", str(odd_run), *words)
        assert said.startswith(sentence), said
    assert list(tmp_path.iterdir()) == []
    (said,) = refusal(capsys, "export", str(tmp_path), "--to", "onnx")
    assert said == f"{tmp_path} is no run folder: it has neither best.pt nor last.pt"
