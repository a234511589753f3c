"""Features of a frozen encoder: computed once, the same as from the image, noticed when an image changes."""

import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_picture

from equipoise import UserError, load, load_recipe, train
from equipoise.base.errors import Stopped
from equipoise.evaluation import features
from equipoise.evaluation.score import evaluate_run
from equipoise.method.encoders import create_encoder
from equipoise.runs.checkpoint import load_checkpoint


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A frozen ResNet-8 with weights of a file, on folders of small photographs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = draw_folder(tmp_path / "data", {"ant": 14, "bee": 8, "cat": 5})
    torch.manual_seed(0)
    torch.save(create_encoder("resnet8", 32)[0].state_dict(), tmp_path / "weights.pth")
    return load_recipe(
        "pictures", data=str(data), tune="frozen", arch="resnet8", weights=str(tmp_path / "weights.pth"), size=32,
        epochs=4, batch_size=8, holdout=0.2, precision="fp32", lr=0.05,
    )  # fmt: skip


def files(tmp_path: Path) -> dict[str, int]:
    """The files of features, and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "equipoise" / "features").iterdir()}


@pytest.mark.parametrize("method", ["logit-adjusted", "bcl"])
def test_a_head_trained_on_features_gives_the_same_from_the_image(method, recipe, tmp_path):
    recipe = replace(recipe, method=method, epochs=20, optim=replace(recipe.optim, lr=1.0))
    run = train(recipe, tmp_path / "run", progress=False)
    start = load_checkpoint(tmp_path / "run" / "last.pt").weights
    encoder = create_encoder("resnet8", 32, weights=tmp_path / "weights.pth")[0].state_dict()
    assert all(torch.equal(start[f"encoder.{key}"], value) for key, value in encoder.items()), "averages too"
    validation = run.metrics["best"]["validation"]
    # From the images, as on other data.
    predicted = load(tmp_path / "run").predict(tmp_path / "data", top=1)
    right = sum(name == Path(file).parent.name for file, ((name, _),) in predicted)
    assert right > 0.5 * len(predicted)
    assert evaluate_run(tmp_path / "run")["best"]["validation"] == validation
    network = run.model.eval()
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.allclose(network(image), network(network.encode(image)), atol=1e-4)


def test_features_are_computed_once_and_anew_for_a_changed_image(recipe, tmp_path):
    train(recipe, tmp_path / "one", progress=False)
    before = files(tmp_path)
    assert len(before) == 2, "of the training and the validation part"
    train(recipe, tmp_path / "two", progress=False)
    assert files(tmp_path) == before
    draw_picture(tmp_path / "data" / "ant" / "0.png", 2, seed=99)
    train(recipe, tmp_path / "three", progress=False)
    assert len(files(tmp_path)) == 3


def test_features_are_computed_anew_for_a_changed_copy(recipe, tmp_path):
    data, listed = tmp_path / "data", tmp_path / "train.txt"
    listed.write_text(
        "".join(
            f"{path.relative_to(data)} {'abc'.index(path.parent.name[0])}\n" for path in sorted(data.rglob("*.png"))
        )
    )
    recipe = replace(recipe, data=replace(recipe.data, path=f"file://{data}", train_list=str(listed)))
    train(recipe, tmp_path / "one", progress=False)
    before = files(tmp_path)
    assert len(before) == 2, "of the training and the validation part"
    train(recipe, tmp_path / "two", progress=False)
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / "cache" / "equipoise" / "storage")
    draw_picture(data / "ant" / "0.png", 2, seed=99)
    train(recipe, tmp_path / "three", progress=False)
    assert len(files(tmp_path)) == 4, "all copies are new"


def test_features_are_computed_anew_for_a_changed_tar(recipe, tmp_path):
    """Tars of others have no checksums."""
    images = sorted((tmp_path / "data").rglob("*.png"))
    for run, count in (("one", 2), ("two", 2), ("three", 4)):
        if run != "two":
            with tarfile.open(tmp_path / "set.tar", "w") as tar:
                for row, image in enumerate(images):
                    (tmp_path / "label").write_text(image.parent.name)
                    tar.add(image, f"{row}.png")
                    tar.add(tmp_path / "label", f"{row}.cls")
        train(
            replace(recipe, data=replace(recipe.data, path=str(tmp_path / "set.tar"))), tmp_path / run, progress=False
        )
        assert len(files(tmp_path)) == count


def test_what_was_interrupted_goes_on(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_BATCH", 4)
    seen: list[int] = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise Stopped("interrupted", "features are kept", "again")

    honest = features.compute_features
    monkeypatch.setattr(features, "compute_features", lambda *given: honest(*given[:-1], stop))
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", progress=False)
    (file,) = (tmp_path / "cache" / "equipoise" / "features").iterdir()
    assert (~np.isnan(np.load(file)[:, 0])).sum() == 8, "two batches"
    train(recipe, tmp_path / "whole", progress=False)
    assert not np.isnan(np.load(file)).any()


def test_bad_images_have_stand_ins(recipe, tmp_path):
    (tmp_path / "data" / "ant" / "3.png").write_bytes(b"broken")
    (tmp_path / "data" / "bee" / "1.png").write_bytes(b"broken")
    skip = replace(recipe, data=replace(recipe.data, on_bad_image="skip"))
    run = train(skip, tmp_path / "run", progress=False)
    assert sum(map(len, run.metrics["bad_images"].values())) == 2


def test_an_encoder_without_pretrained_weights_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="there are no pretrained weights for resnet8; set --tune scratch"):
        train(replace(recipe, model=replace(recipe.model, weights="")), tmp_path / "run", progress=False)
    assert not os.path.exists(tmp_path / "run")
