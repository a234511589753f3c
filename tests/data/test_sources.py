"""What lies at a path is recognised, opened and divided; and what cannot be trained on or scored is refused."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import draw_folder, write_parquet

from benchmarks.rehearsal import build_imagenet, build_inaturalist
from equipoise import UserError
from equipoise.data.lists import PUBLISHED, git_blob
from equipoise.data.sources import (
    Source,
    disagreements,
    find_parts,
    open_part,
    open_parts,
    recognise,
    survey,
    write_lists,
)


def test_refused_paths(tmp_path):
    for path in (str(tmp_path / "absent"), "a\0b", "x" * 5000):
        with pytest.raises(UserError, match="there is no file or folder at"):
            open_parts(path)
    with pytest.raises(UserError, match="name a folder with --data FOLDER"):
        open_parts("")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match="is a file, but no Parquet file"):
        open_parts(str(tmp_path / "file.txt"))


def test_scoring_another_folder_keeps_the_labels_of_the_model(tmp_path):
    draw_folder(tmp_path, {"bee": 2, "cat": 1})
    images = open_part(str(tmp_path), "test", ("ant", "bee", "cat"))
    assert images.class_counts == (0, 2, 1)
    with pytest.raises(UserError, match="has a class 'cat' that the model does not know"):
        open_part(str(tmp_path), "test", ("ant", "bee"))


def test_scoring_takes_all_only_of_what_is_not_divided(tmp_path):
    draw_folder(tmp_path / "train", {"ant": 2, "bee": 1})
    with pytest.raises(
        UserError, match=r"has no test part; it has train: score one of them with equipoise evaluate .* --split PART"
    ):
        open_part(str(tmp_path), "test", ("ant", "bee"))
    assert len(open_part(str(tmp_path), "train", ("ant", "bee"))) == 3


def test_scoring_parquet_maps_labels_by_name(tmp_path):
    features = {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_parquet(tmp_path / "test.parquet", [0, 0, 1], metadata=metadata)
    assert open_part(str(tmp_path), "test", ("cat", "dog", "emu")).class_counts == (1, 2, 0)
    write_parquet(tmp_path / "test.parquet", [0, 5, 1, 1, 1, 1])
    with pytest.raises(UserError, match="has label 5, but the model knows the classes 0 to 2"):
        open_part(str(tmp_path), "test", ("cat", "dog", "emu"))


def test_digits_are_whole_balanced_and_disjoint():
    parts = open_parts("digits")
    assert parts.test is not None
    assert parts.test.class_counts == (50,) * 10
    assert len(parts.train) + len(parts.test) == 1797
    assert parts.train.images.pixels_NHW3.max() == 255
    every = np.concatenate([part.images.pixels_NHW3.reshape(len(part), -1) for part in (parts.train, parts.test)])
    assert len(np.unique(every, axis=0)) == 1797


# ---- recognition

# Some of its 1,000 folders.
IMAGENET = [f"n{number:08}" for number in (1440764, 1443537, 1484850, 1491361, 13052670, 13054560, 13133613, 15075141)]


def plant(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return str(root)


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        ([f"train/{name}/1.JPEG" for name in IMAGENET], "imagenet-lt"),
        ([f"val/{name}/1.JPEG" for name in IMAGENET], "imagenet-lt"),
        ([f"train/{name}/1.JPEG" for name in IMAGENET[:3]], ""),  # Imagenette and others: their classes are their own
        ([f"train/n{label:08}/1.JPEG" for label in range(1000)], ""),  # never by a count of classes
        (("train2018.json", "images/1.jpg"), "inat2018"),
        (("ImageNet_LT/ImageNet_LT_val.txt", "train/n01440764/1.JPEG"), "imagenet-lt"),
        (("Places_LT/Places_LT_train.txt", "train/airfield/1.jpg"), "places-lt"),
        (("train/cat/1.jpg", "val/cat/2.jpg"), ""),
        (("ImageNet_LT_test.txt", "images/1.jpg"), "imagenet-lt"),
        (("train_val2018/Aves/1/1.jpg",), "inat2018"),
        (("Places_LT_train.txt", "train/airfield/1.jpg"), "places-lt"),
        (("cat/1.jpg", "dog/1.jpg"), ""),
        (("train.parquet",), ""),
        (("cifar-10-batches-py/data_batch_1",), "cifar10"),
        (("cifar-100-binary.tar.gz",), "cifar100"),
    ],
)
def test_recognised_by_names_alone(paths, name, tmp_path):
    assert recognise(plant(tmp_path, *paths)) == name


# ---- list files


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return build_imagenet(tmp_path_factory.mktemp("imagenet"), counts=(5, 2))


@pytest.fixture(scope="module")
def inaturalist(tmp_path_factory):
    return build_inaturalist(tmp_path_factory.mktemp("inat"), counts=(5, 2))


def test_imagenet_lt(imagenet):
    parts = open_parts(Source(str(imagenet), "imagenet-lt"))
    assert parts.kind == "list files of imagenet-lt"
    assert {name: part.class_counts for name, part in parts.named().items()} == {
        "train": (5, 2), "validation": (3, 3), "test": (3, 3)
    }  # fmt: skip
    assert parts.train.class_names == ("n00000000", "n00000001")
    assert parts.validation is not None
    assert parts.validation.images.name(0).startswith(str(imagenet / "train" / "n00000000")), "as in ImageNet-LT"
    assert parts.test is not None
    assert parts.test.images.name(0) == str(imagenet / "val" / "n00000000" / "ILSVRC2012_val_00000001.JPEG")


def test_inaturalist_by_its_json_and_by_its_lists(inaturalist, tmp_path, monkeypatch):
    of_json = open_parts(Source(str(inaturalist), "inat2018"))
    assert of_json.validation is None, "its validation images are the literature's test set"
    assert of_json.train.class_names == ("Plantae/0", "Insecta/1")
    monkeypatch.chdir(tmp_path)
    told = write_lists(Source(str(inaturalist)), tmp_path / "dataset" / "iNaturalist18")
    assert [line.partition(", ")[0] for line in told] == [
        f"written: {tmp_path}/dataset/iNaturalist18/iNaturalist18_{part}.txt: git blob "
        + git_blob((tmp_path / f"dataset/iNaturalist18/iNaturalist18_{part}.txt").read_bytes())
        for part in ("train", "val")
    ]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train_val2018").symlink_to(inaturalist / "train_val2018")
    of_lists = open_parts(Source(str(tmp_path / "images"), "inat2018", allow_outside=True))  # it is a link
    assert of_lists.train.images.paths_N.tolist() == of_json.train.images.paths_N.tolist()
    assert of_lists.train.labels_N.tolist() == of_json.train.labels_N.tolist()


def test_a_departing_json_is_told_from_the_published_list(inaturalist):
    """Its name is not the list's, but it stands for it."""
    problems = survey(Source(str(inaturalist)))[1]
    for name, said in (("train", "437,513 images of 8,142 classes, this one 7 of 2"), ("val", "24,426 images")):
        blob = PUBLISHED[f"iNaturalist18_{name}.txt"].blob
        told = (
            f"{inaturalist}/{name}2018.json is not the published iNaturalist18_{name}.txt (git blob {blob}): that has "
        )
        assert any(problem.startswith(told + said) for problem in problems)


def test_lists_are_not_overwritten(inaturalist, tmp_path):
    (tmp_path / "iNaturalist18_val.txt").write_text("mine 0\n")
    with pytest.raises(UserError, match="is there already and differs; remove it or name another folder"):
        write_lists(Source(str(inaturalist)), tmp_path)
    with pytest.raises(UserError, match=r"has neither train2018.json nor val2018.json"):
        write_lists(Source(str(tmp_path)), tmp_path)


def test_an_absent_list_of_a_benchmark(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path / "data")
    (tmp_path / "data" / "ImageNet_LT_test.txt").unlink()
    source = Source(str(tmp_path / "data"), "imagenet-lt")
    with pytest.raises(UserError) as error:
        open_parts(source)
    assert str(error.value) == (
        "the list ImageNet_LT_test.txt (50,000 images of 1,000 classes, git blob "
        f"76a2fb9749d6cd29e765cc4f8c270f2504131e2f) is not in {source.path}, {source.path}/ImageNet_LT or "
        "dataset/ImageNet_LT; put it there, or name it with --test-list FILE"
    )
    with pytest.raises(UserError, match=r"the list ImageNet_LT_test.txt .*--test-list FILE"):
        open_part(source, "test", ("0", "1"))
    assert len(open_part(source, "validation", ("0", "1"))) == 6, "what is there can be scored"
    given = Source(source.path, lists={"train": str(imagenet / "ImageNet_LT_train.txt")})
    assert open_parts(given).test is None


def test_absent_images_of_a_list(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val")
    source = Source(str(tmp_path / "data"), "imagenet-lt")
    blob = git_blob((imagenet / "ImageNet_LT_test.txt").read_bytes())
    sentence = (
        f"{tmp_path}/data/val/n00000000/ILSVRC2012_val_00000001.JPEG is not there, and 6 of the 6 images of "
        f"{tmp_path}/data/ImageNet_LT_test.txt (git blob {blob}) are missing; its paths are looked for below the "
        "folder given as data"
    )
    with pytest.raises(UserError) as error:
        open_parts(source)
    assert str(error.value) == sentence
    with pytest.raises(UserError, match="are missing"):
        open_part(source, "test", ("0", "1"))
    assert disagreements(find_parts(source)) == [sentence]
    assert len(open_part(source, "train", ("0", "1"))) == 7


def test_training_and_test_that_overlap(imagenet, tmp_path):
    train = imagenet / "ImageNet_LT_train.txt"
    (tmp_path / "test.txt").write_text(train.read_text().splitlines()[0] + "\n")
    lists = {"train": str(train), "validation": f"{imagenet}/ImageNet_LT_val.txt", "test": str(tmp_path / "test.txt")}
    source = Source(str(imagenet), lists=lists)
    with pytest.raises(UserError, match=r"1 images of .*test.txt are in .*ImageNet_LT_train.txt too \(first: train/n0"):
        open_parts(source)


def test_validation_and_test_that_overlap(imagenet):
    """The best checkpoint and tau would be chosen on test images."""
    lists = {part: str(imagenet / f"ImageNet_LT_{part}.txt") for part in ("train", "test")}
    source = Source(str(imagenet), lists={**lists, "validation": lists["test"]})
    with pytest.raises(UserError, match=r"6 images of .*ImageNet_LT_test.txt are in .*ImageNet_LT_test.txt too"):
        open_parts(source)


def test_a_training_list_with_gaps(imagenet, tmp_path):
    lines = (imagenet / "ImageNet_LT_train.txt").read_text().replace(" 1\n", " 3\n")
    (tmp_path / "train.txt").write_text(lines)
    source = Source(str(imagenet), lists={"train": str(tmp_path / "train.txt")})
    with pytest.raises(UserError, match="class '1' has no training images; add some or remove the class"):
        open_parts(source)
    problems = "\n".join(survey(source)[1])
    assert "class '1' has no training images" in problems
    assert "class '2' has no training images" in problems


def test_scoring_by_lists_goes_by_numbers(imagenet):
    """A model may call its classes by numbers, as the authors' checkpoints do; by other names they are others."""
    images = open_part(Source(str(imagenet), "imagenet-lt"), "test", ("0", "1", "2"))
    assert images.class_names == ("0", "1", "2")
    assert images.class_counts == (3, 3, 0)
    with pytest.raises(
        UserError, match=r"has the label 0 for images in n\d+, which is 'cock' to the model: this is other"
    ):
        open_part(Source(str(imagenet), "imagenet-lt"), "test", ("cock", "hen", "ostrich"))
    with pytest.raises(UserError, match="has label 1, but the model knows the classes 0 to 0"):
        open_part(Source(str(imagenet), "imagenet-lt"), "test", ("0",))


# ---- what leads out of the data folder


def test_lists_whose_images_are_links_out_of_the_folder(imagenet, tmp_path):
    (tmp_path / "data").mkdir()
    for name in os.listdir(imagenet):
        (tmp_path / "data" / name).symlink_to(imagenet / name)
    with pytest.raises(
        UserError, match=rf"leads over a link out of the data folder .*, to {imagenet}.* --allow-outside"
    ):
        open_parts(Source(str(tmp_path / "data"), "imagenet-lt"))
    assert open_parts(Source(str(tmp_path / "data"), "imagenet-lt", allow_outside=True)).train.class_counts[0] > 0
    # One image alone, in a folder that is none.
    copy = shutil.copytree(imagenet, tmp_path / "copy")
    image = open_parts(Source(str(copy), "imagenet-lt")).train.images.path(3)
    shutil.copy(image, tmp_path / "outside.jpg")
    image.unlink()
    image.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(UserError, match=rf"^{image} leads over a link out of"):
        open_parts(Source(str(copy), "imagenet-lt"))


def test_lists_with_paths_out_of_the_folder(pictures, tmp_path):
    lines = [f"{pictures}/ant/0.png 0", "../my pictures/bee/0.png 1", "ant/1.png 0"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    lists = {"train": str(tmp_path / "list.txt")}
    with pytest.raises(UserError, match=r"list.txt, line 1: the path '/.*' leaves the data folder; .* --allow-outside"):
        open_parts(Source(str(pictures), lists=lists))
    parts = open_parts(Source(str(pictures), lists=lists, allow_outside=True))
    assert [parts.train.images.name(index) for index in range(3)] == [
        str(pictures / "ant" / "0.png"),
        f"{pictures}/../my pictures/bee/0.png",
        str(pictures / "ant" / "1.png"),
    ]


def test_archives_and_tables_that_are_links_out_of_the_folder(tmp_path):
    write_parquet(tmp_path / "elsewhere.parquet", [0, 1])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").symlink_to("../elsewhere.parquet")
    with pytest.raises(UserError, match=r"data/train.parquet leads over a link out of the data folder"):
        open_parts(str(tmp_path / "data"))
    assert len(open_parts(Source(str(tmp_path / "data"), allow_outside=True)).train) == 2
    assert len(open_parts(str(tmp_path / "data" / "train.parquet")).train) == 2, "named itself, it is meant"
    (tmp_path / "data" / "cifar-10-batches-bin").symlink_to("../elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match=r"data/cifar-10-batches-bin leads over a link"):
        open_parts(str(tmp_path / "data"))
