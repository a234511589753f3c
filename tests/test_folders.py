"""Folders of class folders: what is found, what is refused."""

import pytest
from conftest import draw_folder, draw_picture

from equipoise import UserError
from equipoise.lists import imbalance_factor
from equipoise.sources import find_parts, open_parts


def test_class_folders(pictures):
    parts = open_parts(str(pictures))
    assert parts.kind == "class folders"
    assert parts.train.class_names == ("ant", "bee", "cat")
    assert parts.train.class_counts == (12, 6, 3)
    assert imbalance_factor(parts.train.class_counts) == 4
    assert parts.validation is None
    assert parts.test is None
    assert parts.train.images.name(0) == str(pictures / "ant" / "0.png")


def test_parts_above_class_folders(tmp_path):
    draw_folder(tmp_path / "train", {"ant": 5, "bee": 4})
    draw_folder(tmp_path / "val", {"ant": 2, "bee": 1})
    draw_folder(tmp_path / "test", {"bee": 3})
    parts = open_parts(str(tmp_path), holdout=0.4)
    assert parts.train.class_counts == (5, 4), "nothing is held out where there is a validation part"
    assert parts.validation is not None
    assert parts.validation.class_counts == (2, 1)
    assert parts.test is not None
    assert parts.test.class_counts == (0, 3), "labels are the training part's"


def test_nested_hidden_and_other_files(pictures):
    draw_picture(pictures / "ant" / "2021" / "deep.JPG", 0, 1)
    (pictures / "ant" / ".hidden.png").write_bytes(b"")
    (pictures / ".cache").mkdir()
    draw_picture(pictures / "bee" / ".thumbnails" / "0.png", 0, 1)
    (pictures / "bee" / "notes.txt").write_text("no picture")
    found = find_parts(str(pictures))
    assert found.parts["train"].class_counts == (13, 6, 3)
    assert found.notes == (f"{pictures}: 1 files that are not images by their ending were passed over",)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "has no sub-folders; put the images of each class in a folder of its own there"),
        (lambda root: draw_folder(root, {"ant": 3}), "has one class only ('ant'); a classifier needs two or more"),
        (
            lambda root: (draw_folder(root, {"ant": 3}), (root / "bee").mkdir()),
            "class 'bee' has no training images; add some or remove the class",
        ),
        (lambda root: ((root / "ant").mkdir(), (root / "bee").mkdir()), "holds no images in its class folders"),
        (
            lambda root: (draw_folder(root / "train", {"ant": 3, "bee": 2}), draw_folder(root / "test", {"cow": 1})),
            "cow is no class of the training part (2 classes); remove it",
        ),
        (lambda root: draw_folder(root / "test", {"ant": 1, "bee": 1}), "has no training part; name it train/"),
        (lambda root: (root / "train").mkdir(), "holds no images in its class folders"),
        (
            lambda root: [draw_folder(root / part, {"ant": 1, "bee": 1}) for part in ("train", "val", "validation")],
            "has two validation parts, val/ and validation/; keep one of them",
        ),
    ],
)
def test_refused_folders(make, sentence, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(UserError) as error:
        open_parts(str(root))
    assert sentence in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_called_train(tmp_path):
    draw_folder(tmp_path, {"bus": 3, "train": 2})
    assert open_parts(str(tmp_path)).train.class_names == ("bus", "train")


def test_a_folder_beside_the_parts_is_noted(tmp_path):
    draw_folder(tmp_path / "train", {"ant": 2, "bee": 1})
    draw_folder(tmp_path / "raw", {"x": 1})
    found = find_parts(str(tmp_path))
    assert list(found.parts) == ["train"]
    assert "these folders are no part and were passed over: raw" in found.notes[0]
