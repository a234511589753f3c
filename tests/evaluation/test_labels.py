"""Doubtful labels: planted ones are found, of a slow rule, and in long tails few are doubted."""

import os

import numpy as np
import pytest
from conftest import draw_folder
from PIL import Image
from sklearn.linear_model import LogisticRegression

from equipoise.data.sources import find_parts
from equipoise.evaluation.labels import doubtful, doubtful_labels, out_of_fold


def drawn(counts, seed=0, width=32, spread=0.6):
    """Unit features of classes about random directions, and their labels."""
    random = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(len(counts)), counts)
    centres_CF = random.normal(size=(len(counts), width)) / width**0.5
    features_NF = centres_CF[labels_N] + spread * random.normal(size=(len(labels_N), width)) / width**0.5
    return (features_NF / np.linalg.norm(features_NF, axis=1, keepdims=True)).astype(np.float32), labels_N


def slowly(shares_NC, labels_N):
    """The rule, image by image."""
    found = []
    for row, label in enumerate(labels_N):
        own = [shares_NC[other][label] for other, of_other in enumerate(labels_N) if of_other == label]
        if shares_NC[row][label] < sum(own) / len(own) / 12 and max(shares_NC[row]) > shares_NC[row][label]:
            found.append((shares_NC[row][label], row))
    return [row for _, row in sorted(found)]


def test_planted_labels_are_found():
    features_NF, true_N = drawn([60, 40, 30, 20])
    planted = np.random.default_rng(1).choice(len(true_N), 8, replace=False)
    labels_N = true_N.copy()
    labels_N[planted] = (true_N[planted] + 1) % 4
    shares_NC = out_of_fold(features_NF, labels_N)
    found = doubtful(shares_NC, labels_N)
    assert found.tolist() == slowly(shares_NC, labels_N)
    assert len(set(found) & set(planted)) >= 7
    assert len(set(found) - set(planted)) <= 2
    right = shares_NC[found].argmax(1) == true_N[found]
    assert right.mean() > 0.7
    assert np.array_equal(out_of_fold(features_NF, labels_N), shares_NC), "the same again"


def test_each_class_is_measured_by_its_own_mean():
    """What is unlikely for a class that is known well is not for one that never is sure."""
    shares_NC = np.array([[0.9, 0.1], [0.92, 0.08], [0.05, 0.95], [0.7, 0.3], [0.6, 0.4], [0.95, 0.05]])
    labels_N = np.array([0, 0, 0, 1, 1, 1])
    assert doubtful(shares_NC, labels_N).tolist() == slowly(shares_NC, labels_N) == [2]


def test_an_image_is_judged_by_others_alone():
    """Trained with them, a classifier remembers labels that say nothing."""
    random = np.random.default_rng(0)
    features_NF, labels_N = random.normal(size=(60, 200)).astype(np.float32), random.permutation(np.arange(60) % 2)
    shares_NC = out_of_fold(features_NF, labels_N)
    with_them = LogisticRegression(C=10).fit(features_NF, labels_N).predict_proba(features_NF)
    rows = np.arange(60)
    assert with_them[rows, labels_N].min() > 0.5
    assert abs(shares_NC[rows, labels_N].mean() - 0.5) < 0.15


@pytest.mark.parametrize("counts", [(112, 72, 46, 29, 19, 12, 8, 5, 3, 2), (40, 1, 30, 1, 1, 2), (6, 1, 2)])
def test_long_tails(counts):
    """Nothing is planted: few are doubted, of a pair one at most, of a class of one image none."""
    for seed in range(5):
        features_NF, labels_N = drawn(counts, seed)
        found = doubtful(out_of_fold(features_NF, labels_N), labels_N)
        assert len(found) <= 0.05 * len(labels_N) + 1
        doubted_C = np.bincount(labels_N[found], minlength=len(counts))
        assert all(doubted_C[label] <= count // 2 for label, count in enumerate(counts) if count <= 3)


# ---- of images


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


COLOURS = {"ant": (200, 40, 40), "bee": (40, 160, 60), "cow": (30, 60, 200), "dog": (220, 210, 40)}


def paint(path, shows, seed):
    """A picture of about its class's colour."""
    pixels = np.random.default_rng(seed).normal(COLOURS[shows], 25, (12, 16, 3)).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((64, 48)).save(path)


@pytest.mark.slow
def test_of_the_parts_of_a_folder(cache, tmp_path):
    """The classes of the parts are matched by name; a bad image is left out; one label is wrong in each part."""
    train, validation = tmp_path / "data" / "train", tmp_path / "data" / "val"
    counts = [(train, "ant", 16), (train, "bee", 12), (train, "cow", 1), (train, "dog", 8)]
    counts += [(validation, "bee", 4), (validation, "dog", 4)]
    for place, (folder, name, count) in enumerate(counts):
        for number in range(count):
            paint(folder / name / f"{number}.png", name, 100 * place + number)
    paint(train / "bee" / "an ant.png", "ant", 1000)
    paint(validation / "bee" / "a dog.png", "dog", 1001)
    (train / "bee" / "bad.png").write_bytes(b"broken")
    doubts = doubtful_labels(find_parts(str(tmp_path / "data")).parts)
    said = {os.path.basename(doubt.place.name): (doubt.place.part, doubt.likely) for doubt in doubts}
    assert said == {"an ant.png": ("train", "ant"), "a dog.png": ("validation", "dog")}
    for doubt in doubts:
        assert doubt.place.class_name == "bee"
        assert 0 < doubt.probability < 0.1 < doubt.of_likely < 1


@pytest.mark.slow
def test_classes_of_one_image_have_nothing_to_compare_with(cache, tmp_path):
    draw_folder(tmp_path / "data", {"ant": 5, "bee": 1, "cow": 1})
    assert doubtful_labels(find_parts(str(tmp_path / "data")).parts) == []


@pytest.mark.long
def test_of_real_photographs(cache, shared_data):
    """A twentieth of the labels of 600 photographs of clothes are made wrong: most are found, few others."""
    images = find_parts(str(shared_data / "clothing")).parts["train"]
    random = np.random.default_rng(0)
    images = images.take(np.sort(random.choice(len(images), 600, replace=False)))
    planted = random.choice(600, 30, replace=False)
    images.labels_N[planted] = (images.labels_N[planted] + random.integers(1, 10, 30)) % 10
    rows = [doubt.place.row for doubt in doubtful_labels({"train": images})]
    assert len(set(rows) & set(planted.tolist())) >= 18
    assert len(set(rows[:20]) & set(planted.tolist())) >= 14
    assert len(rows) < 80
