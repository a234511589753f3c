"""The command line, as a user types it: in a process of its own where that matters."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import draw_folder, draw_picture

from equipoise import load_recipe
from equipoise.cli import main
from equipoise.recipe import recipe_fields, shipped_recipes


def run(*words: str, cwd=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "equipoise", *words],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "100"}, check=False,
    )  # fmt: skip


def refusal(capsys, *words: str) -> str:
    """What a refused command says: one line, on stderr, with exit code 2."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("equipoise: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("equipoise: ").strip()


def test_help_is_instant_and_imports_nothing_heavy():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert "train a classifier" in run("--help").stdout
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    heavy = "{'torch', 'numpy', 'PIL', 'rich'}"
    code = f"import sys, equipoise.cli as cli; cli.main(['recipes']); print({heavy} & set(sys.modules))"
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
    if name != "digits-lt":
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
        (["train", "digit-lt"], "no recipe is called 'digit-lt'; did you mean digits-lt?"),
        (["train", "--lr", "-0.1"], "optim.lr must be above 0, not '-0.1'"),
        (["train", "--set", "optim.lr=-1"], "optim.lr must be above 0, not '-1'"),
        (["train", "--set", "optim.lr"], "--set takes SECTION.FIELD=VALUE, not 'optim.lr'"),
        (["train", "--set", "opt.lr=1"], "no recipe field is called 'opt.lr'; did you mean optim.lr"),
        (["train", "--epoch", "3"], "no option is called --epoch; did you mean --epochs"),
        (["train", "digits-lt", "more"], "'more' is one word too many (see equipoise train --help)"),
        (["train", "--data", "absent"], "there is no file or folder at"),
        (["train", "cifar10-lt"], "this recipe needs data: name a folder with --data FOLDER"),
        (["train", "--batch-size", "5000"], "batch_size (5000) is larger than the training part (342 images)"),
        (["train", "--method", "bcl2"], "method must be one of bcl, ce, logit-adjusted, supcon+la, not 'bcl2'"),
        (["train", "--device", "tpu"], "device must be one of auto, cpu, cuda, mps, not 'tpu'"),
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
def test_missing_device(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "this machine has no cuda device" in refusal(capsys, "train", "--device", "cuda")
    assert list(tmp_path.iterdir()) == []


def test_evaluate_a_folder_that_is_no_run(capsys, pictures):
    assert refusal(capsys, "evaluate", str(pictures)) == f"there is no checkpoint at {pictures}/last.pt"


def test_interrupt_before_the_first_checkpoint_leaves_nothing(tmp_path):
    """A real Ctrl-C on a real process, in a first epoch of 171 steps."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "equipoise", "train", "--out", str(out), "--set", "batch_size=2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A job in the background, as CI may be, is started deaf to Ctrl-C, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "equipoise: interrupted"
    assert not out.exists()


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
        "3.png cannot be read (it is no image)",
        "1 files that are not images",
    ):
        assert said in text, said
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if re.match(r"^(ant|\[bold\]bee) ", line)}
    assert bars == {"ant": 30, "[bold]bee": 7}


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
