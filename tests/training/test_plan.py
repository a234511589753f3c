"""What a run is about to do, before anything is written."""

import pytest
import torch

from benchmarks.rehearsal import build_imagenet
from equipoise import UserError, load_recipe
from equipoise.base.world import World
from equipoise.data.lists import PUBLISHED, git_blob
from equipoise.training.plan import prepare, refuse_batches
from equipoise.training.session import start


def small(folder, **overrides):
    fields = {"device": "cpu", "epochs": 2, "size": 16, "encoder": "resnet8", "batch_size": 4, "workers": 0}
    return load_recipe("pictures", data=str(folder), **{**fields, **overrides})


def test_a_recipe_of_a_run_finds_its_files_from_anywhere(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / "w.pth")
    recipe = prepare(small(pictures.name, weights="~/w.pth"), "run").recipe
    assert recipe.model.weights == str(tmp_path / "w.pth")
    assert recipe.data.path == str(pictures)
    monkeypatch.chdir("/")
    assert prepare(recipe, tmp_path / "run").recipe == recipe


def test_a_plan_says_which_lists_it_takes_and_how_they_depart(tmp_path):
    data = build_imagenet(tmp_path / "imagenet", counts=(5, 3))
    said = prepare(load_recipe("imagenet-lt", data=str(data), batch_size=4, encoder="resnet8", size=32)).describe()
    for part in ("train", "val", "test"):
        name = f"ImageNet_LT_{part}.txt"
        assert f"{data / name}: git blob {git_blob((data / name).read_bytes())}, no published list" in said["lists"]
        assert f"{data / name} is not the published {name} (git blob {PUBLISHED[name].blob}): " in said["note"]


def test_the_plan_says_what_will_happen(pictures, tmp_path):
    plan = prepare(small(pictures, holdout=0.2, precision="fp32"), tmp_path / "run")
    said = plan.describe()
    assert said["images"] == "17 to train on, 4 for validation"
    assert said["classes"] == "3, of 10 to 2 images: imbalance factor 5"
    assert said["steps"] == "2 epochs of 4: 8 steps of 4 images"
    assert said["device"] == "cpu, fp32"
    assert said["run folder"] == str(tmp_path / "run")
    assert "goes on" not in said
    assert prepare(small(pictures, micro_batch=2)).describe()["steps"].endswith("of 4 images, 2 at a time")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"batch_size": 343}, r"\(343\) is larger than the training part \(342 images\); set a smaller one"),
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


def test_batches_that_cannot_be_shared_or_normalised():
    def check(batch_size: int, ranks: int = 1, method: str = "ce", **fields: object) -> None:
        refuse_batches(load_recipe("digits-lt", method=method, batch_size=batch_size, **fields), 342, World(0, ranks))

    check(256, 4)
    for batch, ranks in ((256, 3), (10, 4), (3, 4), (4, 4)):
        with pytest.raises(UserError, match=rf"of all {ranks} processes .* multiple of {ranks}, {2 * ranks} or"):
            check(batch, ranks)
    check(68, 1, batch_norm="synchronised")  # 342 = 5 * 68 + 2
    for fields in ({"batch_size": 68}, {"batch_size": 64, "micro_batch": 8}):
        with pytest.raises(UserError, match="BatchNorm can be synchronised neither over micro-batches nor"):
            check(ranks=4, batch_norm="synchronised", **fields)
    for size in (1, 2):
        with pytest.raises(UserError, match=rf"^micro_batch \({size}\) may leave BatchNorm a single image; "):
            check(5, micro_batch=size)
        check(5, method="bcl", micro_batch=size)  # of three views it is over three
        check(5, micro_batch=size, batch_norm="frozen")
    check(5, micro_batch=3)
