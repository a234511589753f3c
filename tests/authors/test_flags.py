"""The authors' command line: every flag of their README and of their parser, in any spelling."""

from pathlib import Path

import pytest

from benchmarks.rehearsal import build_imagenet, build_inaturalist
from equipoise import UserError, load_recipe
from equipoise.authors.flags import authors_folder
from equipoise.cli.flags import chosen_recipe
from equipoise.cli.main import _dashed, _parser, main
from equipoise.config.recipe import Recipe

# Their README's, without the data.
SEED_IMAGENET = "--lr 0.1 -p 200 --epochs 90 --arch resnet50 --use-norm True --wd 5e-4 --cos True --cl_views sim-sim"
SEED_INATURALIST = (
    "--lr 0.2 -p 200 --epochs 100 --arch resnet50 --use-norm True --wd 1e-4 --cos True --cl_views sim-sim"
)


def chosen(words: str, data: Path | None = None) -> tuple[Recipe, str]:
    """The recipe of a command line, and what is said about it."""
    typed = ["train", *(["--data", str(data)] if data else []), *words.split()]
    dashed = [_dashed(word) for word in typed]
    return chosen_recipe(_parser(dashed).parse_args(dashed))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    return build_imagenet(tmp_path_factory.mktemp("data") / "imagenet_2012", counts=(3, 2))


@pytest.fixture(scope="module")
def inaturalist(tmp_path_factory) -> Path:
    return build_inaturalist(tmp_path_factory.mktemp("data") / "inat2018", counts=(3, 2))


def test_their_imagenet_command_is_the_recipe(imagenet):
    recipe, said = chosen(SEED_IMAGENET, imagenet)
    assert said.startswith(f"no recipe named: {imagenet} is an ImageNet-2012 folder, so taking 'imagenet-lt'")
    assert recipe == load_recipe("imagenet-lt", data=str(imagenet), log_every=200)
    name = "imagenet_resnet50_batchsize256_epochs_90_temp_0.07_lr_0.1_sim-sim"
    assert authors_folder("log", recipe) == Path("log") / name, "as their README has it"


def test_their_inaturalist_command_is_the_recipe(inaturalist):
    recipe, said = chosen(SEED_INATURALIST, inaturalist)
    assert f"{inaturalist} is an iNaturalist 2018 folder, so taking 'inat2018'" in said
    assert recipe == load_recipe("inat2018", data=str(inaturalist), log_every=200)
    assert authors_folder("log", recipe).name == "inat_resnet50_batchsize256_epochs_100_temp_0.07_lr_0.2_sim-sim"


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--arch resnext50", "model.encoder", "resnext50"),
        ("-j 12", "workers", 12),
        ("-b 512", "batch_size", 512),
        ("--batch_size=512", "batch_size", 512),
        ("--learning_rate 0.3", "optim.lr", 0.3),
        ("--momentum 0.8", "optim.momentum", 0.8),
        ("--wd 1e-3", "optim.weight_decay", 1e-3),
        ("--weight-decay 1e-3", "optim.weight_decay", 1e-3),
        ("--p 7", "log_every", 7),
        ("--print_freq 7", "log_every", 7),
        ("--cos False", "optim.schedule", "step"),
        ("--cos", "optim.schedule", "cosine"),
        ("--schedule 60 80", "optim.milestones", (60, 80)),
        ("--schedule 60 80", "optim.schedule", "step"),
        ("--schedule 60 80 --cos False", "optim.schedule", "step"),
        ("--schedule 60 80 --cos True", "optim.schedule", "cosine"),
        ("--schedule 60 80 --cos True", "optim.milestones", (60, 80)),
        ("--schedule step", "optim.schedule", "step"),
        ("--schedule cosine --cos True", "optim.schedule", "cosine"),
        ("--warmup_epochs 5", "optim.warmup_epochs", 5),
        ("--temp 0.2", "loss.temperature", 0.2),
        ("--alpha 2", "loss.alpha", 2),
        ("--beta 0.6", "loss.beta", 0.6),
        ("--feat_dim 128", "model.feature_dim", 128),
        ("--use-norm True", "model.classifier", "cosine"),
        ("--use_norm=false", "model.classifier", "linear"),
        ("--cl-views rand-rand", "views.cl_views", "rand-rand"),
        ("--randaug False", "views.randaug", False),
        ("--randaug_m 9", "views.randaug_m", 9),
        ("--randaug_n 3", "views.randaug_n", 3),
        ("--seed 42", "seed", 42),
        ("--gpu 1", "device", "cuda:1"),
        ("--dataset imagenet", "name", "imagenet-lt"),
    ],
)
def test_their_flags(words, field, value, imagenet):
    found = chosen(words, imagenet)[0]
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("name", ["imagenet", "inat", "cifar10", "cifar100", "places", "imagenet-lt"])
def test_a_data_set_by_name(name):
    recipe = {"imagenet": "imagenet-lt", "inat": "inat2018"}.get(name, name if name.endswith("-lt") else f"{name}-lt")
    assert chosen(f"--dataset {name}")[0] == load_recipe(recipe)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--cos maybe", "--cos must be true or false, not 'maybe'"),
        (
            "--use-norm True --classifier linear",
            "--use-norm says model.classifier = cosine, but --classifier says linear",
        ),
        ("--cos False --schedule cosine", "--cos says optim.schedule = step, but --schedule says cosine; drop one"),
        ("--gpu 0 --device cpu", "--gpu says device = cuda:0, but --device says cpu; drop one of them"),
        ("--gpu first", "--gpu takes the number of a GPU, from 0, not 'first'"),
        ("--dataset imagnet", "--dataset knows no 'imagnet'; did you mean imagenet?"),
        ("--dataset inat", "the recipe inat2018 is not for {data}: that is an ImageNet-2012 folder; take imagenet-lt"),
        ("cifar10-lt", "the recipe cifar10-lt is not for {data}: that is an ImageNet-2012 folder; take imagenet-lt"),
        (
            "inat2018 --dataset imagenet",
            "--dataset imagenet means the recipe imagenet-lt, not inat2018; drop one of them",
        ),
        ("--schedule 60 later", "optim.milestones must be a list of numbers"),
        ("--randaug_m 30", "views.randaug_m must be a number, at least 0 and at most 10, not '30'"),
        ("--reload True", "--reload scores a checkpoint: name it with --resume CHECKPOINT"),
        ("--reload True --resume log/x.pth.tar", "there is no run folder or checkpoint at log/x.pth.tar"),
        ("--reload True --resume x --beside ce", "--reload trains nothing: drop --beside"),
        ("--resume log/x.pth.tar", "there is no run folder or checkpoint at log/x.pth.tar"),
        ("--reload maybe", "--reload must be true or false, not 'maybe'"),
    ],
)
def test_refusals(words, sentence, imagenet, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(imagenet), *words.split()]) == 2
    said = capsys.readouterr().err
    assert sentence.format(data=imagenet) in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_their_name_of_a_folder_leaves_out():
    base = load_recipe("imagenet-lt", method="supcon+la", seed=3)
    assert authors_folder("x", base).name.endswith("_lr_0.1_sim-sim_supcon-la_seed_3")


def test_an_imagenet_tree_can_be_trained_as_class_folders(imagenet):
    assert chosen("pictures", imagenet)[0].data.benchmark == ""


def test_a_folder_of_no_data_set_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder at"):
        chosen("--dataset imagenet", tmp_path / "none")


def test_the_value_of_an_option_keeps_its_underscores():
    assert _dashed("--batch_size=8") == "--batch-size=8"
    assert _dashed("--data=my_pictures") == "--data=my_pictures"
