"""CIFAR's archives: images in the archive's order; only published pickles are loaded."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from equipoise import UserError
from equipoise.data.cifar import find_cifar, open_cifar
from equipoise.data.sources import find_parts

FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
PER_FILE = 40


def batches(classes: int) -> dict[str, tuple[np.ndarray, list[int]]]:
    """File -> pixels [N, 3072] and labels."""
    generator = np.random.default_rng(classes)
    files = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    return {
        file: (
            generator.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8),
            generator.integers(0, classes, PER_FILE).tolist(),
        )
        for file in files
    }


def contents(classes: int) -> dict[str, bytes]:
    """A small archive's files by name."""
    labels, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    files = {
        file: {"data": pixels, labels: of_file, "coarse_labels": [7] * PER_FILE}
        for file, (pixels, of_file) in batches(classes).items()
    }
    files["batches.meta" if classes == 10 else "meta"] = {names: [f"kind{label}" for label in range(classes)]}
    return {file: pickle.dumps(table, protocol=2) for file, table in files.items()}


def plant(root: Path, classes: int, files: dict[str, bytes]) -> Path:
    folder = root / FOLDERS[classes]
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def published(monkeypatch):
    """Takes the small archives above for the published ones."""
    for dataset, classes in ((CIFAR10, 10), (CIFAR100, 100)):
        sums = {file: hashlib.md5(content).hexdigest() for file, content in contents(classes).items()}
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(dataset, files, [[file, sums[file]] for file, _ in getattr(dataset, files)])
        monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums[dataset.meta["filename"]]})


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("classes", FOLDERS)
def test_images_in_the_archives_order(classes, tmp_path, monkeypatch):
    path = plant(tmp_path, classes, contents(classes))
    assert find_cifar(path) == find_cifar(tmp_path) == (path, f"cifar{classes}")
    monkeypatch.chdir(path)
    assert find_cifar(Path()) == (Path(), f"cifar{classes}")
    parts = find_parts(str(tmp_path)).parts
    *train, test = batches(classes).values()
    for part, expected in (("train", train), ("test", [test])):
        pixels = np.concatenate([of_file for of_file, _ in expected])
        found = parts[part].images.pixels_NHW3
        for n in (0, len(pixels) // 2, len(pixels) - 1):
            for y, x, channel in ((0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 0)):
                assert found[n, y, x, channel] == pixels[n, 1024 * channel + 32 * y + x]
        assert parts[part].labels_N.tolist() == [label for _, labels in expected for label in labels]
        assert parts[part].class_names == tuple(f"kind{label}" for label in range(classes))


@pytest.mark.parametrize("other", ["cifar-10-python.tar.gz", "cifar-100-binary"])
def test_other_forms_are_refused(other, tmp_path):
    (tmp_path / other).mkdir()
    for path in (tmp_path, tmp_path / other):
        with pytest.raises(UserError, match=f"holds CIFAR as {other}; take the python version, unpacked"):
            find_cifar(path)


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
    files = contents(10) | {name: pickle.dumps({"data": payload, "label_names": payload})}
    path = plant(tmp_path, 10, files)
    with pytest.raises(UserError, match=r"py is not the published CIFAR10: .*; take the archive anew$"):
        open_cifar(path, "cifar10")
    assert not mark.exists()
    pickle.loads(files[name])
    assert mark.exists(), "it would have run"


@pytest.mark.parametrize("classes", FOLDERS)
def test_only_the_published_files_are_loaded(classes, tmp_path):
    """Without the fixture: the checksums are those of the real archives."""
    path = plant(tmp_path, classes, contents(classes))
    with pytest.raises(UserError, match="is not the published CIFAR"):
        open_cifar(path, f"cifar{classes}")
