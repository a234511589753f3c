"""What lies at a path is recognised, opened and divided; and what cannot be trained on or scored is refused."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_folder, opened, write_parquet
from torchvision.datasets import CIFAR10, CIFAR100

from benchmarks.rehearsal import build_imagenet, build_inaturalist
from equipoise import UserError
from equipoise.config.recipe import Data
from equipoise.data.lists import PUBLISHED
from equipoise.data.packed import pack
from equipoise.data.sources import find_cifar, find_parts, labelled_as, open_cifar, part_of, recognise, survey


def test_refused_paths(tmp_path):
    for path in (tmp_path / "absent", "a\0b", "x" * 5000):
        with pytest.raises(UserError, match="there is no file or folder at"):
            opened(path)
    with pytest.raises(UserError, match="name a folder with --data FOLDER"):
        opened("")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match=r"is a file .empty: 0 bytes.; name a folder of class folders, a table"):
        opened(tmp_path / "file.txt")


def open_part(data: Data, part: str, class_names):
    """The images of a part as a model of these classes is scored on them."""
    found = find_parts(data)
    return labelled_as(part_of(found, part, data.path), class_names, found.named)


def test_scoring_another_folder_keeps_the_labels_of_the_model(tmp_path):
    draw_folder(tmp_path / "all", {"bee": 2, "cat": 1})
    images = open_part(Data(str(tmp_path / "all")), "test", ("ant", "bee", "cat"))
    assert images.class_counts == (0, 2, 1)
    assert np.array_equal(images.labels_N, [1, 1, 2])
    with pytest.raises(UserError, match=r"1 class unknown to the model: 'cat' .number 1.: this is"):
        open_part(Data(str(tmp_path / "all")), "test", ("ant", "bee"))
    (tmp_path / "all").rename(tmp_path / "train")  # of what is divided, all is not taken
    with pytest.raises(UserError, match=r"has no test part; it has train: score one of them with --split"):
        open_part(Data(str(tmp_path)), "test", ("bee", "cat"))
    assert len(open_part(Data(str(tmp_path)), "train", ("bee", "cat"))) == 3


def test_scoring_parquet_maps_labels_by_name(tmp_path):
    features = {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_parquet(tmp_path / "test.parquet", [0, 0, 1], metadata=metadata)
    assert open_part(Data(str(tmp_path)), "test", ("cat", "dog", "emu")).class_counts == (1, 2, 0)
    write_parquet(tmp_path / "test.parquet", [0, 5, 1, 1, 1, 1])
    with pytest.raises(UserError, match=r"1 class unknown to the model: '5' .number 5."):
        open_part(Data(str(tmp_path)), "test", ("cat", "dog", "emu"))


def test_digits_are_whole_balanced_and_disjoint():
    parts = opened("digits")
    assert parts.test.class_counts == (50,) * 10
    assert len(parts.train) + len(parts.test) == 1797
    assert parts.train.images.pixels_NHW3.max() == 255
    every = np.concatenate([part.images.pixels_NHW3.reshape(len(part), -1) for part in (parts.train, parts.test)])
    assert len(np.unique(every, axis=0)) == 1797


# ---- recognition


def plant(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return str(root)


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (("train/n01440764/1.JPEG",), ""),  # Imagenette and others: their classes are their own
        (("train2018.json", "images/1.jpg"), "inat2018"),
        (("train_val2018/Aves/1/1.jpg",), "inat2018"),
        (("ImageNet_LT/ImageNet_LT_val.txt", "train/n01440764/1.JPEG"), "imagenet-lt"),
        (("ImageNet_LT_test.txt", "images/1.jpg"), "imagenet-lt"),
        (("Places_LT/Places_LT_train.txt", "train/airfield/1.jpg"), "places-lt"),
        (("train/cat/1.jpg", "val/cat/2.jpg"), ""),
        (("cat/1.jpg", "dog/1.jpg"), ""),
        (("train.parquet",), ""),
        (("cifar-10-batches-py/data_batch_1",), "cifar10"),
        (("cifar-100-python/train",), "cifar100"),
    ],
)
def test_recognised_by_names_alone(paths, name, tmp_path, monkeypatch):
    assert recognise(plant(tmp_path / "data", *paths)) == name
    # In the working directory, where the authors' code has them, the lists of ImageNet are for its images alone.
    monkeypatch.chdir(tmp_path)
    plant(tmp_path, "dataset/ImageNet_LT/ImageNet_LT_train.txt")
    is_imagenet = "train/n01440764/1.JPEG" in paths
    assert recognise(str(tmp_path / "data")) == ("imagenet-lt" if is_imagenet else name)


# ---- list files


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return build_imagenet(tmp_path_factory.mktemp("imagenet"), counts=(5, 2))


@pytest.fixture
def copy(imagenet, tmp_path):
    return shutil.copytree(imagenet, tmp_path / "data")


@pytest.fixture(scope="module")
def inaturalist(tmp_path_factory):
    return build_inaturalist(tmp_path_factory.mktemp("inat"), counts=(5, 2))


def test_imagenet_lt(imagenet):
    parts = opened(imagenet, benchmark="imagenet-lt")
    assert parts.kind == "list files of imagenet-lt"
    counts = {name: part.class_counts for name, part in parts.named().items()}
    assert counts == {"train": (5, 2), "validation": (3, 3), "test": (3, 3)}
    assert parts.train.class_names == ("n00000000", "n00000001")
    assert parts.validation.images.name(0).startswith(str(imagenet / "train" / "n00000000")), "as in ImageNet-LT"
    assert parts.test.images.name(0) == str(imagenet / "val" / "n00000000" / "ILSVRC2012_val_00000001.JPEG")


def test_inaturalist_by_its_json_and_by_its_lists(inaturalist, tmp_path, monkeypatch):
    of_json = opened(inaturalist, benchmark="inat2018")
    assert of_json.validation is None, "its validation images are the literature's test set"
    assert of_json.train.class_names == ("Plantae/0", "Insecta/1")
    for note, name in zip(of_json.notes, ("train", "val"), strict=True):
        blob = PUBLISHED[f"iNaturalist18_{name}.txt"].blob
        assert f"{name}2018.json is not the published iNaturalist18_{name}.txt (git blob {blob}): git blob" in note
    monkeypatch.chdir(tmp_path)
    for name, part in (("train", of_json.train), ("val", of_json.test)):
        lines = zip(part.images.paths_N.tolist(), part.labels_N.tolist(), strict=True)
        file = tmp_path / "dataset" / "iNaturalist18" / f"iNaturalist18_{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{path.decode()} {label}\n" for path, label in lines))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train_val2018").symlink_to(inaturalist / "train_val2018")
    lists = opened(tmp_path / "images", benchmark="inat2018", allow_outside=True)  # it is a link
    assert "iNaturalist18_train.txt" in lists.described[0]
    assert lists.train.fingerprint() == of_json.train.fingerprint()


def test_an_absent_list_of_a_benchmark(copy):
    (copy / "ImageNet_LT_test.txt").unlink()
    data = Data(str(copy), "imagenet-lt")
    with pytest.raises(UserError) as error:
        opened(copy, benchmark="imagenet-lt")
    name = "ImageNet_LT_test.txt"
    places = f"{copy}/{name}, {copy}/ImageNet_LT/{name}, dataset/ImageNet_LT/{name}"
    assert str(error.value).startswith(f"the list {name} (git blob 76a2fb9749d6cd29e765cc4f8c270f2504131e2f) is not")
    assert f"looked for {places}; put it there, or name it with --test-list FILE" in str(error.value)
    with pytest.raises(UserError, match=r"the list ImageNet_LT_test.txt .*--test-list FILE"):
        open_part(data, "test", ("0", "1"))
    assert len(open_part(data, "validation", ("0", "1"))) == 6, "what is there can be scored"
    assert opened(copy, train_list=f"{copy}/ImageNet_LT_train.txt").test is None


def test_absent_images_of_a_list(copy):
    shutil.rmtree(copy / "val")
    data = Data(str(copy), "imagenet-lt")
    first = f"{copy}/val/n00000000/ILSVRC2012_val_00000001.JPEG is not there, and 6 of the 6 images of"
    with pytest.raises(UserError, match=first):
        opened(copy, benchmark="imagenet-lt")
    with pytest.raises(UserError, match=first):
        open_part(data, "test", ("0", "1"))
    _, problems, bad, _ = survey(data)
    assert any(problem.startswith(first) for problem in problems)
    assert bad == [], "they are told once, not as bad images too"
    assert len(open_part(data, "train", ("0", "1"))) == 7


def test_parts_that_overlap(imagenet, tmp_path):
    """Of validation and test: the best checkpoint and tau would be chosen on test images."""
    train, val, test = (imagenet / f"ImageNet_LT_{part}.txt" for part in ("train", "val", "test"))
    one = tmp_path / "one.txt"
    one.write_text(train.read_text().splitlines()[0] + "\n")
    said = f"1 image of the test part are in the train part too (first: {train.read_text().split()[0]}): figures on"
    lists = {"train_list": str(train), "val_list": str(val), "test_list": str(one)}
    assert find_parts(Data(str(imagenet), **lists)).faults["test"].startswith(said)
    with pytest.raises(UserError, match="6 images of the test part are in the validation part too"):
        opened(imagenet, train_list=str(train), val_list=str(test), test_list=str(test))


def test_scoring_by_lists_goes_by_numbers(imagenet):
    """A model may call its classes by numbers, as the authors' checkpoints do; by other names they are others."""
    data = Data(str(imagenet), "imagenet-lt")
    images = open_part(data, "test", ("0", "1", "2"))
    assert images.class_names == ("0", "1", "2")
    assert images.class_counts == (3, 3, 0)
    with pytest.raises(UserError, match=r"1 class unknown to the model: 'n0+' .number 0.: this is"):
        open_part(data, "test", ("cock", "hen", "ostrich"))
    with pytest.raises(UserError, match=r"1 class unknown to the model: 'n0+1' .number 1."):
        open_part(data, "test", ("0",))


# ---- what leads out of the data folder


def test_lists_whose_images_are_links_out_of_the_folder(imagenet, copy, tmp_path):
    (tmp_path / "links").mkdir()
    for name in os.listdir(imagenet):
        (tmp_path / "links" / name).symlink_to(imagenet / name)
    with pytest.raises(UserError, match=rf"leads over a link out of .*, to {imagenet}.* --allow-outside"):
        opened(tmp_path / "links", benchmark="imagenet-lt")
    assert opened(tmp_path / "links", benchmark="imagenet-lt", allow_outside=True).train.class_counts == (5, 2)
    # One image alone, in a folder that is none.
    image = opened(copy, benchmark="imagenet-lt").train.images.path(3)
    shutil.move(image, tmp_path / "outside.jpg")
    image.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(UserError, match=rf"^{image} leads over a link out of"):
        opened(copy, benchmark="imagenet-lt")


def test_lists_with_paths_out_of_the_folder(pictures, tmp_path):
    lines = [f"{pictures}/ant/0.png 0", "../my pictures/bee/0.png 1", "ant/1.png 0"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    train = str(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list.txt, line 1: '/.*' leaves the data folder; .* --allow-outside"):
        opened(pictures, train_list=train)
    images = opened(pictures, train_list=train, allow_outside=True).train.images
    assert [images.path(index).resolve() for index in range(3)] == [
        pictures / "ant" / "0.png",
        pictures / "bee" / "0.png",
        pictures / "ant" / "1.png",
    ]


def test_archives_and_tables_that_are_links_out_of_the_folder(tmp_path):
    write_parquet(tmp_path / "elsewhere.parquet", [0, 1])
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.parquet").symlink_to("../elsewhere.parquet")
    with pytest.raises(UserError, match=r"data/train.parquet leads over a link out of the data folder"):
        opened(data)
    assert len(opened(data, allow_outside=True).train) == 2
    assert len(opened(data / "train.parquet").train) == 2, "named itself, it is meant"
    (data / "train.parquet").unlink()
    draw_folder(tmp_path / "drawn", {"ant": 2, "bee": 2})
    pack(find_parts(str(tmp_path / "drawn")), tmp_path / "tars", 24, 0)
    (data / "train-00000-of-00001.tar").symlink_to("../tars/train-00000-of-00001.tar")
    with pytest.raises(UserError, match=r"data/train-00000-of-00001.tar leads over a link out of the data folder"):
        opened(data)
    assert len(opened(data, allow_outside=True).train) == 4
    (data / "train-00000-of-00001.tar").unlink()
    (tmp_path / "cifar-10-batches-py").mkdir()
    (data / "cifar-10-batches-py").symlink_to("../cifar-10-batches-py")
    with pytest.raises(UserError, match=r"data/cifar-10-batches-py leads over a link"):
        opened(data)


# ---- CIFAR

CIFAR = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
PER_FILE = 40


def contents(classes: int) -> tuple[dict[str, tuple[np.ndarray, list[int]]], dict[str, bytes]]:
    """A small archive: file -> pixels [N, 3072] and labels; file -> its content, of names too."""
    generator = np.random.default_rng(classes)
    files = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    labels, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    drawn, tables = {}, {}
    for file in files:
        pixels = generator.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        drawn[file] = pixels, generator.integers(0, classes, PER_FILE).tolist()
        tables[file] = {"data": pixels, labels: drawn[file][1], "coarse_labels": [7] * PER_FILE}
    tables["batches.meta" if classes == 10 else "meta"] = {names: [f"kind{label}" for label in range(classes)]}
    return drawn, {file: pickle.dumps(table, protocol=2) for file, table in tables.items()}


def plant_cifar(root: Path, classes: int, files: dict[str, bytes]) -> Path:
    folder = root / CIFAR[classes]
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def published(monkeypatch):
    """Takes the small archives above for the published ones."""
    for dataset, classes in ((CIFAR10, 10), (CIFAR100, 100)):
        sums = {file: hashlib.md5(content).hexdigest() for file, content in contents(classes)[1].items()}
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(dataset, files, [[file, sums[file]] for file, _ in getattr(dataset, files)])
        monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums[dataset.meta["filename"]]})


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("classes", CIFAR)
def test_images_of_cifar_in_the_archives_order(classes, tmp_path, monkeypatch):
    path = plant_cifar(tmp_path, classes, contents(classes)[1])
    assert find_cifar(path) == find_cifar(tmp_path) == (path, f"cifar{classes}")
    monkeypatch.chdir(path)
    assert find_cifar(Path()) == (Path(), f"cifar{classes}")
    parts = find_parts(str(tmp_path)).parts
    *train, test = contents(classes)[0].values()
    for part, expected in (("train", train), ("test", [test])):
        pixels = np.concatenate([of_file for of_file, _ in expected])
        found = parts[part].images.pixels_NHW3
        for n in (0, len(pixels) // 2, len(pixels) - 1):
            for y, x, channel in ((0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 0)):
                assert found[n, y, x, channel] == pixels[n, 1024 * channel + 32 * y + x]
        assert parts[part].labels_N.tolist() == [label for _, labels in expected for label in labels]
        assert parts[part].class_names == tuple(f"kind{label}" for label in range(classes))


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_planted_payload_is_refused_and_not_run(name, tmp_path):
    mark = tmp_path / "executed"
    payload = Payload(mark)
    files = contents(10)[1] | {name: pickle.dumps({"data": payload, "label_names": payload})}
    path = plant_cifar(tmp_path, 10, files)
    with pytest.raises(UserError, match=r"py is not the published CIFAR10: .*; take the archive anew$"):
        open_cifar(path, "cifar10")
    assert not mark.exists()
    pickle.loads(files[name])
    assert mark.exists(), "it would have run"


@pytest.mark.parametrize("classes", CIFAR)
def test_only_the_published_files_are_loaded(classes, tmp_path):
    """Without the fixture: the checksums are those of the real archives."""
    path = plant_cifar(tmp_path, classes, contents(classes)[1])
    with pytest.raises(UserError, match="is not the published CIFAR"):
        open_cifar(path, f"cifar{classes}")
