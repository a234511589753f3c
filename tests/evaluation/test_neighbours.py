"""The nearest training images: against a slow loop, of every kind of encoder, by ranks; what the report is given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draw_folder, draw_picture, opened
from synthetic import untrained

from equipoise import load_recipe, train
from equipoise.base.world import ALONE
from equipoise.evaluation.features import nearest, open_encoded_batches
from equipoise.evaluation.score import evaluate_run
from equipoise.method.encoders import create_encoder

CPU = torch.device("cpu")


def slow_nearest(asked_MF, features_NF, k):
    """By a loop over pairs, in float64."""
    found = []
    for one in asked_MF.astype(np.float64):
        cosines = [
            one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in features_NF.astype(np.float64)
        ]
        rows = sorted(range(len(cosines)), key=lambda row: (-round(cosines[row], 6), row))[:k]
        found.append([(row, cosines[row]) for row in rows])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "frozen"])
def test_the_nearest_are_those_of_a_slow_loop(tune, tmp_path, monkeypatch):
    """From images and from kept features; of copies the first in the list; one image is bad."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = draw_folder(tmp_path / "data", {"ant": 40, "bee": 30, "cat": 9})
    draw_picture(data / "cat" / "3.png", 0, seed=5)  # what ant/5.png is
    (data / "bee" / "7.png").write_bytes(b"broken")
    images = opened(data).train
    checkpoint = untrained(images.class_counts, on_bad_image="skip", size=32)
    recipe = replace(checkpoint.recipe, model=replace(checkpoint.recipe.model, tune=tune))
    network = checkpoint.build()
    batches = open_encoded_batches(recipe, images, network, CPU, ALONE)
    batches.prepare()
    good = [row for row in range(len(images)) if not images.images.name(row).endswith("bee/7.png")]
    with torch.inference_mode():
        pixels = [batch.images_VB3SS[0] for batch, _ in batches.evaluation_of(np.arange(len(images)), 64)]
        features = torch.cat([network.encode(one) for one in pixels]).numpy()
    asked = torch.from_numpy(features[[0, 20, 50]] + np.random.default_rng(0).normal(0, 0.02, (3, features.shape[1])))
    (cosines, rows), _ = nearest(network, batches, asked.float(), 5)
    expected = slow_nearest(asked.numpy(), features, 5)
    assert rows.tolist() == [[good[row] for row, _ in of_one] for of_one in expected]
    assert cosines.numpy() == pytest.approx(
        np.array([[cosine for _, cosine in of_one] for of_one in expected]), abs=1e-5
    )
    assert (np.diff(cosines.numpy()) <= 0).all()
    assert nearest(network, batches, asked.float(), 500)[0][1].shape == (3, len(good)), "no more than there are"
    by_name = {images.images.name(row).partition("data/")[2]: row for row in range(len(images))}
    itself = torch.from_numpy(features[good.index(by_name["cat/3.png"])])[None]
    assert nearest(network, batches, itself, 2)[0][1].tolist() == [[by_name["ant/5.png"], by_name["cat/3.png"]]]


def test_ranks_share_the_images(tmp_path, monkeypatch):
    """Each of two ranks sees half of them; together they find what one finds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = opened(draw_folder(tmp_path / "data", {"ant": 20, "bee": 10})).train
    checkpoint = untrained(images.class_counts, size=32)
    network = checkpoint.build()
    batches = open_encoded_batches(checkpoint.recipe, images, network, CPU, ALONE)
    asked = torch.rand(4, network.width)
    alone, _ = nearest(network, batches, asked, 3)

    class Rank:
        size, given = 2, []

        def __init__(self, rank):
            self.rank = rank

        def gather_objects(self, best):
            self.given.append(best)
            return self.given

        def sum(self, sums):
            return sums

    nearest(network, batches, asked, 3, Rank(0))
    assert all(rows % 2 == 0 for rows in Rank.given[0][1].flatten().tolist())
    together, _ = nearest(network, batches, asked, 3, Rank(1))
    assert torch.equal(alone[1], together[1])


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["frozen", "full"])
def test_the_report_is_given_the_surest_mistakes(tune, tmp_path, monkeypatch):
    """A test picture with a wrong label: its neighbours are of the class that it shows. Without weights, nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = draw_folder(tmp_path / "data" / "train", {"ant": 14, "bee": 10, "cat": 8}).parent
    draw_folder(data / "test", {"ant": 3, "bee": 3, "cat": 3})
    draw_picture(data / "test" / "cat" / "an ant.png", 0, seed=77)
    torch.manual_seed(0)
    torch.save(create_encoder("resnet8", 32)[0].state_dict(), tmp_path / "weights.pth")
    recipe = load_recipe(
        "pictures", data=str(data), tune=tune, arch="resnet8", weights=str(tmp_path / "weights.pth"), size=32, epochs=8,
        batch_size=8, holdout=0, precision="fp32", lr=0.05, method="ce", randaug=False, workers=0,
    )  # fmt: skip
    run = train(recipe, tmp_path / "run", progress=False)
    images = opened(data)
    observed = dict(np.load(tmp_path / "run" / "observed.npz"))
    rows, neighbours = observed["test/mistakes_M"], observed["test/neighbours_MK"]
    wrong = np.flatnonzero(observed["test/labels_N"] != observed["test/predicted_N"])
    assert set(rows) == set(wrong)
    assert (np.diff(observed["test/confidence_N"][rows]) <= 0).all()
    place = [images.test.images.name(row).rpartition("/")[2] for row in rows].index("an ant.png")
    assert neighbours.shape == (len(rows), 4)
    assert (images.train.labels_N[neighbours[place]] == 0).sum() >= 3
    evaluate_run(run.path)
    assert dict(np.load(tmp_path / "run" / "observed.npz"))["test/neighbours_MK"].tolist() == neighbours.tolist()
    if tune == "full":
        from_nothing = replace(recipe, model=replace(recipe.model, weights="", tune="scratch"), epochs=1)
        train(from_nothing, tmp_path / "other", progress=False)
        assert "test/mistakes_M" not in np.load(tmp_path / "other" / "observed.npz").files
