"""List files: what is found, what is refused, what a list file is known by."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from equipoise import UserError
from equipoise.config.recipe import Data
from equipoise.data.lists import BENCHMARKS, PUBLISHED, find_list, git_blob, identify, open_lists, read_list
from equipoise.data.sources import find_parts


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def listed(root: Path, **texts: str | bytes):
    """Lists of these texts, by part."""
    files = {part: write(root / f"{part}.txt", text) for part, text in texts.items()}
    return open_lists(root, files, "", allow_outside=False)


def test_a_list(tmp_path):
    """Line ends of both kinds, a path with a space, an empty line, a longer way to say a path; a byte order mark."""
    content = b"\xef\xbb\xbftrain/a b/1.jpg 0\r\n\n./train//c/2.jpg\t1\ntrain/c/3.jpg 1"
    read = read_list(write(tmp_path / "train.txt", content))
    assert read.blob == git_blob(content)
    assert read.paths_N.tolist() == [b"train/a b/1.jpg", b"train/c/2.jpg", b"train/c/3.jpg"]
    assert read.labels_N.tolist() == [0, 1, 1]
    found = listed(tmp_path, train=content)
    assert found.parts["train"].class_names == ("a b", "c")
    assert found.parts["train"].class_counts == (1, 2)
    assert found.parts["train"].images.name(1) == str(tmp_path / "train/c/2.jpg")
    assert found.notes == []


def test_lists_that_repeat_or_disagree_are_noted(tmp_path):
    """What is held out of a list with repeats may be trained on; a label of two meanings is scored wrong."""
    assert "2 images are in it again" in listed(tmp_path, train="a/1.jpg 0\nb/1.jpg 1\na/1.jpg 0\na/1.jpg 0").notes[0]
    found = listed(tmp_path, train="t/a/1.jpg 0\nt/b/1.jpg 1", test="v/b/1.jpg 0\nv/a/1.jpg 1")
    assert found.notes == ["the lists have different folders for one label: do they belong together?"]


IMAGES = '{"images": [{"id": 1, "file_name": "%s"}], "annotations": [%s]}'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.jpg 0\nb.jpg\n", "line 2: 'b.jpg' is not 'path label'"),
        ("a.jpg -1\n", "line 1: 'a.jpg -1' is not 'path label'"),
        ("7\n", "line 1: '7' is not 'path label'"),
        ("a.jpg 1000000\n", "line 1: 'a.jpg 1000000' is not 'path label' with a label of at most 6 digits"),
        ("a\0b.jpg 0\n", "is not 'path label'"),
        ("../a.jpg 0\n", "line 1: '../a.jpg 0' leaves the data folder"),
        ("x/../../a.jpg 0\n", "line 1: 'x/../../a.jpg 0' leaves the data folder"),
        ("/etc/a.jpg 0\n", "line 1: '/etc/a.jpg 0' leaves the data folder"),
        ("\n \n", "names no images"),
        ("{", "is not iNaturalist's JSON"),
        (IMAGES.replace(', "annotations": [%s]', "") % "a", "that of the test part has no labels"),
        (IMAGES % ("a", ""), "with images and an annotation of each"),
        (IMAGES % ("../a", '{"image_id": 1, "category_id": 2}'), "line 1: '../a 2' leaves the data folder"),
    ],
)
def test_refused_lists(text, sentence, tmp_path):
    file = tmp_path / ("train2018.json" if text[0] in "{[" else "list.txt")
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
    found = listed(tmp_path, train=train, test="val/bee/1.jpg 1\nval/cat/9.jpg 2\n")
    assert found.parts["train"].class_names == found.parts["test"].class_names == ("ant", "bee", "cat")
    assert found.parts["test"].class_counts == (0, 1, 1)
    assert found.notes == []
    with pytest.raises(UserError, match=r"test.txt has label 3, but the training list's classes are 0 to 2"):
        listed(tmp_path, train=train, test="v/a/1.jpg 3\n")


@pytest.mark.parametrize(
    "texts",
    [
        {"train": "1.jpg 0\n2.jpg 1\n"},  # all images in one folder
        {"train": "t/a/1.jpg 0\nt/b/1.jpg 0\nt/c/1.jpg 1\n"},  # one class in two folders
        {"train": "t/a/1.jpg 0\nt/a/2.jpg 1\n"},  # two classes in one folder
        {"train": "t/a/1.jpg 0\nt/b/1.jpg 1\n", "test": "v/b/1.jpg 0\nv/a/1.jpg 1\n"},  # lists that disagree
    ],
)
def test_folders_that_do_not_name_classes(texts, tmp_path):
    assert listed(tmp_path, **texts).parts["train"].class_names == ("0", "1")


# ---- published lists


@pytest.mark.parametrize(
    ("name", "images", "classes"),
    [
        ("ImageNet_LT_val", 20_000, 1000),
        ("ImageNet_LT_test", 50_000, 1000),
        ("iNaturalist18_val", 24_426, 8142),
        ("Places_LT_train", 62_500, 365),
        ("Places_LT_test", 36_500, 365),
    ],
)
def test_published_lists_are_known(name, images, classes, shared_data, tmp_path):
    read = read_list(shared_data / "lists" / f"{name}.txt")
    known = PUBLISHED[f"{name}.txt"]
    assert read.blob == known.blob
    assert (len(read.paths_N), len(set(read.labels_N.tolist()))) == (images, classes)
    assert identify(read) == (f"{read.file}: the published {name}.txt (git blob {known.blob})", "")
    found = open_lists(tmp_path, {"test": read.file}, "", allow_outside=False)
    assert found.notes == []
    assert not found.parts["test"].class_names[0].isdigit(), "folders name the classes"
    # The same under the name of another, and without its last line.
    whole = read.file.read_bytes()
    for content, own in ((whole, f"the published {name}.txt"), (whole[:-30], "no published list")):
        other = PUBLISHED["ImageNet_LT_train.txt"]
        identity, note = identify(read_list(write(tmp_path / other.name, content[: content.rindex(b"\n") + 1])))
        assert own in identity
        assert note.startswith(f"{tmp_path / other.name} is not the published {other.name} (git blob {other.blob}): ")


def test_inaturalist_json_is_the_canonical_list(shared_data, tmp_path):
    """The official file, rebuilt from the list: its annotations may come in any order."""
    lines = (shared_data / "lists" / "iNaturalist18_val.txt").read_text().splitlines()
    images, annotations = [], []
    for number, line in enumerate(lines):
        path, label = line.rsplit(" ", 1)
        images.append({"id": 500_000 - number, "file_name": path, "height": 600, "width": 800, "license": 3})
        annotations.append({"id": number, "image_id": 500_000 - number, "category_id": int(label)})
    random.Random(0).shuffle(annotations)
    table = {"info": {"year": 2018}, "images": images, "categories": [], "annotations": annotations}
    read = read_list(write(tmp_path / "val2018.json", json.dumps(table)))
    assert read.blob == "4c23900857fd0f5adcd4cc0dffef345039eeb05f"


def test_where_lists_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, known = tmp_path / "imagenet", BENCHMARKS["imagenet-lt"]["train"]
    assert find_list(root, known) is None
    of_authors = Path("ImageNet_LT/ImageNet_LT_train.txt")
    for place in ("dataset" / of_authors, root / of_authors, root / of_authors.name):  # the last one found comes first
        write(place, "a.jpg 0\n")
        assert find_list(root, known) == place
    official = write(root / "train2018.json", "{}")
    assert find_list(root, BENCHMARKS["inat2018"]["train"]) == official
