"""The command line, as a user types it: in a process of its own where that matters."""

import errno
import json
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import draw_folder, draw_picture, refusal

from benchmarks.rehearsal import build_imagenet, build_inaturalist
from equipoise import load_recipe
from equipoise.cli import main as cli
from equipoise.cli.flags import with_overrides
from equipoise.cli.main import main
from equipoise.config.reading import shipped_recipes
from equipoise.config.recipe import recipe_fields
from equipoise.runs.checkpoint import load_checkpoint


def run(*arguments: str, cwd=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "equipoise", *arguments],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "100"}, check=False,
    )  # fmt: skip


def test_help_imports_nothing_heavy():
    assert "train a classifier" in run("--help").stdout
    heavy = "{'torch', 'numpy', 'PIL', 'rich', 'jinja2', 'scipy', 'cv2', 'timm'}"
    code = f"import sys, equipoise.cli.main as cli; cli.main(['recipes']); print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "set()"
    assert re.fullmatch(r"equipoise \d+\.\d+\.\d+\n", run("--version").stdout)


def test_every_rank_copies_data_at_a_url_before_one_chooses(tmp_path, monkeypatch):
    """Else rank 0 would copy all of it, while the others wait for its choice."""
    from equipoise import UserError
    from equipoise.base.world import World
    from equipoise.cli import train

    found = Mock()
    monkeypatch.setattr(train, "find_parts", found)
    monkeypatch.setattr(World, "each_makes", lambda _world, make: make())
    monkeypatch.setattr(World, "first_makes", Mock(side_effect=UserError("the others wait here")))
    recipe = load_recipe("pictures", data="s3://bucket/set")
    options = Mock(recipe=None, dataset=None, beside=None, budget=None)
    with pytest.raises(UserError, match="the others wait here"):
        train._train(World(1, 2, 1, 2), options, recipe, "", True)
    found.assert_called_once_with(recipe.data)


def test_public_names():
    import equipoise

    assert set(dir(equipoise)) >= {"load", "train", "load_recipe", "UserError", "__version__"}
    assert all(getattr(equipoise, name) for name in equipoise.__all__)
    with pytest.raises(AttributeError):
        equipoise.nonsense  # noqa: B018


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


COMPLETED = """
source "$1"
COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
_shtab_equipoise
echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["pred"], "predict"),
        (["train", "--epo"], "--epochs"),
        (["train", "--track", ""], "none tensorboard mlflow wandb"),
        (["report", "an"], "another.html"),
        (["export", "--to", "on"], "onnx"),
        (["predict", "--prior", "an"], "another.html"),
    ],
)
def test_bash_completes(typed, completed, tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "another.html").touch()
    words = ["bash", "-c", COMPLETED, "bash", "completion", "equipoise", *typed]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == f"{completed}\n"


def test_which_setting_counts(tmp_path):
    """As docs/terminal.md says it."""
    (tmp_path / "mine.toml").write_text("epochs = 7\nmethod = 'ce'\n[loss]\nbeta = 0.7\n")

    def taken(*words):
        options = cli._parser([]).parse_args(["train", str(tmp_path / "mine.toml"), *words])
        recipe = with_overrides(load_recipe(options.recipe), options)
        return recipe.epochs, recipe.loss.beta

    assert taken() == (7, 0.7)
    assert taken("--set", "epochs=8") == (8, 0.7)
    assert taken("--epochs", "9", "--set", "epochs=8", "--epochs", "10") == (10, 0.7)
    assert taken("--method", "paco") == (7, 0.05)
    assert taken("--set", "loss.beta=0.2", "--method", "paco") == (7, 0.2)


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
    assert re.search(r"step 12/12 +epoch 2/2 +[\d,]+ images/s +loss \d.* contrastive \d.* +0:00:00 left", text)
    assert re.search(r"training +95 % over +95 % over *\n +images +bcl +images +ce +images", text)
    assert re.search(r"few \(5 classes\) +fewer than 20( +[\d.]+ +[\d.]+-[\d.]+){2}", text)
    assert re.search(r"^ +9 +2( +[\d.]+ +[\d.]+-[\d.]+){2}", text, re.MULTILINE), "each class with its training count"
    assert re.search(r"bcl, training: 684 images in [\d.]+ s of steps; [\d,]+ parameters", text)
    folders = [line.removeprefix("run folder: ") for line in text.splitlines() if line.startswith("run folder: ")]
    assert [re.sub(r"\d{8}-\d{6}", "TIME", folder) for folder in folders] == [
        "runs/digits-lt-bcl-TIME", "runs/digits-lt-ce-TIME",
    ]  # fmt: skip
    assert json.loads((tmp_path / folders[0] / "run.json").read_text())["command"].endswith("--log_every=5")
    assert text.splitlines()[-1] == f"report: {folders[0]}/report.html"
    page = (tmp_path / folders[0] / "report.html").read_text(encoding="utf-8")
    assert "digits-lt: bcl · ce</h1>" in page
    assert page.count("<img class=") > 10, "pictures of what was taken for what"


@pytest.mark.slow
def test_train_own_pictures_then_evaluate_and_report(pictures, tmp_path, capsys, monkeypatch):
    """A folder with a space in its name; settings by flag, by --set, and in the authors' spelling. With validation and
    without a test part, the best checkpoint speaks for the run."""
    monkeypatch.setenv("COLUMNS", "100")

    def said(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    out = tmp_path / "a run"
    settings = "--epochs 2 --batch_size 4 --arch resnet8 --set views.size=16 --set optim.warmup_epochs=0 --lr 0.01 -j0"
    text = said("train", "--data", str(pictures), "--out", str(out), *settings.split(), "--beside", "logit-adjusted")
    assert re.search(r"chosen +scratch resnet8 at 16 pixels: there are no pretrained weights for resnet8", text)
    assert re.search(r"takes about +\d+ s: .*\d+ s for scoring and files", text)
    assert re.search(r"took \d+ s", text)
    assert "accuracy on the validation part" in text
    assert re.search(r"training +bcl +bcl +logit-adjusted +logit-adjusted *\n +images +last +best", text)
    assert (tmp_path / "a run-logit-adjusted" / "metrics.json").is_file()
    before = json.loads((out / "metrics.json").read_text())

    text = said("evaluate", str(out))
    assert re.search(r"training +validation +95 % over +validation +95 % over *\n +images +last +images +best", text)
    assert json.loads((out / "metrics.json").read_text()) == before
    assert f"written: {out / 'metrics-best-validation.json'}" in said("evaluate", str(out / "best.pt"))

    written = out / "metrics-best-my pictures-test.json"
    of_data = ["--data", str(pictures), "--split", "test"]
    assert f"written: {written}" in said("evaluate", str(out / "best.pt"), *of_data)
    scored = json.loads(written.read_text())
    assert scored["test"]["images"] == 21
    assert scored["train_counts"] == before["train_counts"]
    assert json.loads((out / "metrics.json").read_text()) == before

    assert said("report", str(out)).splitlines()[-1] == f"report: {out / 'report.html'}"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"best checkpoint (after epoch {before['best']['epoch']}), validation part" in page
    pictures.rename(tmp_path / "elsewhere")
    said("report", str(out), "--out", str(tmp_path / "other.html"))
    assert f"No example pictures: there is no file or folder at {pictures}." in (tmp_path / "other.html").read_text()
    assert "elsewhere is not a run folder: " in refusal(capsys, "report", str(tmp_path / "elsewhere"))


@pytest.mark.long
@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_trains(name, tmp_path, capsys):
    """One epoch of each, on data of its kind."""
    arguments = ["train", name, "--epochs", "1", "--out", str(tmp_path / "run"), "--workers", "0"]
    data, benchmark = tmp_path / "data", load_recipe(name).data.benchmark
    if benchmark:
        (build_inaturalist if benchmark == "inat2018" else build_imagenet)(data, counts=(9, 4))
        for file in data.glob("ImageNet_LT_*.txt") if benchmark == "places-lt" else ():
            file.rename(data / file.name.replace("ImageNet", "Places"))
        arguments += f"--data {data} -b 4 --set views.size=32 --arch resnet8 --tune scratch".split()
    elif name != "digits-lt":
        for part in ("train", "test"):
            for number in range(50):
                draw_picture(data / part / f"class {number % 2}" / f"{number}.jpg", number % 2, number, size=(32, 32))
        arguments += ["--data", str(data), "--batch-size", "8"]
    if "cifar" in name:
        arguments += ["--imbalance-factor", "2"]
    assert main(arguments) == 0
    assert f"run folder: {tmp_path / 'run'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["images"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "digit-lt"], "no recipe is called 'digit-lt'; did you mean digits-lt?"),
        (["train", "--set", "optim.lr"], "--set takes SECTION.FIELD=VALUE, not 'optim.lr'"),
        (["train", "--epoch", "3"], "no option is called --epoch; did you mean --epochs"),
        (["train", "digits-lt", "more"], "'more' is one argument too many (see equipoise train --help)"),
        (["train", "--data", "absent"], "there is no file or folder at"),
        (["train", "cifar10-lt"], "this recipe needs data: name a folder with --data FOLDER"),
        (["train", "--batch-size", "5000"], "batch_size (5000) is larger than the training part (342 images)"),
        (["evaluate", "nowhere"], "there is no run folder or checkpoint at nowhere"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_refusals(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays behind"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weights", "other.pth", "--tune", "full"], "other.pth does not hold the weights of resnet8"),
        (["--arch", "resnet18.nonsense"], "timm cannot build resnet18.nonsense"),
        (["--out", "other.pth/run"], "other.pth/run cannot be had (not a directory)"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_plan_is_shown(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "other.pth")
    assert main(["train", "digits-lt", *arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert set(tmp_path.rglob("*")) <= {tmp_path / "other.pth", tmp_path / "runs"}


def test_quiet_leaves_the_results(capsys, tmp_path):
    words = ["train", "digits-lt", "--epochs=1", "--arch=resnet8", "--method=ce", "--out", str(tmp_path / "run")]
    assert main([*words, "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    first, *_, last = said.out.strip().splitlines()
    assert (first, last) == ("accuracy on the test part, percent", f"run folder: {tmp_path / 'run'}")


@pytest.mark.slow
def test_nobody_reads_the_plan(tmp_path):
    """As with `| true`: no error is shown, nothing is left."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "equipoise", "train", "digits-lt", "--arch=resnet8", "--out", tmp_path / "run"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    _, said = process.communicate(timeout=100)
    assert said == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), 2, "no space left on device: x.json"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_command_is_one_line(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_parser", Mock(side_effect=error))
    assert main([]) == code
    assert capsys.readouterr().err == f"equipoise: {said}\n"


def test_evaluate_a_folder_that_is_no_run(capsys, pictures):
    assert refusal(capsys, "evaluate", str(pictures)) == f"there is no checkpoint at {pictures}/last.pt"
    assert refusal(capsys, "train", str(pictures)).endswith(f"to train on the pictures in it: --data {pictures}")


# ---- resuming


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_have_moved(tmp_path, capsys):
    data, moved, run_folder = tmp_path / "data", tmp_path / "moved", tmp_path / "run"
    draw_folder(data, {"ant": 9, "bee": 6})
    small = ["--arch=resnet8", "--method=ce", "--size=16", "-b6", "-j0", "--device=cpu", "--epochs=1"]
    assert main(["train", "--data", str(data), *small, "--out", str(run_folder)]) == 0
    data.rename(moved)
    on = ["train", "--resume", str(run_folder), "--epochs=2"]
    assert f"there is no file or folder at {data}; if a run's data have moved, name it" in refusal(capsys, *on)
    assert main([*on, "--data", str(moved)]) == 0
    assert load_checkpoint(run_folder / "last.pt").epoch == 2
    assert load_recipe(run_folder).data.path == str(moved)
    assert main(["evaluate", str(run_folder)]) == 0
    (moved / "ant" / "0.png").unlink()
    said = refusal(capsys, "train", "--resume", str(run_folder), "--epochs=3", "--data", str(moved))
    assert f"the train part of {moved} is not what {run_folder}/last.pt was trained with" in said
