"""List files: read, named by fingerprint, refused where wrong; iNaturalist's JSON as the list it stands for."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from equipoise import UserError
from equipoise.config.recipe import Data
from equipoise.data.images import missing_files
from equipoise.data.lists import BENCHMARKS, PUBLISHED, describe, find_list, git_blob, open_lists, read_list
from equipoise.data.sources import find_parts


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def opened(root: Path, **texts: str | bytes):
    """Lists of these texts, by part."""
    files = {part: str(write(root / f"{part}.txt", text)) for part, text in texts.items()}
    return open_lists(root, files, "", allow_outside=False)


def test_a_list(tmp_path):
    """Line ends of both kinds, a path with a space, an empty line, a longer way to say a path; a byte order mark."""
    content = b"\xef\xbb\xbftrain/a b/1.jpg 0\r\n\n./train//c/2.jpg\t1\ntrain/c/3.jpg 1"
    read = read_list(write(tmp_path / "train.txt", content))
    assert read.blob == git_blob(content)
    assert read.paths_N.tolist() == [b"train/a b/1.jpg", b"train/c/2.jpg", b"train/c/3.jpg"]
    assert read.labels_N.tolist() == [0, 1, 1]
    found = opened(tmp_path, train=content)
    assert found.parts["train"].class_names == ("a b", "c")
    assert found.parts["train"].class_counts == (1, 2)
    assert found.parts["train"].images.name(1) == str(tmp_path / "train/c/2.jpg")
    assert found.notes == ()


IMAGES = '{"images": [{"id": 1, "file_name": "%s"}], "annotations": [%s]}'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.jpg 0\nb.jpg\n", "line 2: 'b.jpg' is not 'path label'"),
        ("a.jpg -1\n", "line 1: 'a.jpg -1' is not 'path label'"),
        ("a.jpg 1.5\n", "line 1: 'a.jpg 1.5' is not 'path label'"),
        ("7\n", "line 1: '7' is not 'path label'"),
        ("a.jpg 1000000\n", "line 1: 'a.jpg 1000000' is not 'path label' with a label of at most 6 digits"),
        ("a\0b.jpg 0\n", "is not 'path label'"),
        ("../a.jpg 0\n", "line 1: the path '../a.jpg' leaves the data folder"),
        ("x/../../a.jpg 0\n", "line 1: the path 'x/../../a.jpg' leaves the data folder"),
        ("/etc/a.jpg 0\n", "line 1: the path '/etc/a.jpg' leaves the data folder"),
        ("\n \n", "names no images"),
        (None, "cannot be read (no such file or directory)"),
        ("{", "is not iNaturalist's JSON"),
        ("[" * 100_000, "is not iNaturalist's JSON"),
        (IMAGES.replace(', "annotations": [%s]', "") % "a", "that of the test part has no labels"),
        (IMAGES % ("a", ""), "with images and an annotation of each"),
        (IMAGES % ("../a", '{"image_id": 1, "category_id": 2}'), "line 1: the path '../a' leaves the data folder"),
    ],
)
def test_refused_lists(text, sentence, tmp_path):
    file = tmp_path / ("train2018.json" if text and text[0] in "{[" else "list.txt")
    if text is not None:
        write(file, text)
    with pytest.raises(UserError) as error:
        read_list(file)
    assert sentence in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.long
def test_a_million_lines(tmp_path):
    """They are kept as one array, which processes share after a fork."""
    lines = (f"train_val2018/Plantae/{number // 123}/{number:032x}.jpg {number // 123}\n" for number in range(10**6))
    write(tmp_path / "list.txt", "".join(lines))
    images = find_parts(Data(str(tmp_path), train_list=f"{tmp_path}/list.txt")).parts["train"]
    assert (len(images), len(images.class_names)) == (10**6, 8131)
    assert images.images.paths_N.nbytes < 80 * 10**6


@pytest.mark.parametrize("text", ["a.jpg 0\n", "", "äö.jpg 3\r\n"])
def test_the_fingerprint_is_gits(text, tmp_path):
    file = write(tmp_path / "list.txt", text)
    told = subprocess.run(["git", "hash-object", "--no-filters", str(file)], capture_output=True, text=True, check=True)
    assert git_blob(file.read_bytes()) == told.stdout.strip()


# ---- labels and names


def test_one_set_of_classes(tmp_path):
    train = "train/ant/1.jpg 0\ntrain/cat/1.jpg 2\ntrain/cat/2.jpg 2\n"
    found = opened(tmp_path, train=train, test="val/bee/1.jpg 1\nval/cat/9.jpg 2\n")
    assert found.parts["train"].class_names == found.parts["test"].class_names == ("ant", "bee", "cat")
    assert found.parts["test"].class_counts == (0, 1, 1)
    assert found.notes == ()
    with pytest.raises(UserError, match=r"test.txt has label 3, but the training list's classes are 0 to 2"):
        opened(tmp_path, train=train, test="v/a/1.jpg 3\n")


@pytest.mark.parametrize(
    "text",
    ["1.jpg 0\n2.jpg 1\n", "t/a/1.jpg 0\nt/b/1.jpg 0\nt/c/1.jpg 1\n", "t/a/1.jpg 0\nt/a/2.jpg 1\n"],
    ids=["all images in one folder", "one class in two folders", "two classes in one folder"],
)
def test_folders_that_do_not_name_classes(text, tmp_path):
    assert opened(tmp_path, train=text).parts["train"].class_names == ("0", "1")


def test_lists_that_disagree_about_a_label_give_numbers(tmp_path):
    train, test = "train/ant/1.jpg 0\ntrain/bee/1.jpg 1\n", "val/bee/1.jpg 0\nval/ant/1.jpg 1\n"
    assert opened(tmp_path, train=train, test=test).parts["train"].class_names == ("0", "1")


def test_repeated_and_absent_images(tmp_path):
    write(tmp_path / "t/a/1.jpg", "")
    (tmp_path / "t" / "b").mkdir()
    found = opened(tmp_path, train="t/b/2.jpg 1\nt/b/1.jpg 1\nt/a/1.jpg 0\nt/b/2.jpg 0\nt/a/1.jpg 0\nv/1.jpg 0\n")
    assert found.notes == (f"{tmp_path}/train.txt: 2 images are in it more than once (first: t/b/2.jpg)",)
    assert missing_files(found.parts["train"], tmp_path) == [0, 1, 3, 5]
    assert found.faults["train"].startswith(f"{tmp_path}/t/b/2.jpg is not there, and 4 of the 6 images of")


# ---- published lists


@pytest.mark.parametrize(
    "name", ["ImageNet_LT_val", "ImageNet_LT_test", "iNaturalist18_val", "Places_LT_train", "Places_LT_test"]
)
def test_published_lists_are_known(name, shared_data, tmp_path):
    read = read_list(shared_data / "lists" / f"{name}.txt")
    known = PUBLISHED[f"{name}.txt"]
    assert read.blob == known.blob
    assert (len(read.paths_N), len(set(read.labels_N.tolist()))) == (known.images, known.classes)
    assert describe(read) == (f"{read.file}: the published {name}.txt (git blob {known.blob})", [])
    found = open_lists(tmp_path, {"test": str(read.file)}, "", allow_outside=False)
    assert found.notes == ()
    assert not found.parts["test"].class_names[0].isdigit(), "folders name the classes"


def test_a_published_list_that_departs(shared_data, tmp_path):
    content = (shared_data / "lists" / "ImageNet_LT_val.txt").read_bytes()
    shorter = read_list(write(tmp_path / "ImageNet_LT_val.txt", b"".join(content.splitlines(keepends=True)[:-20])))
    known = PUBLISHED["ImageNet_LT_val.txt"].blob
    identity, odd = describe(shorter)
    assert identity == f"{shorter.file}: git blob {shorter.blob}, no published list that is known here"
    assert odd == [
        f"{shorter.file} is not the published ImageNet_LT_val.txt (git blob {known}): that has 20,000 images of 1,000 "
        "classes, this one 19,980 of 999"
    ]


@pytest.mark.parametrize("shuffled", [False, True])
def test_inaturalist_json_is_the_canonical_list(shuffled, shared_data, tmp_path):
    """The official file, rebuilt from the list: its annotations may come in any order."""
    lines = (shared_data / "lists" / "iNaturalist18_val.txt").read_text().splitlines()
    images, annotations = [], []
    for number, line in enumerate(lines):
        path, label = line.rsplit(" ", 1)
        images.append({"id": 500_000 - number, "file_name": path, "height": 600, "width": 800, "license": 3})
        annotations.append({"id": number, "image_id": 500_000 - number, "category_id": int(label)})
    if shuffled:
        random.Random(0).shuffle(annotations)
    table = {"info": {"year": 2018}, "images": images, "categories": [], "annotations": annotations}
    read = read_list(write(tmp_path / "val2018.json", json.dumps(table)))
    assert read.blob == "4c23900857fd0f5adcd4cc0dffef345039eeb05f"


def test_where_lists_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "imagenet"
    known = BENCHMARKS["imagenet-lt"]["train"]
    assert find_list(root, known) is None
    places = [
        Path("dataset/ImageNet_LT/ImageNet_LT_train.txt"),
        root / "ImageNet_LT" / "ImageNet_LT_train.txt",
        root / "ImageNet_LT_train.txt",
    ]
    for place in places:  # the last one found comes first
        write(place, "a.jpg 0\n")
        assert find_list(root, known) == place
    official = write(root / "train2018.json", "{}")
    assert find_list(root, BENCHMARKS["inat2018"]["train"]) == official
