"""`predict` and `export`, as a user types them."""

import csv
import json
import re
import shutil
import subprocess

import pytest
from conftest import ODD_NAMES, draw_picture

from equipoise.cli.main import main
from equipoise.cli.tables import FURTHER, print_metrics
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


def test_predict_writes_csv_and_json(odd_run, part_folder, tmp_path, capsys):
    arguments = ["predict", str(odd_run), str(part_folder), str(tmp_path / "absent.png")]
    assert main([*arguments, "--csv", str(tmp_path / "p.csv"), "--prior", "train", "--top", "9"]) == 0
    said = capsys.readouterr().out
    assert f"written: {tmp_path / 'p.csv'}" in said
    assert "class prior: train" in said
    assert ".png" not in said, "the file instead of the table"
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [{row[f"class_{rank}"] for rank in (1, 2, 3)} for row in rows] == [set(ODD_NAMES)] * 18
    assert main([*arguments, "--json", str(tmp_path / "p.json"), "--prior", "train"]) == 0
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


def refusal(capsys, *arguments: str) -> list[str]:
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("equipoise: ")
    return [line.removeprefix("equipoise: ") for line in said]


def test_nothing_predicted_is_an_error(odd_run, tmp_path, capsys):
    arguments = ["predict", str(odd_run), str(tmp_path / "absent.png"), "--csv", str(tmp_path / "p.csv")]
    first, last = refusal(capsys, *arguments)
    assert (
        first == f"passed over: {tmp_path}/absent.png cannot be read (no such file or directory); repair or remove it"
    )
    assert last == "nothing was predicted: no image could be read"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN", "IMAGES", "--top", "0"], "--top must be at least 1, not 0"),
        (["RUN", "IMAGES", "--top", "x"], "argument --top: invalid int value: 'x' (see equipoise predict --help)"),
        (["RUN", "IMAGES", "--csv", "no/x.csv"], "--csv must be a file in a folder that exists, not no/x.csv"),
        (["RUN", "IMAGES", "--json", "."], "--json must be a file in a folder that exists, not ."),
        (["RUN"], "the following arguments are required: IMAGES_OR_FOLDER (see equipoise predict --help)"),
        (["no", "IMAGES"], "there is no run folder or checkpoint at no"),
        (["RUN", "IMAGES", "--csv", "a", "--json", "b"], "argument --json: not allowed with argument --csv (see"),
        (["RUN", "IMAGES", "--prior", "even"], "--prior must be uniform, train, or a CSV or JSON file; even cannot be"),
    ],
)
def test_refusals_of_predict(arguments, sentence, odd_run, part_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(odd_run), "IMAGES": str(part_folder)}
    (said,) = refusal(capsys, "predict", *(places.get(argument, argument) for argument in arguments))
    assert said.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["best.pt", "recipe.toml", "metrics.json", "photo.png"])
def test_another_file_is_not_replaced(name, odd_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(odd_run, run)
    draw_picture(run / "photo.png", 0, 0)
    before = (run / name).read_bytes()
    (tmp_path / "mine.json").symlink_to(run / name)
    for file in (run / name, tmp_path / "mine.json"):
        (said,) = refusal(capsys, "predict", str(run), str(run / "photo.png"), "--json", str(file))
        assert said == f"--json would replace {file}, which is something else; name another file"
    (said,) = refusal(capsys, "report", str(run), "--out", str(run / name))
    assert said.startswith(f"--out would replace {run / name}, ")
    assert (run / name).read_bytes() == before


@pytest.mark.long
@pytest.mark.parametrize("form", ["onnx", "torch-export", "safetensors"])
def test_export_to_a_full_disk(form, odd_run, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this needs the right to mount a small disk")
    try:
        (said,) = refusal(capsys, "export", str(odd_run), "--to", form, "--out", str(disk / "model.onnx"))
        assert "no space left on device" in said.lower()
        assert str(disk / "model.onnx") in said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_numbers_stay_where_a_class_name_is_long(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    metrics = dict.fromkeys(("top1", "many", "medium", "few", *FURTHER.values()), 0.5) | {"per_class": [0.125, 0.875]}
    results = [("last checkpoint", metrics), ("best checkpoint", metrics)]
    print_metrics(results, "title", {"class_names": ["a very long name " * 8, "b"], "train_counts": [200, 3]})
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "tflite"], "argument --to: invalid choice: 'tflite'"),
        ([], "the following arguments are required: --to"),
        (
            ["--to", "safetensors", "--images", "x"],
            "--images goes with --to onnx or torch-export, not with safetensors",
        ),
        (["--to", "onnx", "--out", "no/x"], "--out must be a file in a folder that exists, not no/x"),
        (["--to", "safetensors", "--out", "no/x"], "--out must be in a folder that exists, not no/x"),
    ],
)
def test_refusals_of_export(arguments, sentence, odd_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (said,) = refusal(capsys, "export", str(odd_run), *arguments)
    assert said.startswith(sentence), said
    (said,) = refusal(capsys, "export", str(tmp_path), "--to", "onnx")
    assert said == f"{tmp_path} is no run folder: it has neither best.pt nor last.pt"
    assert list(tmp_path.iterdir()) == []
