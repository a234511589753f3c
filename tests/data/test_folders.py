"""Class folders: which files are images, which folders are classes, and what is said of all else."""

import os
import unicodedata

import pytest
from conftest import draw_folder, draw_picture, opened
from PIL import Image

from equipoise import UserError
from equipoise.data.sources import find_parts


def test_class_folders(pictures):
    parts = opened(pictures)
    assert parts.kind == "class folders"
    assert parts.train.class_names == ("ant", "bee", "cat")
    assert parts.train.class_counts == (12, 6, 3)
    assert list(parts.named()) == ["train"]
    assert parts.train.images.name(0) == str(pictures / "ant" / "0.png")


def test_what_is_passed_over_is_told(pictures):
    draw_picture(pictures / "ant" / "2021" / "deep.JPG", 0, 1)
    (pictures / "ant" / ".hidden.png").write_bytes(b"")
    (pictures / ".cache").mkdir()
    draw_picture(pictures / "bee" / ".thumbnails" / "0.png", 0, 1)
    (pictures / "bee" / "notes.txt").write_text("no picture")
    for name in ("one.jpg", "two.PNG", ".hidden.jpg"):
        (pictures / name).write_bytes(b"")
    found = find_parts(str(pictures))
    assert found.parts["train"].class_counts == (13, 6, 3)
    assert found.notes == [
        f"2 images in no class folder passed over (first: {pictures}/one.jpg)",
        f"{pictures}: 1 file passed over: .txt, no image (of 'bee' 1)",
    ]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "has no sub-folders; put the images of each class in a folder of its own there"),
        (lambda root: draw_folder(root, {"ant": 3}), "has one class only ('ant'); a classifier needs two or more"),
        (
            lambda root: (draw_folder(root, {"ant": 3}), (root / "bee").mkdir()),
            "one class only ('ant'); a classifier needs two or more; noted: {root}/bee is empty and was passed over",
        ),
        (lambda root: (root / "train").mkdir(), "holds no images in its class folders"),
        (
            lambda root: (draw_folder(root / "train", {"ant": 3, "bee": 2}), draw_folder(root / "test", {"cow": 1})),
            "test: 1 class unknown to the train part: 'cow'",
        ),
        (lambda root: draw_folder(root / "test", {"ant": 1, "bee": 1}), "has no training part; name it train/"),
        (
            lambda root: [draw_folder(root / part, {"ant": 1, "bee": 1}) for part in ("train", "val", "validation")],
            "has two validation parts, val/ and validation/; keep one of them here",
        ),
    ],
)
def test_refused_folders(make, sentence, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(UserError) as error:
        opened(root)
    assert sentence.format(root=root) in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


def test_which_folders_are_parts(tmp_path):
    draw_folder(tmp_path / "a", {"bus": 3, "train": 2})
    assert opened(tmp_path / "a").train.class_names == ("bus", "train"), "train is a class: it holds pictures"
    for part, counts in {"train": {"ant": 5, "bee": 4}, "val": {"ant": 2, "bee": 1}, "test": {"bee": 3}}.items():
        draw_folder(tmp_path / "b" / part, counts)
    draw_folder(tmp_path / "b" / "raw", {"x": 1})
    parts = opened(tmp_path / "b", holdout=0.4)
    assert parts.train.class_counts == (5, 4), "nothing is held out where there is a validation part"
    assert parts.validation.class_counts == (2, 1)
    assert parts.test.class_counts == (0, 3), "labels are the training part's"
    assert "no part (train, val and test hold class folders) and were passed over: raw" in parts.notes[0]


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
        ("dog", "../elsewhere/ant"),
    ],
)
def test_links_out_of_the_folder_are_refused_unless_allowed(link, leads_to, pictures, tmp_path):
    elsewhere = draw_folder(tmp_path / "elsewhere", {"ant": 2})
    draw_picture(tmp_path / "my pictures 2" / "0.png", 0, 0)
    if "over" in link:
        (pictures / "bee" / "link").symlink_to(elsewhere)
    (pictures / link).symlink_to(leads_to.format(elsewhere=elsewhere))
    with pytest.raises(UserError) as error:
        opened(pictures)
    place = pictures / "bee" / "link" / "ant" if "over" in link else pictures / link
    assert str(error.value).startswith(f"{place} leads over a link out of the data folder {pictures}, to ")
    assert str(error.value).endswith("if that is meant, allow it with --allow-outside")
    assert len(opened(pictures, allow_outside=True).train) > 21


def test_links_inside_the_folder_and_the_folder_itself_a_link(pictures, tmp_path):
    (pictures / "ant" / "again.png").symlink_to("../bee/0.png")
    (pictures / "also").symlink_to("ant")
    (tmp_path / "link").symlink_to(pictures)
    assert len(opened(tmp_path / "link").train) == 21 + 1 + 13


def test_links_to_folders_inside_a_class(pictures, tmp_path):
    elsewhere = draw_folder(tmp_path / "elsewhere", {"ant": 2})
    (pictures / "ant" / "more").symlink_to(elsewhere / "ant")
    with pytest.raises(UserError, match="ant/more leads over a link out of the data folder"):
        opened(pictures)
    assert opened(pictures, allow_outside=True).train.class_counts == (14, 6, 3)
    (pictures / "ant" / "more").unlink()
    (pictures / "ant" / "loop").symlink_to(pictures)
    with pytest.raises(UserError, match=r"ant/loop is a link to .*, in which it lies|which it lies in"):
        opened(pictures)


# ---- which files are images


def test_images_are_told_by_their_content(tmp_path):
    """Whatever Pillow opens is an image, whatever it is called."""
    names = ["ok.jpg", "a.jfif", "b.jpe", "c.JPEG", "from_the_web", "d.jpg_large"]
    for name in names:
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / "cat" / name, "JPEG")
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "e.avif", "AVIF")
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "f.jp2", "JPEG2000")
    draw_folder(tmp_path, {"dog": 3})
    parts = opened(tmp_path)
    assert parts.train.class_counts == (8, 3)
    assert parts.notes == []


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)


def test_classes_that_lose_files_are_named(pictures):
    for number in range(3):
        (pictures / "cat" / f"{number}.heic").write_bytes(HEIC)
        (pictures / "bee" / f"{number}.xml").write_text("<annotation/>")
    (pictures / "ant" / "1.nef").write_bytes(b"II*\0" + bytes(60))
    (pictures / "ant" / "1.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(60))
    os.mkfifo(pictures / "ant" / "pipe")
    (pictures / "ant" / "Thumbs.db").write_bytes(b"x")
    notes = find_parts(str(pictures)).notes
    assert [note.removeprefix(f"{pictures}: ") for note in notes] == [
        "1 file passed over: a film: save its frames as images (of 'ant' 1)",
        "1 file passed over: .nef, a camera's raw format: convert it to JPEG (of 'ant' 1)",
        "3 files passed over: .xml, no image (of 'bee' 3)",
        "3 files passed over: HEIC, which Pillow cannot read: convert it to JPEG (macOS: sips -s format jpeg; "
        "elsewhere heif-convert) (of 'cat' 3)",
    ]


def test_a_class_without_any_image_that_can_be_read(tmp_path):
    draw_folder(tmp_path, {"ant": 3, "bee": 2})
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.heic").write_bytes(HEIC)
    with pytest.raises(UserError, match=r"class 'cat' has no training images; add some.*; noted: .*1 file .*HEIC"):
        opened(tmp_path)


# ---- which folders are classes


def test_leftovers_and_empty_folders_are_no_classes(tmp_path):
    draw_folder(tmp_path, {"ant": 3, "bee": 2, ".ipynb_checkpoints": 1, "__MACOSX": 2})
    (tmp_path / "nothing").mkdir()
    parts = opened(tmp_path)
    assert parts.train.class_names == ("ant", "bee")
    assert parts.notes == [
        f"{tmp_path}: __MACOSX/ is left by a program and is no class",
        f"{tmp_path}/nothing is empty and was passed over",
    ]


def test_classes_in_folders_of_classes(tmp_path):
    draw_folder(tmp_path, {"mammal/cat": 2, "mammal/dog": 3, "bird/owl": 2, "bird/hen": 1})
    parts = opened(tmp_path)
    assert parts.train.class_counts == (3, 5), "the folders in the data folder are the classes, but that is said"
    assert parts.notes == [
        f"{tmp_path}: 2 classes with images in sub-folders alone, as bird/ with hen, owl; if those are the classes: "
        "--class-level 2"
    ]
    deeper = opened(tmp_path, class_level=2)
    assert deeper.train.class_names == ("bird/hen", "bird/owl", "mammal/cat", "mammal/dog")
    assert deeper.train.class_counts == (1, 2, 2, 3)
    assert deeper.notes == []
    draw_picture(tmp_path / "mammal" / "stray.png", 0, 1)
    assert opened(tmp_path).notes == [], "one picture there, and they are the classes"
    assert opened(tmp_path, class_level=2).notes == [
        f"1 image in no class folder passed over (first: {tmp_path}/mammal/stray.png)"
    ]


def test_one_folder_around_the_classes(tmp_path):
    draw_folder(tmp_path, {"images/cat": 2, "images/dog": 3})
    with pytest.raises(UserError, match=rf"one class only \('images'\).*: name {tmp_path}/images as data"):
        opened(tmp_path)


# ---- names that look the same

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "épi") for form in ("NFC", "NFD"))


def test_one_name_in_two_unicode_forms(tmp_path):
    draw_folder(tmp_path / "train", {COMPOSED: 3, "blé": 2})
    draw_folder(tmp_path / "test", {DECOMPOSED: 2})
    parts = opened(tmp_path)
    assert parts.train.class_names == (unicodedata.normalize("NFC", "blé"), COMPOSED)
    assert parts.test.class_counts == (0, 2)
    draw_folder(tmp_path / "train", {DECOMPOSED: 1})
    assert opened(tmp_path).train.class_counts == (2, 4), "both folders are the one class"


@pytest.mark.parametrize("other", ["Cat", "c at", "\uff43at"])
def test_names_that_look_alike(other, tmp_path):
    differ = "differ in capitals, blanks or look-alike letters only"
    draw_folder(tmp_path / "train", {"ant": 3, "cat": 2})
    draw_folder(tmp_path / "test", {other: 2})
    sentence = f"class '{other}' is 'cat' in the train part: they {differ}; give them one name"
    with pytest.raises(UserError, match=sentence):
        opened(tmp_path)
    draw_folder(tmp_path / "train", {other: 2})
    names = sorted(["cat", other])
    assert opened(tmp_path).notes == [
        f"classes '{names[0]}' and '{names[1]}' {differ}: if they are one, give them one name"
    ]
