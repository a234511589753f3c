"""Packed images: what is made smaller, what stays, what is left when packing fails; files shared, and damaged ones."""

import io
import os
import pickle
import shlex
import signal
import subprocess
import sys
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


def test_a_tar_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise.data.packed._IMAGES", 3)
    out = tmp_path / "out"
    packed(large_pictures(tmp_path / "data"), out)
    (out / "train-00001-of-00002.tar").unlink()
    with pytest.raises(UserError, match=r"1 of the 2 files .*out/train-\*.tar are there: .* run equipoise pack again"):
        find_parts(str(out))
