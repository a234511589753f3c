"""Recipes: every shipped one loads, every wrong one is refused with a sentence that helps."""

import tomllib
from functools import reduce
from typing import get_args

import pytest

from equipoise import UserError, load_recipe
from equipoise.config.reading import recipe_from_table, recipe_toml, shipped_recipes
from equipoise.config.recipe import Method, Recipe, field_value, find_field, recipe_fields


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_say_what_they_are(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.summary) < 100
    header = shipped_recipes()[name].read_text(encoding="utf-8")
    assert "Source:" in header and "Command: equipoise train" in header  # noqa: PT018
    changed = load_recipe(name, lr=0.037, milestones=[0.5, 3])
    (tmp_path / "recipe.toml").write_text(recipe_toml(changed), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml") == load_recipe(tmp_path) == changed, "by its file, and as a run folder"


# As the authors' README and code have them; of CIFAR, as the re-implementations that reach the paper's figures.
_PHOTOS = {
    "model.encoder": "resnet50", "epochs": 90, "batch_size": 256, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
    "schedule": "cosine", "warmup_epochs": 0, "milestones": (160, 180), "alpha": 1.0, "beta": 0.35, "temperature": 0.07,
    "tau": 1.0, "hidden_dim": 0, "feature_dim": 1024, "classifier": "cosine", "cl_views": "sim-sim", "size": 224,
    "randaug": True, "randaug_n": 2, "randaug_m": 10.0, "blur": False, "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}  # fmt: skip
_CIFAR = _PHOTOS | {
    "model.encoder": "resnet32", "epochs": 200, "lr": 0.15, "schedule": "step", "warmup_epochs": 5,
    "milestones": (0.8, 0.9), "alpha": 2.0, "beta": 0.6, "temperature": 0.1, "hidden_dim": 512, "feature_dim": 128,
    "size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
}  # fmt: skip
_INATURALIST = {
    "epochs": 100, "lr": 0.2, "weight_decay": 1e-4, "mean": (0.466, 0.471, 0.38), "std": (0.195, 0.194, 0.192),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("imagenet-lt", _PHOTOS),
        ("inat2018", _PHOTOS | _INATURALIST),
        ("places-lt", _PHOTOS | {"model.encoder": "resnet152.tv_in1k", "epochs": 30, "lr": 0.02, "milestones": ()}),
        ("cifar10-lt", _CIFAR),
        ("cifar100-lt", _CIFAR | {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}),
    ],
)
def test_every_hyper_parameter_of_a_benchmark(name, values):
    recipe = load_recipe(name)
    assert {field: field_value(recipe, find_field(field)) for field in values} == values


def test_every_field_by_each_of_its_names():
    for field in recipe_fields():
        names = {field.key, field.path[-1], field.path[-1].replace("_", "-"), *field.names}
        assert {find_field(name) for name in names} == {field}
        assert field.help


def test_overrides_take_text_and_values():
    recipe = load_recipe(
        "digits-lt", epochs="3", lr="0.5", blur="TRUE", milestones="1 2", mean=[0.1, 0.2, 0.3], **{"loss.beta": 2}
    )
    assert (recipe.epochs, recipe.optim.lr, recipe.views.blur) == (3, 0.5, True)
    assert (recipe.optim.milestones, recipe.views.mean, recipe.loss.beta) == ((1.0, 2.0), (0.1, 0.2, 0.3), 2.0)
    assert isinstance(recipe.loss.beta, float)
    assert field_value(recipe, find_field("temp")) == 0.1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lr", -0.1, "optim.lr must be a number, above 0, not -0.1"),
        ("lr", float("nan"), "optim.lr must be a number, above 0, not nan"),
        ("tau", "inf", "loss.tau must be a number, at least 0, not 'inf'"),
        ("lr", True, "optim.lr must be a number, above 0, not True"),
        ("holdout", 0.9, "data.holdout must be a number, at least 0 and at most 0.5, not 0.9"),
        ("device", "gpu", "device must be one of auto, cpu, cuda, cuda:N, mps, not 'gpu'"),
        ("method", "BCL", f"method must be one of {', '.join(get_args(Method))}, not 'BCL'"),
        ("compile", 1, "compile must be true or false, not 1"),
        ("mean", "0.1 0.2", "views.mean must be 3 numbers, at least 0 and at most 1, not '0.1 0.2'"),
        ("std", [0.2, 0, 0.2], "views.std must be 3 numbers, above 0 and at most 1, not [0.2, 0, 0.2]"),
        ("milestones", 5, "optim.milestones must be a list of numbers, above 0, not 5"),
        ("data", "\udcff", "data.path must be text, not '\\udcff'"),
        ("name", "../x", "name must be a name of up to 100 characters without /, not '../x'"),
        ("temprature", 1, "no recipe field is called 'temprature'; did you mean temperature?"),
    ],
)
def test_refused_values(key, value, said):
    with pytest.raises(UserError) as error:
        load_recipe("digits-lt", **{key: value})
    assert str(error.value) == said


def test_unknown_recipes():
    for name, said in {
        "digit-lt": "no recipe is called 'digit-lt'; did you mean digits-lt?",
        "zzz": f"no recipe is called 'zzz'; there are: {', '.join(shipped_recipes())}",
        "absent.toml": "absent.toml is no recipe that can be read (no such file or directory)",
        "/": "/ is a folder, not a recipe; to train on the pictures in it: --data /",
    }.items():
        with pytest.raises(UserError) as error:
            load_recipe(name)
        assert str(error.value) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch = 3", "no recipe field is called 'epoch'; did you mean epochs?"),
        ("lr = 0.1", "no recipe field is called 'lr'; write optim.lr"),
        ("[optimizer]\nlr = 1", "no recipe field is called 'optimizer.lr'; did you mean optim.lr"),
        ("[optim]\nlr = -1", "optim.lr must be a number, above 0, not -1"),
        ("epochs = [", "is no recipe that can be read (Invalid value (at end of document))"),
        (b"\xff\xfe", "is no recipe that can be read"),
    ],
)
def test_wrong_files(text, said, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


def test_tables_and_files_of_other_programs(tmp_path):
    """As a checkpoint or a hub's config may hold them; and as an editor may begin a file."""
    for table in ({1: 2}, {"optim": {1: 2}}, {"data": {"path": b"x"}}):
        with pytest.raises(UserError, match=r"^here: "):
            recipe_from_table(table, "here")
    (tmp_path / "mine.toml").write_text("epochs = 3", encoding="utf-8-sig")
    assert load_recipe(tmp_path / "mine.toml").epochs == 3


def test_the_written_file_is_complete():
    table = tomllib.loads(recipe_toml(Recipe()))
    for field in recipe_fields():
        assert reduce(lambda part, name: part[name], field.path, table) is not None
    assert recipe_from_table(table, "here") == Recipe()


def test_another_method_comes_with_what_it_has_published(tmp_path):
    recipe = load_recipe("cifar10-lt", method="proco")
    assert (recipe.loss.alpha, recipe.loss.beta, recipe.loss.temperature) == (1, 1, 0.1)
    assert load_recipe("cifar10-lt", beta=0.5, method="proco").loss.beta == 0.5, "in either order"
    assert load_recipe("cifar10-lt", method="bcl").loss == load_recipe("cifar10-lt").loss, "it is the recipe's own"
    (tmp_path / "own.toml").write_text('method = "focal"\n[loss]\ntau = 2.0\n')
    assert (load_recipe(tmp_path / "own.toml").loss.gamma, load_recipe(tmp_path / "own.toml").loss.tau) == (2, 2)
