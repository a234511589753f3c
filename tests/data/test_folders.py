"""Folders of class folders: what is found, what is refused."""

import os

import pytest
from conftest import draw_folder, draw_picture, opened

from equipoise import UserError
from equipoise.data.images import imbalance_factor
from equipoise.data.sources import find_parts


def test_class_folders(pictures):
    parts = opened(pictures)
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
    parts = opened(tmp_path, holdout=0.4)
    assert parts.train.class_counts == (5, 4), "nothing is held out where there is a validation part"
    assert parts.validation.class_counts == (2, 1)
    assert parts.test.class_counts == (0, 3), "labels are the training part's"


def test_what_is_passed_over_is_told(pictures):
    draw_picture(pictures / "ant" / "2021" / "deep.JPG", 0, 1)
    (pictures / "ant" / ".hidden.png").write_bytes(b"")
    (pictures / ".cache").mkdir()
    draw_picture(pictures / "bee" / ".thumbnails" / "0.png", 0, 1)
    (pictures / "bee" / "notes.txt").write_text("no picture")
    for name in ("one.jpg", "two.PNG", ".hidden.jpg", "notes.txt"):
        (pictures / name).write_bytes(b"")
    found = find_parts(str(pictures))
    assert found.parts["train"].class_counts == (13, 6, 3)
    assert found.notes == (
        f"{pictures}: 2 images beside the folders of the classes: passed over",
        f"{pictures}: 1 file passed over, no images by their ending (.txt)",
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "has no sub-folders; put the images of each class in a folder of its own there"),
        (lambda root: draw_folder(root, {"ant": 3}), "has one class only ('ant'); a classifier needs two or more"),
        (
            lambda root: (draw_folder(root, {"ant": 3}), (root / "bee").mkdir()),
            "class 'bee' has no training images; add some or remove the class",
        ),
        (lambda root: (root / "train").mkdir(), "holds no images in its class folders"),
        (
            lambda root: (draw_folder(root / "train", {"ant": 3, "bee": 2}), draw_folder(root / "test", {"cow": 1})),
            "cow is no class of the training part (2 classes); remove it",
        ),
        (lambda root: draw_folder(root / "test", {"ant": 1, "bee": 1}), "has no training part; name it train/"),
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
        opened(root)
    assert sentence in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


def test_which_folders_are_parts(tmp_path):
    draw_folder(tmp_path / "a", {"bus": 3, "train": 2})
    assert opened(tmp_path / "a").train.class_names == ("bus", "train"), "train is a class: it holds pictures"
    draw_folder(tmp_path / "b" / "train", {"ant": 2, "bee": 1})
    draw_folder(tmp_path / "b" / "raw", {"x": 1})
    found = find_parts(str(tmp_path / "b"))
    assert list(found.parts) == ["train"]
    assert "these folders are no part and were passed over: raw" in found.notes[0]


def test_the_order_is_that_of_the_parts_of_a_path(tmp_path):
    """As it always was: labels, views and fingerprints hang on it."""
    for name in ("a/b.png", "a-c.png", "a/a/z.png", "b.PNG", "a.png"):
        draw_picture(tmp_path / "ant" / name, 0, 0)
    paths = list(map(os.fsdecode, find_parts(str(tmp_path)).parts["train"].images.paths_N))
    assert paths == sorted(paths, key=lambda path: tuple(path.split("/")))
    assert paths[:3] == ["ant/a/a/z.png", "ant/a/b.png", "ant/a-c.png"]


# ---- links


@pytest.mark.parametrize(
    ("link", "leads_to"),
    [
        ("ant/linked.png", "{elsewhere}/ant/0.png"),
        ("bee/relative.png", "../../elsewhere/ant/0.png"),
        ("bee/over.png", "link/ant/0.png"),
        ("cat/other.png", "../../my pictures 2/0.png"),  # its name begins like that of the data
        ("ant/nothing.png", "/nowhere/0.png"),
        ("dog", "../elsewhere/ant"),
    ],
)
def test_links_out_of_the_folder_are_refused_unless_allowed(link, leads_to, pictures, tmp_path):
    elsewhere = draw_folder(tmp_path / "elsewhere", {"ant": 2})
    draw_picture(tmp_path / "my pictures 2" / "0.png", 0, 0)
    (pictures / "bee" / "link").symlink_to(elsewhere)
    (pictures / link).symlink_to(leads_to.format(elsewhere=elsewhere))
    with pytest.raises(UserError) as error:
        opened(pictures)
    place = f"{pictures / link} leads over a link out of the data folder {pictures}, to "
    assert str(error.value).startswith(place)
    assert str(error.value).endswith("if that is meant, allow it with --allow-outside")
    assert len(opened(pictures, allow_outside=True).train) > 21


def test_a_part_that_is_a_link_is_refused_unless_allowed(tmp_path):
    draw_folder(tmp_path / "data" / "train", {"ant": 2, "bee": 1})
    draw_folder(tmp_path / "elsewhere", {"ant": 2})
    (tmp_path / "data" / "test").symlink_to("../elsewhere")
    with pytest.raises(UserError, match="data/test/ant leads over a link out of the data folder"):
        opened(tmp_path / "data")
    assert len(opened(tmp_path / "data", allow_outside=True).test) == 2


def test_links_inside_the_folder_and_the_folder_itself_a_link(pictures, tmp_path):
    (pictures / "ant" / "again.png").symlink_to("../bee/0.png")
    (pictures / "also").symlink_to("ant")
    (tmp_path / "link").symlink_to(pictures)
    assert len(opened(tmp_path / "link").train) == 21 + 1 + 13
