"""What a run is about to do, before anything is written."""

import shutil

import pytest
import torch

from benchmarks.rehearsal import build_imagenet
from equipoise import UserError, load_recipe
from equipoise.base.world import World
from equipoise.config.recipe import recipe_toml
from equipoise.data.lists import PUBLISHED, git_blob
from equipoise.training.plan import prepare, refuse_batches
from equipoise.training.session import start


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


# ---- what is said, and what is refused


def small(folder, **overrides):
    fields = {"device": "cpu", "epochs": 2, "size": 16, "encoder": "resnet8", "batch_size": 4, "workers": 0}
    return load_recipe("pictures", data=str(folder), **{**fields, **overrides})


def test_the_plan_says_what_will_happen(pictures, tmp_path):
    plan = prepare(small(pictures, holdout=0.2, precision="fp32"), tmp_path / "run")
    said = plan.describe()
    assert said["images"] == "17 to train on, 4 for validation"
    assert said["classes"] == "3, from 10 images (ant) to 2 (cat): imbalance factor 5"
    assert said["steps"] == "2 epochs of 4: 8 steps of 4 images"
    assert said["device"] == "cpu, fp32"
    assert said["run folder"] == str(tmp_path / "run")
    assert "goes on" not in said
    assert plan.recipe.data.path == str(pictures.resolve())
    said = prepare(small(pictures, micro_batch=2), tmp_path / "run").describe()
    assert said["steps"].endswith("of 4 images, 2 at a time, which BatchNorm, if any, is over")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"batch_size": 343},
            r"\(343\) is larger than the training part \(342 images\); set --batch-size 85",
        ),
        ({"encoder": "resnet9000"}, "no encoder is called 'resnet9000'"),
        ({"encoder": "vit_tiny_patch16_224", "size": 8}, "change --size or --arch"),
        ({"imbalance_factor": 200}, "leaves class '9' without images"),
        ({"data": ""}, "name a folder with --data FOLDER"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(overrides, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        start(prepare(load_recipe("digits-lt", device="cpu", **overrides), tmp_path / "run")).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_inside_the_data_is_refused(pictures, monkeypatch):
    with pytest.raises(UserError, match="would lie inside the data; name one outside with --out"):
        prepare(small(pictures), pictures / "run")
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError, match="would lie inside the data"):
        prepare(small("."))


def test_batches_that_processes_cannot_share():
    def refuse(batch_size: int, ranks: int, images: int = 342, **fields: object) -> None:
        refuse_batches(load_recipe("digits-lt", batch_size=batch_size, **fields), images, World(0, ranks))

    refuse(256, 4)
    for batch, ranks, offered in ((256, 3, "255 or 258"), (10, 4, "8 or 12"), (3, 4, "8 or 12"), (4, 4, "8 or 12")):
        with pytest.raises(UserError, match=rf"batch_size \({batch}\) is that of all .* set --batch-size {offered}"):
            refuse(batch, ranks)
    synchronised = {"model.batch_norm": "synchronised"}
    refuse(68, 1, **synchronised)  # 342 = 5 * 68 + 2
    with pytest.raises(UserError, match=r"synchronised over the last batch of an epoch, 2 images for 4 processes; set"):
        refuse(68, 4, **synchronised)
    with pytest.raises(UserError, match="cannot be synchronised over micro-batches"):
        refuse(64, 4, micro_batch=8, **synchronised)


def test_micro_batches_of_a_single_image_are_refused():
    """In one view; of three views BatchNorm is over three."""
    for batch_size, micro_batch in ((5, 2), (4, 1), (5, 1)):
        fields = {"batch_size": batch_size, "micro_batch": micro_batch}
        with pytest.raises(UserError, match=rf"^micro_batch \({micro_batch}\) would leave BatchNorm a single image; "):
            refuse_batches(load_recipe("digits-lt", method="ce", **fields), 20, World())
        refuse_batches(load_recipe("digits-lt", method="bcl", **fields), 20, World())
        refuse_batches(load_recipe("digits-lt", method="ce", batch_norm="frozen", **fields), 20, World())
    refuse_batches(load_recipe("digits-lt", method="ce", batch_size=5, micro_batch=3), 20, World())
