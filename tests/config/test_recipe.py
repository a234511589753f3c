"""Recipes: every shipped one loads, every wrong one is refused with a sentence that helps."""

import dataclasses
import tomllib

import pytest

from equipoise import UserError, load_recipe
from equipoise.config.recipe import (
    Recipe,
    field_value,
    find_field,
    override,
    recipe_fields,
    recipe_from_table,
    recipe_toml,
    shipped_recipes,
)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_say_what_they_are(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.summary) < 100
    header = shipped_recipes()[name].read_text(encoding="utf-8")
    assert "Source:" in header
    assert "Command: equipoise train" in header


@pytest.mark.parametrize("name", shipped_recipes())
def test_toml_round_trip(name, tmp_path):
    recipe = load_recipe(name, lr=0.037, milestones=[0.5, 3])
    path = tmp_path / "mine.toml"
    path.write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FIELDS = [
    "encoder", "epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "warmup_epochs", "milestones",
    "alpha", "beta", "temperature", "tau", "hidden_dim", "feature_dim",
    "classifier", "cl_views", "size", "randaug", "randaug_n", "randaug_m", "blur", "mean", "std",
]  # fmt: skip
_PHOTOS = ("cosine", "sim-sim", 224, True, 2, 10.0, False)
_CIFAR = (
    "resnet32", 200, 256, 0.15, 0.9, 5e-4, "step", 5, (0.8, 0.9), 2.0, 0.6, 0.1, 1.0, 512, 128,
    "cosine", "sim-sim", 32, True, 2, 10.0, False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("imagenet-lt", (
            "resnet50", 90, 256, 0.1, 0.9, 5e-4, "cosine", 0, (160, 180), 1.0, 0.35, 0.07, 1.0, 0, 1024,
            *_PHOTOS, IMAGENET_MEAN, IMAGENET_STD,
        )),
        ("inat2018", (
            "resnet50", 100, 256, 0.2, 0.9, 1e-4, "cosine", 0, (160, 180), 1.0, 0.35, 0.07, 1.0, 0, 1024,
            *_PHOTOS, (0.466, 0.471, 0.380), (0.195, 0.194, 0.192),
        )),
        ("places-lt", (
            "resnet152.tv_in1k", 30, 256, 0.02, 0.9, 5e-4, "cosine", 0, (), 1.0, 0.35, 0.07, 1.0, 0, 1024,
            *_PHOTOS, IMAGENET_MEAN, IMAGENET_STD,
        )),
        ("cifar10-lt", (*_CIFAR, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
        ("cifar100-lt", (*_CIFAR, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    ],
)  # fmt: skip
def test_every_hyper_parameter_of_a_benchmark(name, values):
    """As the authors' README and code have them; of CIFAR, as the re-implementations that reach the paper's figures."""
    recipe = load_recipe(name)
    assert dict(zip(_FIELDS, (field_value(recipe, find_field(field)) for field in _FIELDS), strict=True)) == dict(
        zip(_FIELDS, values, strict=True)
    )


def test_cifar_recipes_differ_in_their_data_only():
    ten, hundred = load_recipe("cifar10-lt"), load_recipe("cifar100-lt")
    same = dataclasses.replace(
        hundred,
        name=ten.name,
        summary=ten.summary,
        data=dataclasses.replace(hundred.data, label_column=ten.data.label_column),
        views=dataclasses.replace(hundred.views, mean=ten.views.mean, std=ten.views.std),
    )
    assert same == ten


def test_every_field_by_each_of_its_names():
    for field in recipe_fields():
        names = {field.key, field.path[-1], field.path[-1].replace("_", "-"), *field.names}
        assert {find_field(name) for name in names} == {field}
        assert field.setting.help


def test_overrides_take_text_and_values():
    recipe = load_recipe(
        "digits-lt", epochs="3", lr="0.5", blur="yes", milestones="1 2", mean=[0.1, 0.2, 0.3], **{"loss.beta": 2}
    )
    assert (recipe.epochs, recipe.optim.lr, recipe.views.blur) == (3, 0.5, True)
    assert (recipe.optim.milestones, recipe.views.mean, recipe.loss.beta) == ((1.0, 2.0), (0.1, 0.2, 0.3), 2.0)
    assert isinstance(recipe.loss.beta, float)
    assert field_value(recipe, find_field("temp")) == 0.1


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("lr", -0.1, "optim.lr must be above 0, not -0.1"),
        ("lr", "fast", "optim.lr must be a number, not 'fast'"),
        ("lr", float("nan"), "optim.lr must be a number, not nan"),
        ("lr", True, "optim.lr must be a number, not True"),
        ("epochs", 0, "epochs must be at least 1, not 0"),
        ("epochs", 2.5, "epochs must be a whole number, not 2.5"),
        ("epochs", "1e3", "epochs must be a whole number, not '1e3'"),
        ("holdout", 0.9, "data.holdout must be at most 0.5, not 0.9"),
        ("device", "gpu", "device must be one of auto, cpu, cuda, cuda:N, mps, not 'gpu'"),
        ("method", "BCL", "method must be one of bcl, ce, logit-adjusted, supcon+la, not 'BCL'"),
        ("pretrained", "maybe", "model.pretrained must be true or false, not 'maybe'"),
        ("pretrained", 1, "model.pretrained must be true or false, not 1"),
        ("mean", "0.1 0.2", "views.mean must be 3 numbers, not '0.1 0.2'"),
        ("milestones", 5, "optim.milestones must be a list of numbers, not 5"),
        ("std", [0.2, 0, 0.2], "views.std must be above 0, not [0.2, 0, 0.2]"),
        ("data", 7, "data.path must be text, not 7"),
        ("lr", 10**400, "optim.lr must be a number, not 100000000000000000...0000000000000000000"),
        pytest.param("seed", 16**5000, "seed must be a whole number, not a number of thousands of digits", id="huge"),
        ("seed", "9" * 5000, f"seed must be a whole number, not '{'9' * 47}...{'9' * 48}'"),
        ("data", "a\0b", "data.path must be text that can be written down (UTF-8, no zero bytes), not 'a\\x00b'"),
        ("data", "\udcff", "data.path must be text that can be written down (UTF-8, no zero bytes), not '\\udcff'"),
        ("name", "../x", "name must be a name of up to 100 characters without /, not '../x'"),
        ("hidden_dim", 10**9, "model.hidden_dim must be at most 65536, not 1000000000"),
        ("epochs", 10**9, "epochs must be at most 1000000, not 1000000000"),
        ("workers", 10**9, "workers must be at most 512, not 1000000000"),
        ("lr", [[[[[[]]]]]], "optim.lr must be a number, not [[[[...]]]]"),
        ("method", ["bcl"], "method must be one of bcl, ce, logit-adjusted, supcon+la, not ['bcl']"),
    ],
)
def test_refused_values(key, value, sentence):
    with pytest.raises(UserError) as error:
        load_recipe("digits-lt", **{key: value})
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("digit-lt", "no recipe is called 'digit-lt'; did you mean digits-lt or imagenet-lt?"),
        (
            "zzz",
            "no recipe is called 'zzz'; there are: "
            "cifar10-lt, cifar100-lt, digits-lt, imagenet-lt, inat2018, pictures, places-lt",
        ),
        ("absent.toml", "no recipe file at absent.toml"),
    ],
)
def test_unknown_recipes(name, sentence):
    with pytest.raises(UserError) as error:
        load_recipe(name)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch = 3", "no recipe field is called 'epoch'; did you mean epochs?"),
        ("lr = 0.1", "no recipe field is called 'lr'; write optim.lr"),
        ("[optim]\nlearning = 1", "no recipe field is called 'optim.learning'"),
        ("[optimizer]\nlr = 1", "no section is called [optimizer]; did you mean optim?"),
        ("optim = 3", "optim is a section; write [optim] and its fields below it"),
        ("[optim]\nlr = -1", "optim.lr must be above 0, not -1"),
        ("epochs = [", "is not valid TOML"),
        ("epochs = " + "[" * 100_000, "is no recipe: its values go too deep"),
        ("seed = " + "9" * 5000, "is not valid TOML"),
        ("seed = 0x" + "f" * 5000, "seed must be a whole number, not a number of thousands of digits"),
        ("day = 2024-99-99", "is not valid TOML"),
        ("a" * 100_000 + " = 1", f"no recipe field is called '{'a' * 80}'"),
        ("[" + "a." * 50_000 + "a]", "no section is called [a]"),
        ("a = 1\n" * 100_000, "is no recipe: it has more than 262,144 bytes"),
        (b"\xff\xfe", "is not valid TOML"),
    ],
)
def test_wrong_files(text, sentence, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({1: 2}, "here: 1 is no name of a field"),
        ({("a",): {}}, "here: ('a',) is no name of a field"),
        ({"optim": {1: 2}}, "here: no recipe field is called 'optim.1'"),
        ({"seed": {}}, "here: no section is called [seed]"),
        ({"data": {"path": b"x"}}, "here: data.path must be text, not b'x'"),
    ],
)
def test_tables_of_anybodys(table, sentence):
    """As checkpoints hold them."""
    with pytest.raises(UserError) as error:
        recipe_from_table(table, "here")
    assert str(error.value).startswith(sentence)


def test_unknown_override():
    with pytest.raises(
        UserError, match=r"no recipe field is called 'temprature'; did you mean temperature or loss.temperature"
    ):
        load_recipe("digits-lt", temprature=1)


def test_the_written_file_is_complete():
    table = tomllib.loads(recipe_toml(Recipe()))
    assert {field.key for field in recipe_fields()} == {
        key if not isinstance(value, dict) else f"{key}.{leaf}"
        for key, value in table.items()
        for leaf in (value if isinstance(value, dict) else [None])
    }
    assert recipe_from_table(table, "here") == Recipe()
    assert override(Recipe(), find_field("seed"), 4).seed == 4
