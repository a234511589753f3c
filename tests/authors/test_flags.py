"""The authors' command line: every flag of their README and of their parser, in any spelling."""

from pathlib import Path

import pytest

from benchmarks.rehearsal import build_imagenet, build_inaturalist
from equipoise import load_recipe
from equipoise.authors.flags import DATASETS, authors_folder
from equipoise.cli.flags import chosen_recipe, with_overrides
from equipoise.cli.main import _dashed, _parser, main
from equipoise.config.recipe import Recipe

# Their README's, without the data.
BOTH = "-p 200 --arch resnet50 --use-norm True --cos True --cl_views sim-sim"
SEED_IMAGENET = f"--lr 0.1 --epochs 90 --wd 5e-4 {BOTH}"
SEED_INATURALIST = f"--lr 0.2 --epochs 100 --wd 1e-4 {BOTH}"


def chosen(words: str, data: Path | None = None) -> tuple[Recipe, str]:
    """The recipe of a command line, and what is said about it."""
    typed = ["train", *(["--data", str(data)] if data else []), *words.split()]
    dashed = [_dashed(word) for word in typed]
    return chosen_recipe(_parser(dashed).parse_args(dashed))[:2]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    return build_imagenet(tmp_path_factory.mktemp("data") / "imagenet_2012", counts=(3, 2))


def test_their_commands_are_the_recipes(imagenet, tmp_path):
    inaturalist = build_inaturalist(tmp_path / "inat2018", counts=(3, 2))
    for words, data, name, folder in (
        (SEED_IMAGENET, imagenet, "imagenet-lt", "imagenet_resnet50_batchsize256_epochs_90_temp_0.07_lr_0.1_sim-sim"),
        (SEED_INATURALIST, inaturalist, "inat2018", "inat_resnet50_batchsize256_epochs_100_temp_0.07_lr_0.2_sim-sim"),
    ):
        recipe, said = chosen(words, data)
        assert said.startswith(f"no recipe named: taking '{name}'")
        assert recipe == load_recipe(name, data=str(data), log_every=200)
        assert authors_folder("log", recipe) == Path("log") / folder, "as their README has it"


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--arch resnext50", "model.encoder", "resnext50"), ("-j 12", "workers", 12), ("-b 512", "batch_size", 512),
        ("--learning_rate 0.3", "optim.lr", 0.3), ("--momentum 0.8", "optim.momentum", 0.8), ("--p 7", "log_every", 7),
        ("--wd 1e-3", "optim.weight_decay", 1e-3), ("--weight-decay 1e-3", "optim.weight_decay", 1e-3),
        ("--cos False", "optim.schedule", "step"), ("--cos", "optim.schedule", "cosine"),
        ("--schedule 60 80", "optim.milestones", (60, 80)), ("--schedule 60 80", "optim.schedule", "step"),
        ("--schedule 60 80 --cos True", "optim.schedule", "cosine"),
        ("--cos True --schedule 60 80", "optim.schedule", "cosine"),
        ("--schedule 60 80 --cos True", "optim.milestones", (60, 80)), ("--schedule step", "optim.schedule", "step"),
        ("--schedule cosine --cos True", "optim.schedule", "cosine"), ("--warmup_epochs 5", "optim.warmup_epochs", 5),
        ("--temp 0.2", "loss.temperature", 0.2), ("--alpha 2", "loss.alpha", 2), ("--beta 0.6", "loss.beta", 0.6),
        ("--feat_dim 128", "model.feature_dim", 128), ("--use-norm True", "model.classifier", "cosine"),
        ("--use_norm=false", "model.classifier", "linear"), ("--cl-views rand-rand", "views.cl_views", "rand-rand"),
        ("--randaug False", "views.randaug", False), ("--randaug_m 9", "views.randaug_m", 9),
        ("--randaug_n 3", "views.randaug_n", 3), ("--seed 42", "seed", 42), ("--gpu 1", "device", "cuda:1"),
        ("--dataset imagenet", "name", "imagenet-lt"),
    ],
)  # fmt: skip
def test_their_flags(words, field, value, imagenet):
    found = chosen(words, imagenet)[0]
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("command", ["compare digits-lt", "init FOLDER"])
def test_other_commands_take_the_schedule_too(command):
    words = [*command.split(), "--schedule", "60", "80"]
    optim = with_overrides(Recipe(), _parser(words).parse_args(words)).optim
    assert (optim.schedule, optim.milestones) == ("step", (60, 80))


def test_names_of_data_sets_and_folders():
    for name in ("imagenet", "inat", "cifar10", "cifar100", "places", "imagenet-lt"):
        assert chosen(f"--dataset {name}")[0] == load_recipe(DATASETS.get(name, name))
    recipe, _ = chosen("imagenet-lt --method supcon+la --batch_size=8 --seed 3 --train_list=my_list")
    assert authors_folder("x", recipe).name.endswith("_batchsize8_epochs_90_temp_0.07_lr_0.1_sim-sim_supcon-la_seed_3")
    assert recipe.data.train_list == "my_list", "the value of an option keeps its underscores"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--cos maybe", "--cos: must be true or false, not 'maybe'"),
        ("--dataset imagnet", "--dataset: invalid choice: 'imagnet' (choose from "),
        ("--dataset inat", "the recipe inat2018 is not for {data}: take imagenet-lt"),
        ("--reload True", "--reload and --evaluate score a checkpoint: name it with --resume CHECKPOINT"),
        ("--reload True --resume log/x.pth.tar", "there is no run folder or checkpoint at log/x.pth.tar"),
    ],
)
def test_refusals(words, sentence, imagenet, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(imagenet), *words.split()]) == 2
    said = capsys.readouterr().err
    assert sentence.format(data=imagenet) in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
