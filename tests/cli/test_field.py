"""Folders, lists and files as people bring them (docs/field.md): what `equipoise data` says, and how it ends."""

import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_folder, draw_picture
from PIL import Image

from equipoise.cli.main import main


def flat(folder: Path, count: int = 4, ending: str = ".png") -> None:
    for number in range(count):
        draw_picture(folder / f"{number}{ending}", 0, number)


def texts(folder: Path, ending: str, count: int = 4) -> None:
    for number in range(count):
        (folder / f"{number}{ending}").write_text("0 .5 .5 .2 .2\n")


def competition(root: Path) -> None:
    draw_folder(root, {"train/daisy": 4, "train/rose": 3})
    flat(root / "test")
    (root / "sample_submission.csv").write_text("id,label\n0,daisy\n1,rose\n")
    (root / "guess.csv").write_text("id,label\ntest/0,daisy\ntest/1,rose\n")


def detection(root: Path) -> None:
    flat(root / "train" / "images")
    (root / "train" / "labels").mkdir()
    texts(root / "train" / "labels", ".txt")


def archives(root: Path) -> None:
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        archive.writestr("a/0.txt", "0")


def listed(text: str | bytes):
    def make(root: Path) -> None:
        draw_folder(root, {"img/a": 3, "img/b": 3})
        (root / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


LIST = "".join(f"img/{name}/{number}.png {label}\n" for label, name in enumerate("ab") for number in range(3))


def misnamed(root: Path) -> None:
    """BMP, WebP and GIF under other endings are read; a compressed JPEG is not."""
    draw_folder(root, {"a": 2, "b": 2})
    for kind in ("BMP", "WEBP", "GIF"):
        Image.new("RGB", (9, 9)).save(root / "a" / f"{kind}.jpg", kind)
    (root / "b" / "gz.jpg").write_bytes(gzip.compress((root / "b" / "0.png").read_bytes()))


def large(root: Path) -> None:
    """A hundred megapixels are read: cameras and scanners of herbaria have them."""
    draw_folder(root, {"a": 2, "b": 2})
    Image.new("L", (11_000, 9_100), 90).save(root / "a" / "scan.png")
    Image.new("1", (40_000, 7_000)).save(root / "b" / "roll.png")


def odd_sizes(root: Path) -> None:
    draw_folder(root, {"a": 2, "b": 2})
    for number, size in enumerate([(1, 1), (1, 3000), (800, 2)]):
        Image.new("RGB", size, "red").save(root / "a" / f"odd{number}.png")


def integers(root: Path) -> None:
    draw_folder(root, {"a": 2, "b": 2})
    Image.fromarray(np.full((9, 9), 90, np.int32)).save(root / "a" / "i.tif")


def beside(ending: str):
    def make(root: Path) -> None:
        draw_folder(root, {"a": 4, "b": 3})
        texts(root / "a", ending)

    return make


def folders(*names: str):
    return lambda root: draw_folder(root, dict.fromkeys(names, 3))


def link_to_nowhere(root: Path) -> None:
    draw_folder(root, {"a": 2, "b": 2})
    (root / "a" / "there.png").symlink_to("/nowhere/x.png")


def pipe(root: Path) -> None:
    draw_folder(root, {"a": 3, "b": 3})
    os.mkfifo(root / "a" / "pipe.png")


FINE = "no problems found"
SITUATIONS = {
    "a competition's test images and its made-up labels": (competition, ".", 0, "names none of these images"),
    "one plant in three versions": (
        folders(*(f"x/{v}/{c}" for v in ("color", "gray") for c in "ab")),
        "x",
        0,
        "x/color as data",
    ),
    "train and test without class folders": (
        lambda root: (flat(root / "train"), flat(root / "test")),
        ".",
        2,
        "without class folders",
    ),
    "masks beside the classes": (
        folders("healthy", "rust", "masks"),
        ".",
        0,
        "'masks' is taken for a class: keep it elsewhere",
    ),
    "good images only in training": (
        folders("train/good", "test/good", "test/hole"),
        ".",
        2,
        "train has one class only ('good')",
    ),
    "more classes in val than in train": (
        folders("train/a", "train/b", "val/a", "val/owl", "val/fox"),
        ".",
        2,
        "2 classes unknown to the train part: 'fox', 'owl'",
    ),
    "fewer classes in val than in train": (folders("train/a", "train/b", "val/b"), ".", 0, FINE),
    "parts in capitals": (folders("Train/a", "Train/b", "VALID/a", "TEST/b"), ".", 0, FINE),
    "a detection data set": (detection, ".", 2, "has images/ and labels/, as data for detection do"),
    "annotations beside the images": (beside(".xml"), ".", 0, "4 files passed over: .xml, no image (of 'a' 4)"),
    "an archive that repeats its folder": (folders("d/d/train/a", "d/d/train/b"), ".", 1, "d/d as data"),
    "an archive for a folder": (
        archives,
        "train.zip",
        2,
        "train.zip is a file (an archive: unpack it",
    ),
    "a folder of archives": (archives, ".", 2, "has no sub-folders; it holds an archive: unpack it"),
    "classes in the names of files": (flat, ".", 2, "put the images of each class in a folder of its own there"),
    "numbers as names of classes": (folders("1", "2", "10", "003"), ".", 0, FINE),
    "odd names of classes": (
        folders("=cmd", "-rf", "a, b", 'say "hi"', "con", "🐙", "[red]r", "100%", "{x}"),
        ".",
        0,
        FINE,
    ),
    "names that differ in capitals": (folders("Cat", "cat"), ".", 0, "'Cat' and 'cat' differ in capitals, blanks"),
    "other kinds of images under .jpg": (
        misnamed,
        ".",
        1,
        "gz.jpg cannot be read (it is an archive: unpack it",
    ),
    "scans of a hundred megapixels": (large, ".", 1, "it has more than 268,435,456 pixels: make it smaller"),
    "images of one pixel, and strips": (odd_sizes, ".", 0, FINE),
    "32 bits of which 8 are used": (integers, ".", 1, "its pixels have 32 bits, of which 8 are used"),
    "labels that begin at 1": (
        listed(LIST.replace(" 1", " 2").replace(" 0", " 1")),
        "list.txt",
        1,
        "no image has the label 0",
    ),
    "a list with backslashes": (listed(LIST.replace("/", "\\").replace("\n", "\r\n")), "list.txt", 0, FINE),
    "a list in UTF-16": (listed(LIST.encode("utf-16")), "list.txt", 0, FINE),
    "a list with several labels a line": (listed(LIST.replace("\n", " 1\n")), "list.txt", 1, "6 of the 6 images"),
    "a link to a disk that is not mounted": (
        link_to_nowhere,
        ".",
        2,
        "is a link to /nowhere/x.png, which is not there",
    ),
    "a named pipe": (pipe, ".", 0, FINE),
    "the URL of an archive": (
        lambda root: None,
        "https://example.org/a.zip",
        2,
        "https://example.org/a.zip cannot be read (an archive: unpack it)",
    ),
}


COUNTS = {
    "a competition's test images and its made-up labels": "7 images, 2 classes",
    "fewer classes in val than in train": "6 images, 2 classes",
    "parts in capitals": "6 images, 2 classes",
    "numbers as names of classes": "12 images, 4 classes",
    "odd names of classes": "27 images, 9 classes",
    "images of one pixel, and strips": "7 images, 2 classes",
    "a named pipe": "6 images, 2 classes",
    "a list with backslashes": "6 images, 2 classes",
    "a list in UTF-16": "6 images, 2 classes",
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(situation, tmp_path, capsys, monkeypatch):
    make, path, code, sentence = SITUATIONS[situation]
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["data", path, "--check"]) == code
    said = capsys.readouterr()
    assert sentence in said.out + said.err
    if counts := COUNTS.get(situation):
        assert f"train: {counts}" in said.out
    assert (code == 2) == (said.out == "")
