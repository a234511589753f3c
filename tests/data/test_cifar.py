"""CIFAR's archives: every form gives the same list, in the archive's order; only published pickles are loaded."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from equipoise import UserError
from equipoise.data.cifar import CifarArchive, find_cifar, open_cifar

NAMES = {classes: tuple(f"kind{label}" for label in range(classes)) for classes in (10, 100)}
PER_FILE = 40
FOLDERS = {
    (10, "python"): "cifar-10-batches-py",
    (10, "binary"): "cifar-10-batches-bin",
    (100, "python"): "cifar-100-python",
    (100, "binary"): "cifar-100-binary",
}


def images(files: int, seed: int, classes: int = 10) -> list[tuple[np.ndarray, list[int]]]:
    """Pixels [N, 3072] and labels of each file."""
    generator = np.random.default_rng(seed)
    return [
        (
            generator.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8),
            generator.integers(0, classes, PER_FILE).tolist(),
        )
        for _ in range(files)
    ]


def pickle_of_python2(table: dict) -> bytes:
    """As Python 2 wrote the published files: protocol 2, byte strings by BINSTRING, numpy's old module names."""

    def string(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def value(x) -> bytes:
        if isinstance(x, bytes):
            return string(x)
        if isinstance(x, int):
            return b"J" + struct.pack("<i", x)
        if isinstance(x, list):
            return b"](" + b"".join(value(item) for item in x) + b"e"
        shape = b"".join(value(side) for side in x.shape)
        kind = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xff"
        kind += b"J\xff\xff\xff\xffK\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        return made + b"(K\x01(" + shape + b"t" + kind + b"\x89" + string(x.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(value(key) + value(item) for key, item in table.items()) + b"u."


def files_of(classes: int, form: str) -> dict[str, bytes]:
    """A small archive's files by name."""
    train, test = images(5 if classes == 10 else 1, classes, classes), images(1, 1, classes)
    names = [name.encode() for name in NAMES[classes]]
    ending = ".bin" if form == "binary" else ""
    batches = {f"data_batch_{n}{ending}" if classes == 10 else f"train{ending}": it for n, it in enumerate(train, 1)}
    batches[("test_batch" if classes == 10 else "test") + ending] = test[0]
    if form == "python":
        key, of_names = (b"labels", b"label_names") if classes == 10 else (b"fine_labels", b"fine_label_names")
        made = {
            name: pickle_of_python2({b"coarse_labels": [7] * PER_FILE, key: labels, b"data": pixels})
            for name, (pixels, labels) in batches.items()
        }
        return {**made, "batches.meta" if classes == 10 else "meta": pickle_of_python2({of_names: names})}

    def records(pixels: np.ndarray, labels: list[int]) -> bytes:
        before = [[label] if classes == 10 else [7, label] for label in labels]  # 7: a coarse label, not to be read
        return b"".join(bytes(first) + row.tobytes() for first, row in zip(before, pixels, strict=True))

    made = {name: records(*batch) for name, batch in batches.items()}
    return {**made, "batches.meta.txt" if classes == 10 else "fine_label_names.txt": b"\n".join(names) + b"\n\n"}


def plant(root: Path, classes: int, form: str, files: dict[str, bytes], packed: bool = False) -> Path:
    folder = FOLDERS[classes, form]
    if not packed:
        (root / folder).mkdir(parents=True)
        for name, content in files.items():
            (root / folder / name).write_bytes(content)
        return root / folder
    path = root / f"cifar-{classes}-{form}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"readme.html": b"", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def published(monkeypatch):
    """Takes the small archives above for the published ones."""
    files = files_of(10, "python") | files_of(100, "python")
    table = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr("equipoise.data.cifar.CHECKSUMS", table)


def refused(archive: CifarArchive | None) -> str:
    assert archive is not None
    with pytest.raises(UserError) as error:
        open_cifar(archive)
    assert "\n" not in str(error.value)
    assert str(archive.path) in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
@pytest.mark.parametrize(("classes", "form"), FOLDERS)
def test_every_form_gives_the_images_in_the_archives_order(classes, form, packed, tmp_path):
    path = plant(tmp_path, classes, form, files_of(classes, form), packed)
    assert find_cifar(path) == find_cifar(tmp_path) == CifarArchive(path, classes, form)
    parts = open_cifar(CifarArchive(path, classes, form))
    train = images(5 if classes == 10 else 1, classes, classes)
    for part, expected in (("train", train), ("test", images(1, 1, classes))):
        pixels = np.concatenate([batch for batch, _ in expected])
        found = parts[part].images.pixels_NHW3
        for n in (0, len(pixels) // 2, len(pixels) - 1):
            for y, x, channel in ((0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 0)):
                assert found[n, y, x, channel] == pixels[n, 1024 * channel + 32 * y + x]
        assert parts[part].labels_N.tolist() == [label for _, labels in expected for label in labels]
        assert parts[part].class_names == NAMES[classes]


def test_what_is_found(tmp_path, monkeypatch):
    assert find_cifar(tmp_path) is None
    (tmp_path / "one").mkdir()
    plant(tmp_path / "one", 10, "binary", files_of(10, "binary"), packed=True)
    python = plant(tmp_path / "one", 10, "python", {})
    assert find_cifar(tmp_path / "one") == CifarArchive(python, 10, "python")
    assert find_cifar(python) == CifarArchive(python, 10, "python")
    monkeypatch.chdir(python)
    assert find_cifar(Path()) == CifarArchive(python, 10, "python")


# ---- what is refused


class Payload:
    mark: ClassVar[Path]

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_planted_payload_is_refused_and_not_run(name, packed, tmp_path):
    Payload.mark = tmp_path / "executed"
    payload = Payload()
    files = files_of(10, "python") | {name: pickle.dumps({b"data": payload, b"label_names": payload})}
    said = refused(find_cifar(plant(tmp_path, 10, "python", files, packed)))
    assert (
        f"{name} is not the published file (its MD5 differs); a pickle is a program, so nothing of it was run" in said
    )
    assert not Payload.mark.exists()
    pickle.loads(files[name])
    assert Payload.mark.exists(), "it would have run"


def test_only_the_published_files_are_loaded(tmp_path):
    """Without the fixture: the checksums are those of the real archives."""
    for classes in (10, 100):
        archive = find_cifar(plant(tmp_path, classes, "python", files_of(classes, "python")))
        assert "is not the published file" in refused(archive)


def test_refused_archives(tmp_path):
    files = files_of(10, "binary")
    del files["data_batch_3.bin"]
    said = refused(find_cifar(plant(tmp_path / "a", 10, "binary", files)))
    assert said == f"data_batch_3.bin is missing in {tmp_path}/a/cifar-10-batches-bin; take the archive anew"
    for number, (name, content, sentence) in enumerate(
        [
            ("data_batch_3.bin", b"x" * 3074, "data_batch_3.bin has 3,074 bytes, which are no whole number of images"),
            ("data_batch_3.bin", b"", "data_batch_3.bin has 0 bytes"),
            ("data_batch_3.bin", bytes([10]) + bytes(3072), "has label 10, but the classes are 0 to 9"),
            ("batches.meta.txt", b"ant bee", "does not name 10 classes"),
            ("batches.meta.txt", b"ant " * 10, "does not name 10 classes"),
        ]
    ):
        files = files_of(10, "binary") | {name: content}
        assert sentence in refused(find_cifar(plant(tmp_path / str(number), 10, "binary", files)))
    path = plant(tmp_path, 100, "binary", files_of(100, "binary"), packed=True)
    for content in (path.read_bytes()[:5000], b"no archive"):
        path.write_bytes(content)
        assert "is damaged" in refused(find_cifar(path))
