"""Tars that other programs wrote: labels, names, archives and halves of files."""

import gzip
import io
import tarfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import opened
from PIL import Image

from equipoise import UserError
from equipoise.data.decode import decode
from equipoise.data.packed import pack
from equipoise.data.sources import find_parts, recognise


def picture(label: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (200 * (label == 0), 100, 50)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5  # as webdataset's writer: a block of pax before each member
            tar.addfile(member, io.BytesIO(content))
    return path


def test_numbers_as_labels_and_names_beside(tmp_path):
    """As clip-benchmark has them: folders of parts, other members in a sample, endings in capitals, names in a file."""
    for part, count in (("train", 2), ("test", 1)):
        for number in range(count):
            samples = [
                {f"{row:04}.cls": b"%d\n" % (row % 2), f"{row:04}.JPG": picture(row % 2), f"{row:04}.txt": b"a photo"}
                for row in range(4)
            ]
            members = {name: content for sample in samples for name, content in sample.items()}
            write_tar(tmp_path / f"set/{part}/{number}.tar", members)
    (tmp_path / "set/classnames.txt").write_text("hairy ant\nbee\n")
    found = find_parts(str(tmp_path / "set"))
    assert (found.kind, found.named, found.divided) == ("WebDataset", True, True)
    assert {part: len(images) for part, images in found.parts.items()} == {"train": 8, "test": 4}
    train = found.parts["train"]
    assert train.class_names == ("hairy ant", "bee")
    assert train.labels_N.tolist() == [0, 1] * 4
    assert [int(decode(train, row)[5, 5, 0] < 100) for row in range(8)] == [0, 1] * 4
    assert train.images.name(5) == f"0001.JPG in {tmp_path}/set/train/1.tar"
    (tmp_path / "set/classnames.txt").unlink()
    assert find_parts(str(tmp_path / "set")).parts["train"].class_names == ("0", "1")


@pytest.mark.parametrize("kind", ["txt", "cls", "json"])
@pytest.mark.parametrize("how", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.USTAR_FORMAT}])
def test_names_as_labels(tmp_path, kind, how):
    says = {"txt": "%s", "cls": "%s", "json": '{"width": 30, "label": "%s"}'}[kind]
    names = ["owl", "bat", "owl", "bat"]
    members: dict[str, bytes] = {}
    for row, name in enumerate(names):
        members |= {f"deep.er/{row}.png": picture(0, "PNG"), f"deep.er/{row}.{kind}": (says % name).encode()}
    part = opened(write_tar(tmp_path / "set.tar", members, **how)).train
    assert part.class_names == ("bat", "owl")
    assert part.labels_N.tolist() == [1, 0, 1, 0]
    assert decode(part, 3).shape == (20, 30, 3)


def test_tars_of_others_are_packed_too(tmp_path):
    members = {
        f"{row}.{kind}": content
        for row in range(6)
        for kind, content in (("png", picture(0, "PNG")), ("cls", b"%d" % (row % 2)))
    }
    write_tar(tmp_path / "set" / "0.tar", members)
    pack(find_parts(str(tmp_path / "set")), tmp_path / "out", 10, 0)
    assert decode(opened(tmp_path / "out").train, 0).shape == (10, 15, 3)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"0.jpg": b"x", "0.cls": b"0", "1.jpg": b"x"}, "1.jpg has no label: write KEY.cls, or 'label' into KEY.json"),
        ({"0.flac": b"x", "0.cls": b"0"}, r"set.tar is a file \(.tar, no image\)"),
        ({"0.jpg": b"x", "0.json": b"[1"}, "set.tar: 0.json is no JSON object in UTF-8"),
        ({"0.jpg": b"x", "0.json": b"[1]"}, "set.tar: 0.json is no JSON object in UTF-8"),
        ({"0.jpg": b"x", "0.json": b'{"label": "\\ud800"}'}, "set.tar: 0.json is no JSON object in UTF-8"),
        ({"0.jpg": b"x", "0.cls": b"\xff"}, "set.tar: 0.cls is no text in UTF-8"),
        ({"0.jpg": b"x", "0.cls": b"9" * 25}, "0.cls has the label '9+...9+': neither a class's name nor its number"),
        ({"0.jpg": b"x", "0.json": b'{"label": null}'}, "0.json has the label None: neither"),
        ({"0.jpg": b"x", "0.json": b'{"label": [1, 2]}'}, r"0.json has the label \[1, 2\]: neither"),
        ({"0.jpg": b"x", "0.cls": b"77"}, "label 77 is out of range"),
    ],
)
def test_tars_that_are_no_labelled_images(tmp_path, members, said):
    with pytest.raises(UserError, match=said):
        find_parts(str(write_tar(tmp_path / "set.tar", members)))


def test_a_tar_that_was_cut_between_two_images(tmp_path):
    members = {f"{number}.{kind}": content for number in range(8) for kind, content in (("cls", b"0"), ("jpg", b"x"))}
    file = write_tar(tmp_path / "set.tar", members)
    with tarfile.open(file) as tar:
        end = tar.getmember("3.jpg").offset_data + tarfile.BLOCKSIZE
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(UserError, match=r"set.tar ends too early: copy it again"):
        find_parts(str(file))


def test_an_archive_beside_class_folders_is_passed_over(pictures):
    write_tar(pictures / "download.tar", {"cat/0.jpg": b"x", "cat/1.jpg": b"y"})
    assert find_parts(str(pictures)).kind == "class folders"
    with pytest.raises(UserError, match=r"download.tar is a file \(.tar, no image\); name a folder"):
        find_parts(str(pictures / "download.tar"))


@pytest.mark.parametrize(
    "stray",
    [
        lambda file: file.write_bytes(write_tar(file, {"cat/0.jpg": b"x" * 2000}).read_bytes()[:1000]),
        lambda file: file.write_bytes(gzip.compress(b"x" * 1000)),
        lambda file: file.touch(),
        lambda file: file.mkdir(),
        lambda file: write_tar(file, {"1.jpg": picture(0), "1.xml": b"<boxes/>"}),
        lambda file: write_tar(file, {"foo.c": b"x", "foo.h": b"y"}),
    ],
)
def test_a_stray_tar_is_passed_over(stray, pictures, tmp_path):
    stray(pictures / "stray.tar")
    assert find_parts(str(pictures)).kind == "class folders"
    write_tar(tmp_path / "tars" / "0.tar", {"0.png": picture(0, "PNG"), "0.cls": b"0"})
    stray(tmp_path / "tars" / "stray.tar")
    found = find_parts(str(tmp_path / "tars"))
    assert len(found.parts["train"]) == 1
    assert [note for note in found.notes if "stray.tar" in note]


def test_recognising_tars_of_others_reads_none_of_them(tmp_path, monkeypatch):
    file = write_tar(tmp_path / "set.tar", {"0.jpg": picture(0), "0.cls": b"0"})
    monkeypatch.setattr("equipoise.data.packed._scanned", Mock(side_effect=AssertionError))
    assert recognise(str(file)) == ""
