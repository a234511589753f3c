"""Packed images: what is made smaller, what stays, what is left when packing fails; files shared, and damaged ones."""

import gzip
import io
import os
import pickle
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import draw_folder, opened, refusal
from PIL import Image
from torchvision.transforms import v2

from benchmarks.rehearsal import build_imagenet
from equipoise import UserError
from equipoise.cli.main import main
from equipoise.config.recipe import Data
from equipoise.data.decode import decode
from equipoise.data.packed import pack
from equipoise.data.sources import as_recognised, find_parts, recognise

TRAIN, VALIDATION = "train-00000-of-00001.tar", "validation-00000-of-00001.tar"


def large_pictures(root: Path, size: tuple[int, int] = (90, 130)) -> Path:
    """Two classes of two parts: smooth pictures, so that JPEG keeps them."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            for number in range(count):
                coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                path = root / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return root


def packed(data: Path, out: Path, short_side: int = 48, threads: int = 0) -> str:
    return pack(find_parts(as_recognised(Data(str(data)))), out, short_side, threads)


def test_large_images_become_smaller(tmp_path):
    data, out = large_pictures(tmp_path / "data"), tmp_path / "out"
    assert packed(data, out).startswith(f"{out}: 2 tars written, 0 there already (10 images, 0.")
    packed(data, tmp_path / "again", threads=3)
    for name in (TRAIN, VALIDATION):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    before, after = opened(data), opened(out)
    assert after.kind == "packed class folders"
    for mine, theirs in zip(after.named().values(), before.named().values(), strict=True):
        assert mine.labels_N.tolist() == theirs.labels_N.tolist()
        assert mine.class_names == theirs.class_names
        assert mine.fingerprint() != theirs.fingerprint()
        for index in range(len(mine)):
            expected = v2.Resize(48)(Image.fromarray(decode(theirs, index)))
            made = decode(mine, index)
            assert made.shape == np.asarray(expected).shape
            assert np.abs(made.astype(int) - np.asarray(expected)).mean() < 3


def test_small_images_stay_byte_for_byte(pictures, tmp_path):
    Image.new("RGB", (90_000, 40), (200, 10, 10)).save(pictures / "cat" / "strip.png")  # longer than JPEG may be
    packed(pictures, tmp_path / "out", short_side=32)
    before, after = find_parts(str(pictures)).parts["train"], find_parts(str(tmp_path / "out")).parts["train"]
    for index in range(len(before)):
        assert after.images.content(index) == before.images.content(index)
    assert after.images.name(13) == f"bee/1.png in {tmp_path}/out/{TRAIN}"
    assert not find_parts(str(tmp_path / "out")).divided, "and so a part is held out, as of the folders"


def test_exif_orientation_is_kept_or_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("small", (40, 30)), ("large", (200, 150))):
        for label in ("ant", "bee"):
            path = tmp_path / "data" / label / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.linear_gradient("L").resize(size).convert("RGB").save(path, exif=exif, quality=95)
    packed(tmp_path / "data", tmp_path / "out")
    before, after = find_parts(str(tmp_path / "data")).parts["train"], find_parts(str(tmp_path / "out")).parts["train"]
    shapes = [decode(after, index).shape for index in range(2)]
    assert shapes == [(64, 48, 3), (40, 30, 3)]
    small = Image.fromarray(decode(before, 0)).resize((48, 64), Image.Resampling.BILINEAR)
    assert np.abs(decode(after, 0).astype(int) - np.asarray(small)).mean() < 3


def test_a_published_data_set_is_recognised_packed(tmp_path):
    """Classes are numbers of its lists, parts are theirs, and no list is asked for any more."""
    root, out = build_imagenet(tmp_path / "imagenet", counts=(3, 2)), str(tmp_path / "out")
    packed(root, tmp_path / "out")
    assert recognise(out) == recognise(str(root)) == "imagenet-lt"
    before, after = opened(root, benchmark="imagenet-lt"), opened(out, benchmark="imagenet-lt")
    assert list(before.named()) == list(after.named()) == ["train", "validation", "test"]
    assert before.train.class_names == after.train.class_names
    assert not find_parts(out).named
    with pytest.raises(UserError, match="is packed: its parts are in its files, and no list can divide it otherwise"):
        find_parts(Data(out, train_list="x.txt"))


# ---- what goes wrong


def test_what_is_there_already_is_kept(tmp_path):
    data, out = large_pictures(tmp_path / "data"), tmp_path / "out"
    packed(data, out)
    before = (out / TRAIN).stat().st_mtime_ns
    (out / VALIDATION).unlink()
    (out / f".{VALIDATION}.x1y2.equipoise-part").write_bytes(b"of a killed process")
    assert "1 tar written, 1 there already" in packed(data, out)
    assert (out / TRAIN).stat().st_mtime_ns == before
    assert sorted(path.name for path in out.iterdir()) == [TRAIN, VALIDATION]
    with pytest.raises(UserError, match="there already, of other images or another size; name another --out"):
        packed(data, out, short_side=40)


def test_other_files_are_not_hidden_by_packed_ones(pictures, tmp_path):
    """Neither the class folders themselves nor parts that the data no longer has."""
    with pytest.raises(UserError, match="lies inside the data, where"):
        packed(pictures, pictures)
    packed(pictures, tmp_path / "out")
    (tmp_path / "out" / TRAIN).rename(tmp_path / "out" / VALIDATION)
    with pytest.raises(UserError, match=r"holds other files, as validation-.*; name a folder of its own"):
        packed(pictures, tmp_path / "out")


def test_a_broken_image_is_named_and_nothing_is_left(tmp_path):
    data = large_pictures(tmp_path / "data")
    whole = (data / "train/bee/1.png").read_bytes()
    (data / "train/bee/1.png").write_bytes(whole[: len(whole) // 2])  # its header is good
    with pytest.raises(UserError, match=r"train/bee/1.png cannot be read .*--check lists all such images"):
        packed(data, tmp_path / "out", threads=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_pack_says(tmp_path, capsys, monkeypatch):
    data, out = tmp_path / "my pictures", tmp_path / "it's packed"
    draw_folder(data / "train", {"ant": 2, "bee": 1})
    words = ["pack", str(data), "--out", str(out), "--workers", "0"]
    assert main(words) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("train on it: ")
    assert shlex.split(command)[1:] == ["train", "--data", str(out)]
    (out / TRAIN).unlink()
    monkeypatch.setattr("equipoise.data.packed._write", Mock(side_effect=OSError(28, "No space left on device")))
    assert refusal(capsys, *words) == f"no space left on device: {out}/{TRAIN}"
    assert list(out.iterdir()) == []
    assert refusal(capsys, *words, "--short-side", "4") == "--short-side must be at least 8 pixels, not 4"
    with pytest.raises(UserError, match="digits needs no packing: its images are in a few files already"):
        packed(Path("digits"), tmp_path / "other")


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_it_leaves_no_file(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        noise = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (800, 800, 3), dtype=np.uint8)).save(noise, "JPEG")
        for number in range(400):  # more than a machine that is busy packs before it is interrupted
            (tmp_path / "data" / name / f"{number}.jpg").write_bytes(noise.getvalue())
    command = [sys.executable, "-m", "equipoise", "pack", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    while not (tmp_path / "out").is_dir() or not any(path.stat().st_size for path in (tmp_path / "out").iterdir()):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_training_on_packed_images(tmp_path):
    data = draw_folder(tmp_path / "data", {"ant": 12, "bee": 8})
    assert main(["pack", str(data), "--out", str(tmp_path / "packed"), "--short-side", "24", "--workers", "2"]) == 0
    words = ["--set", "views.size=24", "--arch", "resnet8", "--epochs", "1", "--batch-size", "8", "--workers", "2"]
    run = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "packed"), *words, "--out", str(run)]) == 0
    assert '"kind": "packed class folders"' in (run / "run.json").read_text()
    assert main(["evaluate", str(run)]) == 0


# ---------------------------------------------------------------------------------------------- reading


@pytest.fixture
def out(pictures, tmp_path) -> Path:
    pack(find_parts(str(pictures)), tmp_path / "out", 256, 0)
    return tmp_path / "out"


def test_subsets_and_other_processes_see_the_same(out):
    images = find_parts(str(out)).parts["train"]
    some = images.take(np.array([20, 3, 3]))
    contents = [images.images.content(index) for index in (20, 3, 3)]
    assert [some.images.content(index) for index in range(3)] == contents
    assert some.images.name(0).startswith("cat/2.png in ")
    assert len({some.fingerprint(), images.fingerprint(), images.take(np.array([3, 20, 3])).fingerprint()}) == 3
    sent = pickle.dumps(some)
    assert len(sent) < (out / TRAIN).stat().st_size / 4, "to a process that does not share, the path is sent"
    assert pickle.loads(sent).images.content(0) == contents[0]


def test_a_changed_image_is_named(out):
    path = out / TRAIN
    content = path.read_bytes()
    image = find_parts(str(out)).parts["train"].images.content(0)
    place = content.index(image) + len(image) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    images = find_parts(str(out)).parts["train"]
    with pytest.raises(UserError) as error:
        decode(images, 0)
    assert str(error.value).startswith(
        f"ant/0.png in {out}/{TRAIN} cannot be read (its bytes have changed since they were packed); "
    )
    decode(images, 1)


@pytest.mark.parametrize(
    "damage",
    [
        *[lambda path, share=share: path.read_bytes()[: int(share * path.stat().st_size)] for share in (0, 0.3, 0.999)],
        lambda path: path.read_bytes().replace(b'"images"', b'"imagez"'),
    ],
)
def test_what_is_no_whole_file_of_packed_images(damage, out):
    (out / TRAIN).write_bytes(damage(out / TRAIN))
    with pytest.raises(UserError, match=r"train-.*tar is no whole tar of packed images .*; copy it again, or pack"):
        find_parts(str(out))


def test_files_that_do_not_belong_together(out, tmp_path):
    assert len(find_parts(str(out / TRAIN)).parts["train"]) == 21, "one file is a data set too"
    other = draw_folder(tmp_path / "other", {"dog": 3, "eel": 3})
    pack(find_parts(str(other)), tmp_path / "second", 256, 0)
    (tmp_path / "second" / TRAIN).rename(out / "test-00000-of-00001.tar")
    with pytest.raises(UserError, match=r"were not packed together"):
        find_parts(str(out))


def test_packed_images_inside_the_data_are_refused(pictures):
    with pytest.raises(UserError, match="packed lies inside the data, where it would be taken for a class"):
        packed(pictures, pictures / "packed")
    assert not (pictures / "packed").exists()


# ---------------------------------------------------------------------------------------------- tars of others


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
    packed(tmp_path / "set", tmp_path / "out", short_side=10)
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


def test_a_tar_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise.data.packed._IMAGES", 3)
    out = tmp_path / "out"
    packed(large_pictures(tmp_path / "data"), out)
    (out / "train-00001-of-00002.tar").unlink()
    with pytest.raises(UserError, match=r"1 of the 2 files .*out/train-\*.tar are there: .* run equipoise pack again"):
        find_parts(str(out))
