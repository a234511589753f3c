"""CIFAR's archives: every form gives the same list, in the archive's order, and a pickle is never run."""

import io
import os
import pickle
import re
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import UserError
from equipoise.data import cifar
from equipoise.data.cifar import CifarArchive, find_cifar, open_cifar
from equipoise.data.images import long_tail_counts, long_tailed
from equipoise.data.sources import find_parts

NAMES = {classes: tuple(f"kind{label}" for label in range(classes)) for classes in (10, 100)}
PER_FILE = 40


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
        assert isinstance(x, np.ndarray)
        shape = b"".join(value(side) for side in x.shape)
        kind = (
            b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xff" * 1
        )
        kind += b"J\xff\xff\xff\xffK\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        return made + b"(K\x01(" + shape + b"t" + kind + b"\x89" + string(x.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(value(key) + value(item) for key, item in table.items()) + b"u."


def pickled(protocol):
    return lambda table: pickle.dumps(table, protocol=protocol)


def files_of(classes: int, form: str, dump=pickle_of_python2) -> dict[str, bytes]:
    """A small archive's files by name."""
    train, test = images(5 if classes == 10 else 1, classes, classes), images(1, 1, classes)
    names = [name.encode() for name in NAMES[classes]]
    coarse = 7  # a coarse label, which is not to be read
    if form == "python" and classes == 10:
        table = {f"data_batch_{n}": batch for n, batch in enumerate(train, 1)} | {"test_batch": test[0]}
        made = {
            name: dump({b"batch_label": b"x", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"]})
            for name, (pixels, labels) in table.items()
        }
        return {"batches.meta": dump({b"num_cases_per_batch": 4, b"label_names": names}), **made}
    if form == "python":
        made = {
            name: dump({b"coarse_labels": [coarse] * PER_FILE, b"fine_labels": labels, b"data": pixels})
            for name, (pixels, labels) in (("train", train[0]), ("test", test[0]))
        }
        return {**made, "meta": dump({b"fine_label_names": names, b"coarse_label_names": [b"x"]})}

    def records(pixels: np.ndarray, labels: list[int]) -> bytes:
        before = [[label] if classes == 10 else [coarse, label] for label in labels]
        return b"".join(bytes(first) + row.tobytes() for first, row in zip(before, pixels, strict=True))

    text = b"\n".join(names) + b"\n\n"
    if classes == 10:
        made = {f"data_batch_{n}.bin": records(*batch) for n, batch in enumerate(train, 1)}
        return {"test_batch.bin": records(*test[0]), **made, "batches.meta.txt": text}
    return {"train.bin": records(*train[0]), "test.bin": records(*test[0]), "fine_label_names.txt": text}


FOLDERS = {
    (10, "python"): "cifar-10-batches-py",
    (10, "binary"): "cifar-10-batches-bin",
    (100, "python"): "cifar-100-python",
    (100, "binary"): "cifar-100-binary",
}


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


def refused(archive: CifarArchive | None) -> str:
    assert archive is not None
    with pytest.raises(UserError) as error:
        open_cifar(archive)
    assert "\n" not in str(error.value)
    assert str(archive.path) in str(error.value)
    return str(error.value)


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


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_today(protocol, tmp_path):
    path = plant(tmp_path, 10, "python", files_of(10, "python", pickled(protocol)))
    parts = open_cifar(CifarArchive(path, 10, "python"))
    assert np.array_equal(
        parts["test"].images.pixels_NHW3, images(1, 1)[0][0].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    )


def test_the_long_tail_subset_is_the_benchmarks(tmp_path):
    """Seed 0 of NumPy's global generator over the archive's order, class by class."""
    path = plant(tmp_path, 10, "python", files_of(10, "python"))
    train = open_cifar(CifarArchive(path, 10, "python"))["train"]
    labels = np.array([label for _, batch in images(5, seed=10) for label in batch])
    pixels = np.concatenate([batch for batch, _ in images(5, seed=10)])
    counts = long_tail_counts(min(np.bincount(labels)), 10, 5, "exponential")
    np.random.seed(0)
    kept = []
    for label in range(10):
        indices = np.where(labels == label)[0]
        np.random.shuffle(indices)
        kept.extend(indices[: counts[label]])
    expected = pixels[kept].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(long_tailed(train, 5, "exponential").images.pixels_NHW3, expected)


def test_what_is_found(tmp_path, monkeypatch):
    assert find_cifar(tmp_path) is None
    (tmp_path / "one").mkdir()
    plant(tmp_path / "one", 10, "binary", files_of(10, "binary"), packed=True)
    python = plant(tmp_path / "one", 10, "python", {})
    assert find_cifar(tmp_path / "one") == CifarArchive(python, 10, "python")
    plant(tmp_path / "one", 100, "binary", {})
    with pytest.raises(UserError, match="holds both CIFAR-10 and CIFAR-100; name one of them"):
        find_cifar(tmp_path / "one")
    assert find_cifar(python) == CifarArchive(python, 10, "python")
    monkeypatch.chdir(python)
    assert find_cifar(Path()) == CifarArchive(Path(), 10, "python")


# ---- what is refused


class Payload:
    mark: ClassVar[Path]

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_planted_payload_is_refused_and_not_run(name, packed, tmp_path):
    Payload.mark = tmp_path / "executed"
    payload = Payload()
    files = files_of(10, "python") | {name: pickle.dumps({b"data": payload, b"label_names": payload})}
    said = refused(find_cifar(plant(tmp_path, 10, "python", files, packed)))
    assert f"{name} asks for 'posix.mkdir', which the published archive does not; nothing of it was run" in said
    assert not Payload.mark.exists()
    pickle.loads(files[name])
    assert Payload.mark.exists(), "it would have run"


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nndarray\n.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x14ndarray.__class__.mro\x93.",
        b"Pposix.system\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_no_way_around(code, tmp_path):
    files = files_of(10, "python") | {"data_batch_1": code}
    said = refused(find_cifar(plant(tmp_path, 10, "python", files)))
    assert re.search(r"data_batch_1 (asks for '|is damaged \(|has no 'data')", said)


def with_field(key, value):
    pixels, labels = images(1, seed=3)[0]
    return pickle.dumps({b"labels": labels, b"data": pixels} | {key: value}, protocol=2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is damaged"),
        (pickle_of_python2({b"data": np.zeros((2, 3072), np.uint8)})[:3000], "is damaged"),
        (pickle.dumps([1]), "has no 'data'"),
        (with_field(b"data", np.zeros((PER_FILE, 3071), np.uint8)), "are no images of 3,072 bytes each"),
        (with_field(b"data", np.zeros((PER_FILE, 3072), np.float32)), "does not hold bytes"),
        (with_field(b"data", b"no array"), "are no images of 3,072 bytes each"),
        (with_field(b"labels", [0, 1]), f"has {PER_FILE} images, but 2 labels"),
        (with_field(b"labels", [10] * PER_FILE), "has label 10, but the classes are 0 to 9"),
        (with_field(b"labels", [-1] * PER_FILE), "its labels are no whole numbers from 0 to 255"),
        (with_field(b"labels", ["0"] * PER_FILE), "its labels are no whole numbers from 0 to 255"),
        (b"\x80\x02" + b"(" * 1_000_000 + b".", "data_batch_2"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "has no 'data'"),  # claims two thousand million objects
    ],
)
def test_refused_pickles(content, sentence, tmp_path):
    files = files_of(10, "python") | {"data_batch_2": content}
    said = refused(find_cifar(plant(tmp_path, 10, "python", files)))
    assert sentence in said
    assert "data_batch_2" in said


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02" + b"]" * 2_000_000 + b".",  # an object of 56 bytes for each byte
        b"\x80\x02}N"
        + b"\x85" * 100_000
        + b"Ns.",  # a tuple in a tuple in a tuple: as a key it would overflow the stack
    ],
)
def test_programs_that_only_make_objects(code, tmp_path):
    files = files_of(10, "python") | {"data_batch_1": code}
    assert "it is a longer program than the published files are" in refused(
        find_cifar(plant(tmp_path, 10, "python", files))
    )


@pytest.mark.parametrize("name", [b"_codecs\nencode", b"numpy\nndarray"])
def test_the_stand_ins_cannot_be_changed(name, tmp_path):
    """BUILD sets the attributes of any object: here of the functions that stand for those that are not called."""
    code = b"\x80\x02c" + name + b"\nN}X\x0c\x00\x00\x00__defaults__(X\x01\x00\x00\x00ats\x86b."
    files = files_of(10, "python") | {"data_batch_1": code}
    before = cifar._encode.__defaults__
    assert "asks for 'build of what is no array'" in refused(find_cifar(plant(tmp_path, 10, "python", files))).replace(
        "?", " "
    )
    assert cifar._encode.__defaults__ == before


def test_an_array_that_claims_more_than_it_has(tmp_path):
    whole = pickle_of_python2({b"labels": [0], b"data": np.zeros((1, 3072), np.uint8)})
    claimed = whole.replace(struct.pack("<i", 1) + b"J" + struct.pack("<i", 3072), struct.pack("<i", 2**30) + b"J" + struct.pack("<i", 3072))  # fmt: skip # noqa: E501
    assert claimed != whole
    files = files_of(10, "python") | {"data_batch_1": claimed}
    assert "its array claims 3298534883328 bytes and has 3072" in refused(
        find_cifar(plant(tmp_path, 10, "python", files))
    )


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 3000))
def test_damaged_pickles_are_refused_or_read(tmp_path_factory, noise, position):
    from equipoise.data.cifar import _of_pickle

    content = bytearray(pickle_of_python2({b"labels": [0, 2], b"data": np.zeros((2, 3072), np.uint8)}))
    content[position : position + len(noise)] = noise
    try:
        pixels, labels = _of_pickle(bytes(content), "file", 10)
    except UserError as error:
        assert str(error).startswith("file")  # noqa: PT017
    else:
        assert len(pixels) == len(labels)


def test_refused_archives(tmp_path):
    files = files_of(10, "binary")
    del files["data_batch_3.bin"]
    said = refused(find_cifar(plant(tmp_path / "a", 10, "binary", files)))
    assert said == f"data_batch_3.bin is missing in {tmp_path}/a/cifar-10-batches-bin; take the archive anew"
    files = files_of(10, "binary") | {"data_batch_3.bin": b"x" * 3074}
    said = refused(find_cifar(plant(tmp_path / "b", 10, "binary", files)))
    assert "data_batch_3.bin has 3,074 bytes, which are no whole number of images" in said
    (tmp_path / "c").mkdir()
    path = plant(tmp_path / "c", 100, "binary", files_of(100, "binary"), packed=True)
    path.write_bytes(path.read_bytes()[:5000])
    assert "is damaged" in refused(find_cifar(path))
    path.write_bytes(b"no archive")
    assert "is damaged" in refused(find_cifar(path))


@pytest.mark.parametrize("names", [NAMES[10][:9], NAMES[100], ("kind0",) * 10])
@pytest.mark.parametrize("form", ["python", "binary"])
def test_other_names_than_those_of_ten_classes(names, form, tmp_path):
    listed = [name.encode() for name in names]
    file = {"python": {"batches.meta": pickle_of_python2({b"label_names": listed})},
            "binary": {"batches.meta.txt": b"\n".join(listed)}}[form]  # fmt: skip
    said = refused(find_cifar(plant(tmp_path, 10, form, files_of(10, form) | file)))
    assert "does not name 10 different classes" in said


@pytest.mark.parametrize("kind", ["member", "long name", "many members"])
def test_an_archive_that_unpacks_to_far_more_is_not_unpacked(kind, tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        member = tarfile.TarInfo("junk" if kind == "member" else "data_batch_1.bin")
        if kind == "long name":
            member.name = "x" * 100_000_000
        if kind == "many members":
            for _ in range(100_000):
                tar.addfile(member)
        else:
            member.size = 100_000_000
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    assert path.stat().st_size < 2_000_000
    assert "it unpacks to far more than the published archives do" in refused(find_cifar(path))


def test_members_that_are_no_plain_files(tmp_path):
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-100-binary/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert "train.bin is missing" in refused(find_cifar(path))
    with tarfile.open(path, "w:gz") as tar:
        folder = plant(tmp_path / "x", 100, "binary", files_of(100, "binary"))
        tar.add(folder, "cifar-100-binary")
        huge = tarfile.TarInfo("cifar-100-binary/train.bin")
        huge.size = 10**12
        tar.fileobj.write(huge.tobuf())
    assert "has 1,000,000,000,000 bytes; no file of the published archives is that large" in refused(find_cifar(path))


def test_sparse_members_of_an_archive_are_no_files(tmp_path):
    """A few bytes that claim an image file full of zeros."""
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for number in range(1, 6):
            member = tarfile.TarInfo(f"data_batch_{number}.bin")
            member.type = tarfile.GNUTYPE_SPARSE
            tar.addfile(member)
    with pytest.raises(UserError):
        find_parts(str(path))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_headers_of_headers_of_headers(kind, tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for _ in range(3000):
            member = tarfile.TarInfo("x")
            member.type, member.size = kind, 0
            tar.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(UserError):
        find_parts(str(path))


def test_class_names_that_are_no_text(tmp_path):
    names = ["\ud800", *"bcdefghij"]
    files = files_of(10, "python") | {"batches.meta": pickle.dumps({"label_names": names})}
    said = refused(find_cifar(plant(tmp_path, 10, "python", files)))
    assert r"names a class '\ud800', which cannot be written as text; rename it" in said
