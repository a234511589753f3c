"""`predict`, `export` and other commands on a finished run, as a user types them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ODD_NAMES, draw_folder, draw_picture, refusal
from synthetic import untrained

from benchmarks.rehearsal import write_as_authors
from equipoise import load_recipe, train
from equipoise.base.errors import one_line
from equipoise.cli.main import main
from equipoise.runs.checkpoint import load_checkpoint


@pytest.fixture
def run(odd_run, tmp_path):
    return shutil.copytree(odd_run, tmp_path / "run")


@pytest.fixture
def part_folder(odd_run):
    return odd_run.parent / "data" / "test"


def test_predict_shows_a_table(odd_run, part_folder, tmp_path, capsys, monkeypatch):
    """In a pipe, a line an image, however long its path."""
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert main(["predict", str(odd_run), str(part_folder), str(tmp_path / "broken.jpg"), "--top", "2"]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if ".png" in line]
    assert len(lines) == 18
    assert all(re.search(r"\.png +\S.* +\d+\.\d +\S.* \d+\.\d *$", line) for line in lines)
    assert any("<b>x & y<" in line for line in lines)
    best = json.loads((odd_run / "metrics.json").read_text())["best"]
    calibration = f"calibrated (temperature {best['temperature']:.3g})"
    assert f"best.pt, best checkpoint (epoch {best['epoch']}), which validation chose\n" in said.out
    assert f"\nclass prior: uniform; {calibration}\n" in said.out
    assert "18 images predicted, 1 passed over" in said.out
    assert said.err.startswith(f"passed over: {tmp_path}/broken.jpg cannot be read (it is empty: 0 bytes)")


def test_predict_writes_csv_and_json(odd_run, part_folder, tmp_path, capsys):
    arguments = ["predict", str(odd_run), str(part_folder), str(tmp_path / "absent.png")]
    assert main([*arguments, "--csv", str(tmp_path / "p.csv"), "--prior", "train", "--top", "9"]) == 1
    said = capsys.readouterr().out
    assert "class prior: train" in said
    assert ".png" not in said, "the file instead of the table"
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [{row[f"class_{rank}"] for rank in (1, 2, 3)} for row in rows] == [set(ODD_NAMES)] * 18
    assert main([*arguments, "--json", str(tmp_path / "p.json"), "--prior", "train"]) == 1
    table = json.loads((tmp_path / "p.json").read_text())
    assert table["prior"] == "train"
    assert table["passed_over"] == [f"{tmp_path}/absent.png cannot be read (no such file or directory)"]
    for row, entry in zip(rows, table["predictions"], strict=True):
        assert row["file"] == entry["file"]
        assert row["class_1"] == entry["classes"][0]["class"]
        assert float(row["probability_1"]) == entry["classes"][0]["probability"]


def test_predict_estimates_the_prior(odd_run, part_folder, tmp_path, capsys):
    arguments = ["predict", str(odd_run), str(part_folder / ODD_NAMES[2]), "--prior", "estimate"]
    assert main([*arguments, "--json", str(tmp_path / "p.json")]) == 0
    said = capsys.readouterr().out
    estimated = json.loads((tmp_path / "p.json").read_text())["estimated_prior"]
    assert sum(estimated.values()) == pytest.approx(1)
    shares = {name: f"{one_line(name)} {100 * share:.1f}" for name, share in estimated.items()}
    assert said.count("estimated class shares in percent, training in brackets: ") == 1
    for name, count in zip(ODD_NAMES, (30, 12, 5), strict=True):
        assert f"{shares[name]} ({100 * count / 47:.1f})" in said


def test_predict_explains(odd_run, part_folder, tmp_path, capsys, monkeypatch):
    """In the table, as CSV and as JSON the same nearest training images, with their classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = odd_run.parent / "data" / "train"
    arguments = ["predict", str(odd_run), str(part_folder), "--top", "1", "--explain", "2"]
    assert main([*arguments, "--csv", "-"]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(said.out.splitlines(keepends=True)))
    assert len(rows) == 18, "progress is said elsewhere"
    assert "features of the encoder" in said.err
    assert list(rows[0])[3:-1] == [f"neighbour{of}_{rank}" for rank in (1, 2) for of in ("", "_class", "_cosine")]
    assert main([*arguments, "--json", str(tmp_path / "p.json")]) == 0
    assert "features of the encoder" not in "".join(capsys.readouterr()), "they are kept"
    for row, entry in zip(rows, json.loads((tmp_path / "p.json").read_text())["predictions"], strict=True):
        for rank, near in enumerate(entry["neighbours"], 1):
            assert near["class"] == row[f"neighbour_class_{rank}"] == Path(near["file"]).parent.name
            assert near["file"] == row[f"neighbour_{rank}"]
            assert Path(near["file"]).is_relative_to(train)
            assert near["cosine"] == float(row[f"neighbour_cosine_{rank}"])
        assert len(entry["neighbours"]) == 2
        assert 1 >= entry["neighbours"][0]["cosine"] >= entry["neighbours"][1]["cosine"]
    assert main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " near " in line]
    assert len(lines) == 2 * 18
    first = f"near {' '.join(rows[0]['neighbour_1'].split())} "
    assert " ".join(lines[0]).startswith(first)
    assert " ".join(lines[0]).endswith(f"cosine {float(rows[0]['neighbour_cosine_1']):.3f}")


def test_what_cannot_be_explained(run, part_folder, tmp_path, capsys):
    """A hub folder, a checkpoint of the authors', and a run whose training images are gone or are others."""
    assert main(["export", str(run), "--to", "safetensors"]) == 0
    theirs = write_as_authors(untrained((1, 1, 1)), tmp_path / "theirs.pth.tar")
    capsys.readouterr()
    for target in (run / "best-safetensors", theirs):
        said = refusal(capsys, "predict", str(target), str(part_folder), "--explain", "2")
        assert said == f"{target} does not say what it was trained on, which explains it; name a run folder"
    checkpoint = load_checkpoint(run / "best.pt")
    data = shutil.copytree(part_folder.parent, tmp_path / "data")
    moved = replace(checkpoint.recipe, data=replace(checkpoint.recipe.data, path=str(data)))
    replace(checkpoint, recipe=moved).save(run / "best.pt")
    (data / "train" / ODD_NAMES[0] / "0.png").unlink()
    words = "predict", str(run), str(part_folder), "--explain", "2"
    said = refusal(capsys, *words)
    assert said.startswith(f"without its training images nothing explains {run}/best.pt: the train part of {data} is")
    shutil.rmtree(data)
    said = refusal(capsys, *words)
    assert said.endswith(f"nothing explains {run}/best.pt: there is no file or folder at {data}")
    assert main(list(words[:-2])) == 0


def test_evaluate_where_there_is_nothing_to_score(tmp_path, capsys):
    data = draw_folder(tmp_path / "data", {"ant": 6, "bee": 4})
    recipe = load_recipe("digits-lt", data=str(data), epochs=1, batch_size=4, holdout=0, imbalance_factor=1)
    run = train(recipe, tmp_path / "run", progress=False).path
    assert main(["evaluate", str(run)]) == 0
    assert "training: " in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["validation"], metrics["test"]) == (None, None)


def test_evaluate_under_other_class_priors(run, part_folder, tmp_path, capsys):
    """What is shown is what is written; the uniform row of this run is its accuracy, as BCL's logits are for it."""
    assert main(["evaluate", str(run), "--label-shift"]) == 0
    said = capsys.readouterr().out
    table = json.loads((run / "metrics-best-test.json").read_text())
    rows = {row["prior"]: row for row in table["label_shift"]}
    assert len(rows) == 31
    few = table["test"]["calibration"]["few"]
    shown = f"{100 * few['classwise_ece']:.2f} +{few['nll']:.3f} +{few['brier']:.3f}"
    assert re.search(rf"\n +few +{shown} *\n", said)
    assert rows["uniform"]["unknown"] == rows["uniform"]["known"] == pytest.approx(table["test"]["mean_per_class"])
    for name in ("forward 50", "backward 2"):
        unknown, known = (f"{100 * rows[name][key]:.1f}" for key in ("unknown", "known"))
        assert re.search(rf"{name} +{unknown} +{known} *\n", said)
    lowest = min(row["known"] for name, row in rows.items() if name.startswith("draw"))
    assert re.search(rf"20 draws, lowest .* {100 * lowest:.1f} *\n", said)
    theirs = write_as_authors(untrained((1, 1, 1)), tmp_path / "x.pth.tar")
    words = "evaluate", str(theirs), "--data", str(part_folder), "--label-shift"
    assert refusal(capsys, *words).startswith(f"{theirs} does not say how many training images each class had")


def command(*words: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """`equipoise` in a process of its own, with real pipes."""
    started = [sys.executable, "-m", "equipoise", *map(str, words)]
    return subprocess.run(started, check=False, capture_output=True, **options)


def test_lists_and_pipes(odd_run, part_folder, tmp_path):
    """Names come in by a list or a pipe, predictions go out by a pipe, and nothing else does."""
    (tmp_path / "here").mkdir()
    for number, name in enumerate((b"a b.png", b"\xff.png", b"c.png")):
        draw_picture(tmp_path / "here" / os.fsdecode(name), 0, number)
    (tmp_path / "list.txt").write_bytes(b"here/a b.png\r\nhere/\xff.png\n\nhere/c.png")
    by_list = command("predict", odd_run, "--list", "list.txt", "--csv", "-", cwd=tmp_path)
    assert by_list.returncode == 0, by_list.stderr
    rows = list(csv.reader(by_list.stdout.decode().splitlines()))
    assert [row[0] for row in rows] == ["file", "here/a b.png", r"here/\udcff.png", "here/c.png"]
    assert b"3 images predicted" in by_list.stderr
    named = ("here/a b.png", "missing.png", part_folder)
    by_pipe = command(
        "predict", odd_run, "--list", "-", "--json", "-", cwd=tmp_path, input="\n".join(map(str, named)).encode()
    )
    assert by_pipe.returncode == 1
    table = json.loads(by_pipe.stdout)
    assert len(table["predictions"]) == 1 + 18
    assert table["passed_over"] == ["missing.png cannot be read (no such file or directory)"]
    assert table["checkpoint"].startswith("best checkpoint (epoch ")
    said = by_pipe.stderr.decode().splitlines()
    assert said[0] == "passed over: missing.png cannot be read (no such file or directory)"
    assert said[-1] == "19 images predicted, 1 passed over"
    assert not (tmp_path / "-").exists()


def test_why_probabilities_are_not_calibrated(run, part_folder, tmp_path, capsys):
    """The reason is the one that holds."""

    def reason(target: Path) -> str:
        assert main(["predict", str(target), str(part_folder)]) == 0
        return re.findall(r"class prior: uniform; not calibrated: (.*)", capsys.readouterr().out)[0]

    file = run / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["best"]["temperature"] = None
    file.write_text(json.dumps(metrics))
    assert reason(run) == "no temperature fits the validation part best"
    assert main(["export", str(run), "--to", "safetensors"]) == 0
    assert reason(run / "best-safetensors") == f"{run}/best-safetensors holds no temperature"
    metrics["best"]["validation"] = None
    file.write_text(json.dumps(metrics))
    assert reason(run) == "there was no validation part to fit a temperature"
    metrics["best"]["step"] += 1
    file.write_text(json.dumps(metrics))
    assert reason(run) == f"{file} is missing, or of another step; equipoise evaluate {run} writes it"
    (run / "best.pt").rename(tmp_path / "mine.pt")
    assert reason(tmp_path / "mine.pt") == f"{tmp_path}/mine.pt holds no temperature"


def test_one_checkpoint_speaks_for_a_run(run, odd_run, part_folder, tmp_path, capsys):
    """The best, which is another than the last, wherever one is asked for; and every help says so."""
    metrics = json.loads((run / "metrics.json").read_text())
    best, last = metrics["best"], metrics["last"]
    assert best["test"]["top1"] != last["test"]["top1"]

    def said(*words: object) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 0
        return capsys.readouterr().out

    chose = f"best checkpoint (epoch {best['epoch']}), which validation chose"
    assert f"bcl, best.pt, {chose}: accuracy, percent" in said("evaluate", run, "--data", part_folder)
    assert json.loads((run / "metrics-best-test-test.json").read_text())["test"]["top1"] == best["test"]["top1"]
    assert f"best.pt, {chose}\n" in said("predict", run, part_folder)
    assert f"best.pt, {chose}\n" in said("export", run, "--to", "safetensors")
    columns = f"last is the checkpoint after epoch {last['epoch']}, best the one after epoch {best['epoch']}"
    assert f"bcl: {columns}, which validation chose: it speaks for the run" in said("evaluate", run)
    of_last = f"last.pt, last checkpoint (epoch {last['epoch']}; best.pt is another, which validation chose)"
    assert of_last in said("predict", run / "last.pt", part_folder)
    for words in ("evaluate", "report", "predict", "export"):
        with pytest.raises(SystemExit):
            main([words, "--help"])
        assert "the best checkpoint where validation chose one, else the last" in " ".join(
            capsys.readouterr().out.split()
        )


def test_nothing_predicted_is_an_error(odd_run, tmp_path, capsys):
    """Of the files that are passed over, twenty are named."""
    files = [str(tmp_path / f"{number}.png") for number in range(22)]
    assert main(["predict", str(odd_run), *files, "--csv", str(tmp_path / "p.csv")]) == 2
    *lines, more, last = capsys.readouterr().err.splitlines()
    assert lines == [f"passed over: {file} cannot be read (no such file or directory)" for file in files[:20]]
    assert (more, last) == ("and 2 more", "equipoise: nothing was predicted: 22 files passed over")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN", "IMAGES", "--top", "0"], "--top must be at least 1, not 0"),
        (["RUN", "IMAGES", "--explain", "0"], "--explain must be at least 1, not 0"),
        (["RUN", "IMAGES", "--top", "x"], "argument --top: invalid int value: 'x' (see equipoise predict --help)"),
        (
            ["RUN", "IMAGES", "--csv", "no/x"],
            "--csv must be a new file or a .csv file, in a folder that may be written",
        ),
        (
            ["RUN", "IMAGES", "--json", "."],
            "--json must be a new file or a .json file, in a folder that may be written",
        ),
        (["no", "IMAGES"], "there is no run folder or checkpoint at no"),
        (["RUN", "IMAGES", "--csv", "a", "--json", "b"], "argument --json: not allowed with argument --csv (see"),
        (["RUN"], "no images are named: name files, folders, or a list of them with --list FILE"),
        (["RUN", "--list", "no.txt"], "--list no.txt cannot be read (no such file or directory); name a file with one"),
        (["RUN", "--list", os.devnull], f"--list {os.devnull} is empty; it should have one path a line"),
        (
            ["RUN", "IMAGES", "--prior", "even"],
            "--prior is uniform, train, estimate, or a CSV file of classes and their",
        ),
    ],
)
def test_refusals_of_predict(arguments, sentence, odd_run, part_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(odd_run), "IMAGES": str(part_folder)}
    said = refusal(capsys, "predict", *(places.get(argument, argument) for argument in arguments))
    assert said.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["best.pt", "recipe.toml", "photo.png"])
def test_a_file_of_another_kind_is_not_replaced(name, run, tmp_path, capsys):
    draw_picture(run / "photo.png", 0, 0)
    before = (run / name).read_bytes()
    (tmp_path / "mine.json").symlink_to(run / name)
    for file in (run / name, tmp_path / "mine.json"):
        said = refusal(capsys, "predict", str(run), str(run / "photo.png"), "--json", str(file))
        assert said.startswith("--json must be a new file or a .json file")
    assert refusal(capsys, "report", str(run), "--out", str(run / name)).startswith(
        "--out must be a new file or a .html"
    )
    assert (run / name).read_bytes() == before
