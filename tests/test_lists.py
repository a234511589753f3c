"""Data sets on disk: what is found, what is refused, and the benchmark's subsets."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN, draw_folder, draw_picture

from equipoise import UserError
from equipoise.lists import (
    ImageList,
    PixelArrays,
    find_parts,
    hold_out,
    imbalance_factor,
    long_tail_counts,
    long_tailed,
    open_part,
    open_parts,
    training_problems,
)
from equipoise.pixels import decode


def image_list(counts: list[int]) -> ImageList:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(0).permutation(labels)
    pixels = np.zeros((len(labels), 1, 1, 3), np.uint8)
    return ImageList("test", PixelArrays("test", pixels), labels, tuple(f"c{i}" for i in range(len(counts))))


def write_parquet(path, labels, column="img", label_column="label", metadata=None, **more):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b"not decoded here", "path": "x.jpg"} for _ in labels], kind)
    table = pa.table({column: images, label_column: pa.array(labels, pa.int64()), **more})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)


# ---- class folders


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


def test_refused_paths(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder at"):
        open_parts(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="name a folder with --data FOLDER"):
        open_parts("")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match="is a file, but no Parquet file"):
        open_parts(str(tmp_path / "file.txt"))


def test_all_problems_are_listed(tmp_path):
    draw_folder(tmp_path, {"ant": 2})
    for name in ("bee", "cow"):
        (tmp_path / name).mkdir()
    problems = training_problems(find_parts(str(tmp_path)).parts["train"])
    assert [name for name in ("bee", "cow") if any(f"'{name}'" in problem for problem in problems)] == ["bee", "cow"]


def test_scoring_another_folder_keeps_the_labels_of_the_model(tmp_path):
    draw_folder(tmp_path, {"bee": 2, "cat": 1})
    images = open_part(str(tmp_path), "test", ("ant", "bee", "cat"))
    assert images.class_counts == (0, 2, 1)
    with pytest.raises(UserError, match="has a class 'cat' that the model does not know"):
        open_part(str(tmp_path), "test", ("ant", "bee"))


def test_scoring_takes_all_only_of_what_is_not_divided(tmp_path):
    draw_folder(tmp_path / "train", {"ant": 2, "bee": 1})
    with pytest.raises(UserError, match=r"has no test part; it has train: choose one with --split"):
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


def test_a_class_called_train(tmp_path):
    draw_folder(tmp_path, {"bus": 3, "train": 2})
    assert open_parts(str(tmp_path)).train.class_names == ("bus", "train")


def test_a_folder_beside_the_parts_is_noted(tmp_path):
    draw_folder(tmp_path / "train", {"ant": 2, "bee": 1})
    draw_folder(tmp_path / "raw", {"x": 1})
    found = find_parts(str(tmp_path))
    assert list(found.parts) == ["train"]
    assert "these folders are no part and were passed over: raw" in found.notes[0]


def test_fingerprint_changes_with_content_labels_and_names(tmp_path):
    base = image_list([3, 2])
    assert base.fingerprint() == image_list([3, 2]).fingerprint()
    others = [
        image_list([2, 3]),
        base.take(np.array([0, 1])),
        ImageList("x", base.images, base.labels_N, ("other", "names")),
        ImageList("x", PixelArrays("x", base.images.pixels_NHW3 + 1), base.labels_N, base.class_names),
    ]
    draw_folder(tmp_path, {"c0": 3, "c1": 2})
    others.append(find_parts(str(tmp_path)).parts["train"])
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 6


# ---- Parquet


def test_parquet_parts_and_columns(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [2, 0])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [1])
    parts = open_parts(str(tmp_path))
    assert parts.train.class_counts == (2, 2, 1)
    assert parts.train.class_names == ("0", "1", "2")
    assert parts.test is not None
    assert parts.test.class_counts == (0, 1, 0)
    assert open_parts(str(tmp_path / "train-00000-of-00002.parquet")).train.class_counts == (1, 2)


def test_parquet_class_names_of_the_datasets_library(tmp_path):
    features = {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1, 2], metadata=metadata)
    assert open_parts(str(tmp_path)).train.class_names == ("cat", "dog", "emu")
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1, 3], metadata=metadata)
    with pytest.raises(UserError, match="row 2 has label 3, which is out of range: the classes are 0 to 2"):
        open_parts(str(tmp_path))


def test_parquet_columns_that_are_not_plain(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(path, [0, 1], label_column="fine_label", coarse_label=pa.array([0, 0], pa.int64()))
    with pytest.raises(UserError, match=r"fine_label, coarse_label; name it with --set data.label_column=NAME"):
        open_parts(str(path))
    assert open_parts(str(path), label_column="fine_label").train.class_counts == (1, 1)
    with pytest.raises(UserError, match="has no column 'labels'; it has img, fine_label, coarse_label"):
        open_parts(str(path), label_column="labels")
    with pytest.raises(UserError, match="column 'coarse_label' holds int64, not image bytes"):
        open_parts(str(path), label_column="fine_label", image_column="coarse_label")
    pq.write_table(pa.table({"label": [0, 1]}), path)
    with pytest.raises(UserError, match="has no column of images"):
        open_parts(str(path))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, -1, 1], "row 1 has label -1, which is out of range"),
        ([0, 2, 2], "class '1' has no training images"),
        ([0, 0], "has one class only"),
        ([], "has no rows"),
        ([0, None], "must hold a whole number in every row"),
        ([1700000000, 1700000001], "label 1700000001 is out of range: there are 2 rows only"),
    ],
)
def test_refused_labels(labels, sentence, tmp_path):
    write_parquet(tmp_path / "train.parquet", labels)
    with pytest.raises(UserError) as error:
        open_parts(str(tmp_path))
    assert sentence in str(error.value)


def test_a_test_label_that_training_does_not_know(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [0, 7])
    with pytest.raises(UserError, match=r"test.parquet: row 1 has label 7, which is out of range"):
        open_parts(str(tmp_path))


def test_parquet_files_of_no_part_are_not_trained_on(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "extra.parquet", [0, 1, 1])
    found = find_parts(str(tmp_path))
    assert found.parts["train"].class_counts == (1, 1)
    assert "extra.parquet" in found.notes[0]


def test_no_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_parts(str(tmp_path))


# ---- digits and subsets


def test_digits_are_whole_balanced_and_disjoint():
    parts = open_parts("digits")
    assert parts.test is not None
    assert parts.test.class_counts == (50,) * 10
    assert len(parts.train) + len(parts.test) == 1797
    assert parts.train.images.pixels_NHW3.max() == 255
    every = np.concatenate([part.images.pixels_NHW3.reshape(len(part), -1) for part in (parts.train, parts.test)])
    assert len(np.unique(every, axis=0)) == 1797


@pytest.mark.parametrize("name", GOLDEN["long_tail_counts"])
def test_long_tail_counts_golden(name):
    expected = GOLDEN["long_tail_counts"][name]
    shape = "step" if "step" in name else "exponential"
    factor = float(name.rsplit("if", 1)[1])
    assert long_tail_counts(max(expected), len(expected), factor, shape) == expected


def test_long_tailed_is_the_benchmarks_subset():
    """Seed 0 of numpy's global generator, classes in label order, the first n of each shuffled class."""
    full = image_list([40, 40, 40])
    np.random.seed(0)
    expected = []
    for label, count in enumerate([40, 12, 4]):
        indices = np.where(full.labels_N == label)[0]
        np.random.shuffle(indices)
        expected += indices[:count].tolist()
    full = ImageList("x", PixelArrays("x", np.arange(120, dtype=np.uint8).repeat(3).reshape(120, 1, 1, 3)),
                     full.labels_N, full.class_names)  # fmt: skip
    subset = long_tailed(full, 10, "exponential")
    assert subset.images.pixels_NHW3[:, 0, 0, 0].tolist() == expected
    assert subset.class_counts == (40, 12, 4)


def test_an_imbalance_that_empties_a_class():
    with pytest.raises(UserError, match=r"leaves class 'c1' without images; .* it can be 20 at most"):
        long_tailed(image_list([20, 30]), 50, "exponential")


def test_hold_out():
    full = image_list([100, 12, 3, 2, 1])
    train, validation = hold_out(full, 0.1)
    assert validation.class_counts == (10, 1, 1, 0, 0)
    assert train.class_counts == (90, 11, 2, 2, 1)
    assert hold_out(full, 0.1)[1].fingerprint() == validation.fingerprint()
    with pytest.raises(UserError, match=r"no class has three images, .* set data.holdout to 0"):
        hold_out(image_list([2, 2]), 0.5)


def test_cifar10_as_published_for_the_datasets_library(shared_data):
    parts = open_parts(str(shared_data / "cifar10"), imbalance="exponential", imbalance_factor=100)
    assert parts.kind == "Parquet"
    assert list(parts.train.class_counts) == GOLDEN["long_tail_counts"]["cifar10_if100"]
    assert parts.test is not None
    assert parts.test.class_counts == (1000,) * 10
    assert decode(parts.test, 9999).shape == (32, 32, 3)
