"""The experiments of the BCL authors, in miniature, by their commands and by ours."""

import json
import shutil

import numpy as np
import pytest
from conftest import refusal

from benchmarks.rehearsal import build_imagenet, rehearse, write_as_authors
from equipoise.cli.main import main
from equipoise.runs.checkpoint import load_checkpoint


@pytest.mark.long
def test_the_rehearsal(tmp_path):
    """Their three commands on miniature data sets, in processes of their own, with drawn pictures."""
    assert rehearse(tmp_path, None, size=32, epochs=2, encoders=("resnet50",)) >= 25


SMALL = ["-b", "4", "--set", "views.size=32", "--workers", "0", "--set", "model.feature_dim=16"]


@pytest.fixture(scope="module")
def imagenet_run(tmp_path_factory):
    """A finished run on a miniature ImageNet-LT, and its data."""
    data = build_imagenet(tmp_path_factory.mktemp("data") / "imagenet", counts=(8, 4))
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(data), "--out", str(out), "--epochs", "1", *SMALL]) == 0
    return out, data


def test_reload_and_evaluate_score_their_parts(imagenet_run, capsys):
    run_folder, data = imagenet_run
    metrics = json.loads((run_folder / "metrics.json").read_text())
    for flag, part in (("--reload", "test"), ("--evaluate", "validation")):
        arguments = ["train", "--data", str(data), "--arch", "resnet50", "--use-norm", "True", flag, "True"]
        assert main([*arguments, "--resume", str(run_folder / "best.pt")]) == 0
        written = run_folder / f"metrics-best-imagenet-{part}.json"
        assert f"written: {written}" in capsys.readouterr().out
        assert json.loads(written.read_text())[part] == metrics["best"][part]
    resumed = ["--reload", "--resume", str(run_folder / "best.pt")]
    assert "own data, whatever the recipe" in refusal(capsys, "train", "--dataset", "inat", *resumed)
    said = refusal(capsys, "train", "--data", str(data), "--arch", "resnext50", *resumed)
    assert f"{run_folder}/best.pt has model.encoder = " in said


def test_a_checkpoint_of_theirs_scores_the_same(imagenet_run, capsys, tmp_path):
    """The same logits, on the same data."""
    run_folder, data = imagenet_run
    theirs = write_as_authors(load_checkpoint(run_folder / "best.pt"), tmp_path / "theirs.pth.tar")
    ours = ["evaluate", str(run_folder / "best.pt"), "--data", str(data), "--logits", str(tmp_path / "ours.npz")]
    assert main([*ours, "--out", str(tmp_path / "ours.json")]) == 0
    arguments = ["evaluate", str(theirs), "--data", str(data), "--set", "views.size=32"]
    assert main([*arguments, "--logits", str(tmp_path / "theirs.npz"), "--out", str(tmp_path / "theirs.json")]) == 0
    with np.load(tmp_path / "ours.npz") as expected, np.load(tmp_path / "theirs.npz") as found:
        assert expected["logits"].shape == (6, 2)
        assert np.array_equal(expected["logits"], found["logits"])
        assert expected["labels"].tolist() == found["labels"].tolist() == [0, 0, 0, 1, 1, 1]
        assert found["class_names"].tolist() == ["n00000000", "n00000001"]
    of_theirs, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("theirs", "ours"))
    assert of_theirs["test"] == whole["test"]
    assert of_theirs["train_counts"] == [8, 4]
    assert refusal(capsys, "evaluate", str(theirs)).endswith("name the data with --data FOLDER")
    (data / "ImageNet_LT_train.txt").rename(tmp_path / "away.txt")
    try:
        assert main([*arguments, "--out", str(tmp_path / "alone.json")]) == 0
    finally:
        (tmp_path / "away.txt").rename(data / "ImageNet_LT_train.txt")
    alone = json.loads((tmp_path / "alone.json").read_text())["test"]
    assert (alone["many"], alone["few"], alone["prior_sweep"]) == (None, None, None)
    assert alone["top1"] == whole["test"]["top1"]
    assert "many, medium and few are not known" in capsys.readouterr().out


def test_data_names_lists_and_says_how_they_depart(capsys, tmp_path, shared_data):
    """A published list, and one that is not."""
    assert main(["data", str(shared_data / "lists" / "Places_LT_train.txt")]) == 0
    said = capsys.readouterr().out
    assert "the published Places_LT_train.txt (git blob 6392252f8ae867bc8a5e841cc1b29e5b8ef4b636)" in said
    assert "train: 62,500 images, 365 classes, imbalance factor 996" in said
    data = build_imagenet(tmp_path / "data", counts=(4, 3))
    assert main(["data", str(data)]) == 0
    assert "ImageNet_LT_train.txt is not the published ImageNet_LT_train.txt (git blob" in capsys.readouterr().out
    (tmp_path / "list.csv").write_text("a.jpg,3\n")
    assert "list.csv has no rows below its heading" in refusal(capsys, "data", str(tmp_path / "list.csv"))


@pytest.mark.long
def test_a_run_of_lists_is_scored_on_others(tmp_path, capsys):
    """On another tree with lists of its own, and on one list; whatever the lists were that it was trained by."""
    one, other = (build_imagenet(tmp_path / name, counts=(5, 4)) for name in ("one", "other"))
    lists = [f"--{part}-list={one / f'ImageNet_LT_{part}.txt'}" for part in ("train", "test")]
    arguments = ["--data", str(one), *lists, "--out", str(tmp_path / "run"), "--arch", "resnet8", "--method", "ce"]
    assert main(["train", "imagenet-lt", *arguments, *SMALL, "--epochs", "1"]) == 0
    shutil.move(one, tmp_path / "moved")
    expected = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(other), "--out", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["test"] == expected
    shutil.move(tmp_path / "moved", one)
    mine = tmp_path / "mine.txt"
    mine.write_text((one / "ImageNet_LT_test.txt").read_text().splitlines()[0] + "\n")
    assert main(["evaluate", str(tmp_path / "run"), "--test-list", str(mine), "--out", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["test"]["images"] == 1
