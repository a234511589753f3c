"""The command line, as a user types it: in a process of its own where that matters."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import draw_folder, draw_picture, refusal

from benchmarks.rehearsal import build_imagenet, build_inaturalist, rehearse
from equipoise import load_recipe
from equipoise.cli.main import main
from equipoise.config.recipe import recipe_fields, shipped_recipes
from equipoise.runs.checkpoint import load_checkpoint


def run(*words: str, cwd=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "equipoise", *words],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "100"}, check=False,
    )  # fmt: skip


def test_help_is_instant_and_imports_nothing_heavy():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert "train a classifier" in run("--help").stdout
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    heavy = "{'torch', 'numpy', 'PIL', 'rich', 'jinja2', 'scipy'}"
    code = f"import sys, equipoise.cli.main as cli; cli.main(['recipes']); print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "set()"


def test_train_help_shows_every_field_with_the_recipes_value():
    text = run("train", "cifar10-lt", "--help").stdout
    for field in recipe_fields():
        if field.key not in ("name", "summary"):
            assert f"--{field.names[0]} " in text, field.key
    assert "peak learning rate of SGD [0.15]" in text


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(load_recipe(line.split()[0]).summary in line for line in lines)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"equipoise \d+\.\d+\.\d+\n", capsys.readouterr().out)


# ---- train


@pytest.mark.slow
def test_train_without_arguments_is_the_demo(tmp_path):
    """Shortened by flags; the run folder is the default one."""
    done = run("train", "--epochs", "2", "--log_every=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for said in ("no recipe named: taking 'digits-lt'", "342 to train on, 500 for test", "imbalance factor 62"):
        assert said in text
    assert "2 epochs of 6: 12 steps of 64 images" in text
    assert re.search(r"step 12/12 +epoch 2/2 +loss \d.* contrastive \d.* images/s +0:00:00 left", text)
    assert re.search(r"training *\n +images +bcl +ce", text)
    assert re.search(r"few \(5 classes\) +fewer than 20 +[\d.]+ +[\d.]+", text)
    assert re.search(r"^ +9 +2 +[\d.]+ +[\d.]+", text, re.MULTILINE), "each class with its training count"
    folders = [line.removeprefix("run folder: ") for line in text.splitlines() if line.startswith("run folder: ")]
    assert [re.sub(r"\d{8}-\d{6}", "TIME", folder) for folder in folders] == [
        "runs/digits-lt-bcl-TIME", "runs/digits-lt-ce-TIME",
    ]  # fmt: skip
    metrics = json.loads((tmp_path / folders[0] / "metrics.json").read_text())
    assert metrics["method"] == "bcl"
    assert json.loads((tmp_path / folders[0] / "run.json").read_text())["command"].endswith("--log_every=5")
    report = tmp_path / folders[0] / "report.html"
    assert text.splitlines()[-1] == f"report: {report.relative_to(tmp_path)}"
    page = report.read_text(encoding="utf-8")
    assert "digits-lt: bcl · ce</h1>" in page
    assert page.count("<img class=") > 10, "pictures of what was taken for what"


@pytest.mark.slow
def test_train_own_pictures_then_evaluate(pictures, tmp_path):
    """A folder with a space in its name; settings by flag, by --set, and in the authors' spelling."""
    out = tmp_path / "a run"
    words = "--epochs 2 --batch_size 4 --arch resnet8 --set views.size=16 --set optim.warmup_epochs=0 --lr 0.01"
    done = run("train", "--data", str(pictures), "--out", str(out), *words.split(), "--beside", "logit-adjusted")
    assert done.returncode == 0, done.stderr
    assert "no recipe named: taking 'pictures'" in done.stdout
    assert "accuracy on the validation part" in done.stdout
    assert re.search(r"training +bcl +bcl +logit-adjusted +logit-adjusted *\n +images +last +best", done.stdout)
    assert (out / "best.pt").is_file()
    assert (tmp_path / "a run-logit-adjusted" / "metrics.json").is_file()
    before = json.loads((out / "metrics.json").read_text())

    done = run("evaluate", str(out))
    assert done.returncode == 0, done.stderr
    assert re.search(r"training +validation +validation *\n +images +last +best", done.stdout)
    assert json.loads((out / "metrics.json").read_text()) == before

    done = run("evaluate", str(out / "best.pt"))
    assert done.returncode == 0, done.stderr
    assert f"written: {out / 'metrics-best-validation.json'}" in done.stdout

    done = run("evaluate", str(out / "best.pt"), "--data", str(pictures), "--split", "test")
    assert done.returncode == 0, done.stderr
    written = out / "metrics-best-my pictures-test.json"
    assert f"written: {written}" in done.stdout
    scored = json.loads(written.read_text())
    assert scored["test"]["images"] == 21
    assert scored["train_counts"] == before["train_counts"]
    assert json.loads((out / "metrics.json").read_text()) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_trains(name, tmp_path, capsys):
    """One epoch of each, on data of its kind."""
    words = ["train", name, "--epochs", "1", "--out", str(tmp_path / "run"), "--workers", "0"]
    benchmark = load_recipe(name).data.benchmark
    if benchmark:
        build = build_inaturalist if benchmark == "inat2018" else build_imagenet
        data = build(tmp_path / "data", counts=(9, 4))
        for file in data.glob("ImageNet_LT_*.txt"):
            if benchmark == "places-lt":
                file.rename(data / file.name.replace("ImageNet", "Places"))
        words += [
            "--data",
            str(data),
            "-b",
            "4",
            "--set",
            "views.size=32",
            "--arch",
            "resnet8",
            "--pretrained",
            "false",
        ]
    elif name != "digits-lt":
        count = 12 if name == "pictures" else 25
        for part in ("train", "test"):
            for label in range(2):
                for number in range(count):
                    path = tmp_path / "data" / part / f"class {label}" / f"{number}.jpg"
                    draw_picture(path, label, number, size=(32, 32))
        words += ["--data", str(tmp_path / "data"), "--batch-size", "8"]
    if "cifar" in name:
        words += ["--imbalance-factor", "2"]
    assert main(words) == 0
    assert f"run folder: {tmp_path / 'run'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["images"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "digit-lt"], "no recipe is called 'digit-lt'; did you mean digits-lt or"),
        (["train", "--lr", "-0.1"], "optim.lr must be above 0, not '-0.1'"),
        (["train", "--set", "optim.lr=-1"], "optim.lr must be above 0, not '-1'"),
        (
            ["train", "--lr", "0.1", "--set", "optim.lr=0.2"],
            "--set optim.lr=0.2, but a flag says 0.1; drop one of them",
        ),
        (
            ["train", "--set", "optim.milestones=3", "--schedule", "6", "8"],
            "--set optim.milestones=3, but a flag says 6 8",
        ),
        (
            ["evaluate", "x", "--set", "data.test_list=a", "--test-list", "b"],
            "--set data.test_list=a, but a flag says b",
        ),
        (["train", "--set", "optim.lr"], "--set takes SECTION.FIELD=VALUE, not 'optim.lr'"),
        (["train", "--set", "opt.lr=1"], "no recipe field is called 'opt.lr'; did you mean optim.lr"),
        (["train", "--epoch", "3"], "no option is called --epoch; did you mean --epochs"),
        (["train", "digits-lt", "more"], "'more' is one word too many (see equipoise train --help)"),
        (["train", "--data", "absent"], "there is no file or folder at"),
        (["train", "cifar10-lt"], "this recipe needs data: name a folder with --data FOLDER"),
        (["train", "--batch-size", "5000"], "batch_size (5000) is larger than the training part (342 images)"),
        (["train", "--method", "bcl2"], "method must be one of bcl, ce, logit-adjusted, supcon+la, not 'bcl2'"),
        (["train", "--device", "tpu"], "device must be one of auto, cpu, cuda, cuda:N, mps, not 'tpu'"),
        (["train", "--beside", "none"], "argument --beside: invalid choice: 'none'"),
        (["train", "--out", ""], "--out names no folder"),
        (["train", "--epochs"], "argument --epochs: expected one argument"),
        (["evaluate", "nowhere"], "there is no run folder or checkpoint at nowhere"),
        (["data", "nowhere"], "there is no file or folder at nowhere"),
        (["data"], "the following arguments are required: PATH"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_refusals(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(capsys, *words)
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--weights", "{folder}/no.pth"], "there is no file of weights at {folder}/no.pth"),
        (["--weights", "{folder}/circle.pth"], "{folder}/circle.pth is no file of weights that can be read (too many"),
        (["--weights", "{folder}/text.pth"], "{folder}/text.pth is no file of weights that can be read"),
        (["--weights", "{folder}/text.safetensors"], "{folder}/text.safetensors is no file of weights that can be"),
        (["--weights", "{folder}/other.pth"], "{folder}/other.pth does not hold the weights of resnet8"),
        (["--pretrained", "true"], "there are no pretrained weights for resnet8"),
        (
            ["--arch", "resnet18", "--pretrained", "true"],
            "the pretrained weights of resnet18 could not be had (offline)",
        ),
        (["--arch", "resnet18.nonsense"], "timm cannot build resnet18.nonsense"),
        (["--out", "{folder}/text.pth/run"], "the run folder {folder}/text.pth/run cannot be made (not a directory)"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_plan_is_shown(words, sentence, capsys, tmp_path, monkeypatch):
    import timm

    made = timm.create_model

    def offline(name, pretrained=False, **more):
        if pretrained:
            raise OSError("offline")
        return made(name, **more)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.chdir(tmp_path)
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
    (tmp_path / "circle.pth").symlink_to("circle.pth")
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "other.pth")
    before = sorted(tmp_path.iterdir())
    words = [word.format(folder=tmp_path) for word in words]
    assert main(["train", "digits-lt", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"equipoise: {sentence.format(folder=tmp_path)}")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "runs"}


@pytest.mark.parametrize("recipe", ["digits-lt", "data"])
def test_nobody_reads_the_plan(recipe, pictures, tmp_path):
    """As with `| true`: no error is shown, nothing is trained, nothing left. Rich ends then in another way than Python,
    which prints the remark that a recipe was chosen."""
    chosen = ["--data", str(pictures)] if recipe == "data" else [recipe]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "equipoise", "train", *chosen, "--arch=resnet8", "-b4", "--out", tmp_path / "run"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    _, said = process.communicate(timeout=100)
    assert said == ""
    assert not (tmp_path / "run").exists()


def test_missing_device(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "this machine has no cuda device" in refusal(capsys, "train", "--device", "cuda")
    assert list(tmp_path.iterdir()) == []


def test_evaluate_a_folder_that_is_no_run(capsys, pictures):
    assert refusal(capsys, "evaluate", str(pictures)) == f"there is no checkpoint at {pictures}/last.pt"


def test_what_the_system_refuses_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    said = refusal(capsys, "train", "--out", str(tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in said
    assert "not a directory" in said


def test_pictures_without_the_flag(capsys, pictures):
    assert refusal(capsys, "train", str(pictures)).endswith(f"to train on the pictures in it: --data {pictures}")


@pytest.mark.slow
def test_cifar100_as_published(tmp_path, capsys):
    """Parquet with a fine and a coarse label."""
    for part in ("train", "test"):
        images = []
        for number in range(24):
            draw_picture(tmp_path / "x.png", number % 2, number, size=(32, 32))
            images.append({"bytes": (tmp_path / "x.png").read_bytes(), "path": None})
        labels = {"fine_label": [number % 2 for number in range(24)], "coarse_label": [0] * 24}
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table({"img": images, **labels}), tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    words = ["train", "cifar100-lt", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main([*words, "--epochs", "1", "-b", "8", "--imbalance-factor", "2", "--method", "ce"]) == 0
    assert "from 12 images (0) to 6 (1)" in capsys.readouterr().out


# ---- data


def test_data_of_a_folder_with_problems(capsys, tmp_path):
    draw_folder(tmp_path, {"ant": 12, "[bold]bee": 3})
    (tmp_path / "cow").mkdir()
    (tmp_path / "ant" / "3.png").write_bytes(b"broken")
    (tmp_path / "ant" / "readme.txt").write_text("")
    assert main(["data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for said in (
        "class folders",
        "train: 15 images, 3 classes, imbalance factor 4",
        "problems (3)",
        "class 'cow' has no training images",
        "3.png cannot be read (it is no image: not JPEG",
        "1 file passed over, no images by their ending (.txt)",
    ):
        assert said in text, said
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if re.match(r"^(ant|\[bold\]bee) ", line)}
    assert bars == {"ant": 30, "[bold]bee": 7}


@pytest.mark.slow
def test_report_of_own_pictures_and_of_data_that_is_gone(pictures, tmp_path, capsys):
    """With validation, without a test part: the best checkpoint speaks for the run."""
    out = tmp_path / "run"
    words = ["--epochs", "2", "--batch-size", "4", "--arch", "resnet8", "--set", "views.size=16"]
    words += ["--set", "optim.warmup_epochs=0"]
    assert main(["train", "--data", str(pictures), "--out", str(out), *words]) == 0
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.html'}"
    page = (out / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"best checkpoint (after epoch {metrics['best']['epoch']}), validation part" in page
    assert f"gets {100 * metrics['best']['validation']['few']:.1f}\N{NO-BREAK SPACE}% right" in page
    pictures.rename(tmp_path / "elsewhere")
    other = tmp_path / "other.html"
    assert main(["report", str(out), "--out", str(other)]) == 0
    page = other.read_text(encoding="utf-8")
    assert f"No example pictures: there is no file or folder at {pictures}." in page
    assert refusal(capsys, "report", str(tmp_path / "elsewhere")) == (
        f"{tmp_path / 'elsewhere'} is not a run folder: it has no recipe.toml or no run.json; name one that equipoise "
        "train wrote"
    )


def test_data_of_the_digits(capsys):
    assert main(["data", "digits"]) == 0
    text = capsys.readouterr().out
    assert "embedded digits" in text
    assert "test: 500 images, 10 classes, imbalance factor 1" in text
    assert "no problems found" in text


def test_data_of_many_classes_shows_the_ends(capsys, tmp_path):
    draw_folder(tmp_path, {f"class{number:02}": 1 + number % 5 for number in range(50)})
    assert main(["data", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("class", "…"))]
    assert len(lines) == 41
    assert lines[20].startswith("…")


# ---- the authors' experiments


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    """Their three commands on miniature data sets, in processes of their own, with drawn pictures."""
    assert rehearse(tmp_path, None, size=32, epochs=2, encoders=("resnet50",)) > 25


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
        words = ["train", "--data", str(data), "--arch", "resnet50", "--use-norm", "True", flag, "True"]
        assert main([*words, "--resume", str(run_folder / "best.pt")]) == 0
        written = run_folder / f"metrics-best-imagenet-{part}.json"
        assert f"written: {written}" in capsys.readouterr().out
        assert json.loads(written.read_text())[part] == metrics["best"][part]
    for named in (["places-lt"], ["--dataset", "inat"]):  # without --data: it would be scored on its own
        said = refusal(capsys, "train", *named, "--reload", "True", "--resume", str(run_folder / "last.pt"))
        assert "last.pt was trained by the recipe imagenet-lt, not " in said
    assert main(["train", "--dataset", "imagenet", "--reload", "--resume", str(run_folder / "best.pt")]) == 0
    for words, field in ((["--arch", "resnext50"], "model.encoder"), (["--use-norm", "False"], "model.classifier")):
        said = refusal(
            capsys, "train", "--data", str(data), *words, "--reload", "--resume", str(run_folder / "best.pt")
        )
        assert f"{run_folder}/best.pt has {field} = " in said


def test_a_checkpoint_in_their_layout_scores_the_same(imagenet_run, stripped, capsys, tmp_path):
    """Written, stripped of what is ours in it, and read again: the same logits, on the same data."""
    run_folder, data = imagenet_run
    file = tmp_path / "bcl_ckpt.best.pth.tar"
    assert main(["export", str(run_folder), "--to", "authors", "--out", str(file)]) == 0
    ours = ["evaluate", str(run_folder / "best.pt"), "--data", str(data), "--logits", str(tmp_path / "ours.npz")]
    assert main([*ours, "--out", str(tmp_path / "ours.json")]) == 0
    assert main(["evaluate", str(file), "--data", str(data), "--out", str(tmp_path / "theirs.json")]) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "theirs.json").read_text()) == json.loads((tmp_path / "ours.json").read_text())

    file = stripped
    words = ["evaluate", str(file), "--data", str(data), "--set", "views.size=32"]
    assert main([*words, "--logits", str(tmp_path / "theirs.npz"), "--out", str(tmp_path / "stripped.json")]) == 0
    with np.load(tmp_path / "ours.npz") as expected, np.load(tmp_path / "theirs.npz") as found:
        assert expected["logits"].shape == (6, 2)
        assert np.array_equal(expected["logits"], found["logits"])
        assert expected["labels"].tolist() == found["labels"].tolist() == [0, 0, 0, 1, 1, 1]
        assert found["class_names"].tolist() == ["n00000000", "n00000001"]
    stripped, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("stripped", "ours"))
    assert stripped["test"] == whole["test"]
    assert stripped["train_counts"] == [8, 4]

    for theirs in (file, tmp_path / "bcl_ckpt.best.pth.tar"):
        said = refusal(capsys, "export", str(theirs), "--to", "authors", "--out", str(tmp_path / "again.pth.tar"))
        assert said.endswith("is in the authors' layout already, and would lose by being read: copy the file")
    assert not (tmp_path / "again.pth.tar").exists()
    assert refusal(capsys, "evaluate", str(file)).endswith(
        "does not say what it was trained on; name the data with --data FOLDER"
    )
    other = draw_folder(tmp_path / "other", {"ant": 1, "bee": 1, "cat": 1})
    assert "knows 2 classes, but" in refusal(capsys, "evaluate", str(file), "--data", str(other))
    (data / "ImageNet_LT_train.txt").rename(tmp_path / "away.txt")
    try:
        assert main([*words, "--out", str(tmp_path / "alone.json")]) == 0
    finally:
        (tmp_path / "away.txt").rename(data / "ImageNet_LT_train.txt")
    alone = json.loads((tmp_path / "alone.json").read_text())["test"]
    assert (alone["many"], alone["few"], alone["prior_sweep"]) == (None, None, None)
    assert alone["top1"] == whole["test"]["top1"]
    assert "many, medium and few are not known" in capsys.readouterr().out


def test_the_post_hoc_prior_is_chosen_on_validation(imagenet_run):
    metrics = json.loads((imagenet_run[0] / "metrics.json").read_text())
    chosen = metrics["last"]["post_hoc"]
    rows = metrics["last"]["validation"]["prior_sweep"]
    best = max(row["mean_per_class"] for row in rows)
    assert chosen["tau"] == min(row["tau"] for row in rows if row["mean_per_class"] == best)
    assert chosen["test"] == next(row for row in metrics["last"]["test"]["prior_sweep"] if row["tau"] == chosen["tau"])


def test_data_names_lists_and_says_how_they_depart(capsys, tmp_path, shared_data):
    """A published list; one with a duplicate, a gap, an overlap and images that are not there."""
    assert main(["data", str(shared_data / "lists" / "Places_LT_train.txt")]) == 0
    said = capsys.readouterr().out
    assert "the published Places_LT_train.txt (git blob 6392252f8ae867bc8a5e841cc1b29e5b8ef4b636)" in said
    assert "train: 62,500 images, 365 classes, imbalance factor 996" in said
    assert "62,500 of the 62,500 images" in said

    data = build_imagenet(tmp_path / "data", counts=(4, 3))
    train, test = data / "ImageNet_LT_train.txt", data / "ImageNet_LT_test.txt"
    lines = train.read_text().splitlines()
    train.write_text("\n".join([*lines[:4], lines[0], *(line[:-1] + "2" for line in lines[4:])]) + "\n")
    test.write_text(test.read_text() + lines[0] + "\n")
    (data / "val" / "n00000000" / "ILSVRC2012_val_00000002.JPEG").unlink()
    assert main(["data", str(data)]) == 0
    said = capsys.readouterr().out
    for sentence in (
        f"{train} is not the published ImageNet_LT_train.txt (git blob a063f095fcd475db4cf8b0658c4b73955535bbf9): that",
        " has 115,846 images of 1,000 classes, this one 8 of 2",
        f"{train}: class '1' has no training images",
        f"{train}: 1 images are in it more than once (first: train/n00000000/n00000000_0.JPEG, labelled 0)",
        "ILSVRC2012_val_00000002.JPEG is not there, and 1 of the 7 images",
        f"1 images of {test} are in {train} too (first: train/n00000000/n00000000_0.JPEG)",
    ):
        assert sentence in said, sentence
    train.unlink()
    assert main(["data", str(data)]) == 0
    assert "the list ImageNet_LT_train.txt (115,846 images" in capsys.readouterr().out
    (tmp_path / "list.csv").write_text("a.jpg,3\n")
    assert "is a file, but no Parquet file" in refusal(capsys, "data", str(tmp_path / "list.csv"))
    assert "--images goes with a list file as PATH" in refusal(capsys, "data", str(data), "--images", str(data))


# ---- resuming


def metric_lines(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Two epochs, then two more from the checkpoint, in place: the weights and lines of four in one go."""
    words = ["digits-lt", "--method", "bcl", "-b", "64", "--set", "data.holdout=0.2"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    # The schedule depends on the number of epochs: a constant rate makes two epochs the first half of four.
    words += ["--schedule", "step", "--set", "optim.milestones=99", "--set", "optim.warmup_epochs=0"]
    assert run("train", *words, "--epochs", "4", "--out", str(whole)).returncode == 0
    assert run("train", *words, "--epochs", "2", "--out", str(parted)).returncode == 0
    done = run("train", *words, "--epochs", "4", "--resume", str(parted), "--out", str(parted))
    assert done.returncode == 0, done.stderr
    assert "goesonfrom" in "".join(done.stdout.split())
    assert "afterepoch2" in "".join(done.stdout.split())
    one, other = (load_checkpoint(path / "last.pt") for path in (whole, parted))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert (one.best, one.step, one.epoch) == (other.best, other.step, other.epoch)
    steps = [
        [(line["kind"], line["step"], line.get("loss")) for line in metric_lines(path)] for path in (whole, parted)
    ]
    assert steps[0] == steps[1]
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (whole, parted)]
    assert metrics[0] == metrics[1]

    # Lost since: what was logged after the checkpoint is done again, once.
    done = run("train", "--resume", str(whole), "--epochs", "5")
    assert done.returncode == 0, done.stderr
    logged = [line["step"] for line in metric_lines(whole) if line["kind"] == "train"]
    assert logged == sorted(set(logged))
    assert load_checkpoint(whole / "last.pt").epoch == 5


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_have_moved(tmp_path, capsys):
    data, moved, run_folder = tmp_path / "data", tmp_path / "moved", tmp_path / "run"
    draw_folder(data, {"ant": 9, "bee": 6})
    words = ["train", "--data", str(data), "--arch=resnet8", "--method=ce", "--size=16", "-b6", "-j0", "--device=cpu"]
    assert main([*words, "--epochs=1", "--out", str(run_folder)]) == 0
    data.rename(moved)
    on = ["train", "--resume", str(run_folder), "--epochs=2"]
    assert f"there is no file or folder at {data}; correct the path, or of data" in refusal(capsys, *on)
    assert main([*on, "--data", str(moved)]) == 0
    assert load_checkpoint(run_folder / "last.pt").epoch == 2
    assert load_recipe(run_folder).data.path == str(moved)
    assert main(["evaluate", str(run_folder)]) == 0
    draw_folder(moved, {"cow": 2})
    assert "moved has 3" in refusal(capsys, "train", "--resume", str(run_folder), "--epochs=3", "--data", str(moved))
    shutil.rmtree(moved / "cow")
    (moved / "ant" / "0.png").unlink()
    said = refusal(capsys, "train", "--resume", str(run_folder), "--epochs=3", "--data", str(moved))
    assert f"the train part of {moved} is not what {run_folder}/last.pt was trained with" in said


@pytest.fixture
def stripped(imagenet_run, tmp_path):
    """A checkpoint as the authors' code writes it: without what is ours in it."""
    file = tmp_path / "theirs.pth.tar"
    assert main(["export", str(imagenet_run[0]), "--to", "authors", "--out", str(file)]) == 0
    table = torch.load(file, weights_only=True)
    del table["equipoise"]
    torch.save(table, file)
    return file


@pytest.mark.slow
def test_the_authors_files_of_a_run_that_goes_on(imagenet_run, tmp_path, capsys):
    """They are gone when it begins, so that a run that fails leaves no old ones, and new when it ends."""
    run_folder = shutil.copytree(imagenet_run[0], tmp_path / "run")
    words = ["train", "--resume", str(run_folder), "--epochs", "2"]
    files = {ours: run_folder / f"bcl_ckpt{best}.pth.tar" for ours, best in (("last.pt", ""), ("best.pt", ".best"))}
    for ours, theirs in files.items():
        assert main(["export", str(run_folder / ours), "--to", "authors"]) == 0
        assert theirs.is_file()
    (run_folder / "run.lock").mkdir()  # so that it is refused before it begins
    assert "cannot be written into" in refusal(capsys, *words)
    (run_folder / "run.lock").rmdir()
    assert all(theirs.is_file() for theirs in files.values()), "they are of the run as it is"
    image = next((imagenet_run[1] / "train").rglob("*.JPEG"))
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    try:
        assert "cannot be read" in refusal(capsys, *words)
    finally:
        image.write_bytes(content)
    assert not any(theirs.exists() for theirs in files.values())
    for theirs in files.values():
        theirs.write_bytes(b"old")
    assert main(words) == 0
    for ours, theirs in files.items():
        one, other = load_checkpoint(run_folder / ours), load_checkpoint(theirs)
        assert one.epoch == other.epoch
        assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    assert load_checkpoint(files["last.pt"]).epoch == 2


@pytest.mark.slow
def test_training_goes_on_from_their_checkpoint(imagenet_run, stripped, tmp_path, capsys):
    words = ["train", "--data", str(imagenet_run[1]), *SMALL, "--epochs", "2", "--resume", str(stripped)]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "after epoch 1" in " ".join(capsys.readouterr().out.split())
    assert load_checkpoint(tmp_path / "run" / "last.pt").epoch == 2
    steps = [line["step"] for line in metric_lines(tmp_path / "run") if line["kind"] == "train"]
    assert steps[0] > 3, "of three steps an epoch, the first epoch is not done again"


@pytest.mark.slow
def test_a_run_of_lists_is_scored_on_others(tmp_path, capsys):
    """On another tree with lists of its own, and on one list; whatever the lists were that it was trained by."""
    one, other = (build_imagenet(tmp_path / name, counts=(5, 4)) for name in ("one", "other"))
    lists = [f"--{part}-list={one / f'ImageNet_LT_{part}.txt'}" for part in ("train", "test")]
    words = ["--data", str(one), *lists, "--out", str(tmp_path / "run"), "--arch", "resnet8", "--method", "ce"]
    assert main(["train", "imagenet-lt", *words, *SMALL, "--epochs", "1"]) == 0
    shutil.move(one, tmp_path / "moved")
    expected = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(other), "--out", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["test"] == expected
    shutil.move(tmp_path / "moved", one)
    mine = tmp_path / "mine.txt"
    mine.write_text((one / "ImageNet_LT_test.txt").read_text().splitlines()[0] + "\n")
    assert main(["evaluate", str(tmp_path / "run"), "--test-list", str(mine), "--out", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["test"]["images"] == 1


def test_what_cannot_be_resumed(imagenet_run, capsys, tmp_path):
    run_folder, _ = imagenet_run
    assert "has trained 1 epoch already, of 1; set --epochs higher" in refusal(
        capsys, "train", "--resume", str(run_folder)
    )
    said = refusal(capsys, "train", "--resume", str(run_folder), "--epochs", "2", "--lr", "3")
    assert "was trained with optim.lr = 0.1, not 3.0: a run goes on under its own recipe" in said
    other = build_imagenet(tmp_path / "other", counts=(5, 2))
    words = ["--data", str(other), "--epochs", "2", "-b", "4", "--out", str(tmp_path / "run")]
    said = refusal(capsys, "train", *words, "--resume", str(run_folder))
    assert f"the train part of {other} is not what" in said
    assert "name the data it was trained on" in said
    assert not (tmp_path / "run").exists()
