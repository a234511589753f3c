"""What a run is about to do, before anything is written."""

import shutil

import pytest
import torch

from benchmarks.rehearsal import build_imagenet
from equipoise import UserError, load_recipe
from equipoise.config.recipe import recipe_toml
from equipoise.data.lists import PUBLISHED, git_blob
from equipoise.training.plan import prepare


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """ImageNet-LT whose lists lie in ./dataset/ImageNet_LT, as in the authors' code; and its recipe."""
    data = build_imagenet(tmp_path / "imagenet", counts=(5, 3))
    lists = tmp_path / "work" / "dataset" / "ImageNet_LT"
    lists.mkdir(parents=True)
    for file in data.glob("*.txt"):
        shutil.move(file, lists)
    monkeypatch.chdir(tmp_path / "work")
    return load_recipe("imagenet-lt", data="../imagenet", batch_size=4, encoder="resnet8", size=32), lists


def test_a_recipe_of_a_run_finds_its_files_from_anywhere(elsewhere, tmp_path, monkeypatch):
    recipe, lists = elsewhere
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({}, tmp_path / "w.pth")
    plan = prepare(load_recipe(write(recipe, tmp_path), weights="~/w.pth"), tmp_path / "run")
    assert plan.recipe.model.weights == str(tmp_path / "w.pth")
    assert plan.recipe.data.path == str(tmp_path / "imagenet")
    assert plan.recipe.data.val_list == str(lists / "ImageNet_LT_val.txt")
    monkeypatch.chdir(tmp_path)
    again = prepare(load_recipe(write(plan.recipe, tmp_path)), tmp_path / "run")
    assert again.recipe == plan.recipe
    assert [len(part) for part in again.parts.named().values()] == [8, 6, 6]


def test_lists_beside_the_images_are_found_there_again(elsewhere):
    recipe, lists = elsewhere
    for file in lists.iterdir():
        shutil.copy(file, "../imagenet")
    assert prepare(recipe).recipe.data.train_list == ""


def test_an_absent_list_is_still_missed(elsewhere):
    recipe, lists = elsewhere
    (lists / "ImageNet_LT_test.txt").unlink()
    with pytest.raises(UserError, match=r"the list ImageNet_LT_test\.txt"):
        prepare(recipe)


def test_a_plan_says_which_lists_it_takes_and_how_they_depart(elsewhere):
    recipe, lists = elsewhere
    said = prepare(recipe).describe()
    for part in ("train", "val", "test"):
        name = f"ImageNet_LT_{part}.txt"
        assert f"{lists / name}: git blob {git_blob((lists / name).read_bytes())}, no published list" in said["lists"]
        assert f"{lists / name} is not the published {name} (git blob {PUBLISHED[name].blob}): " in said["note"]


def write(recipe, folder):
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(recipe))
    return file
