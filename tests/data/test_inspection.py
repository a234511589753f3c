"""Every image is looked at once: copies, sizes, what is odd; of files, tables and images in memory."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw_picture
from PIL import Image

from equipoise.config.recipe import Data
from equipoise.data.inspection import inspect
from equipoise.data.packed import pack
from equipoise.data.sources import find_parts, survey


def noise(path, seed: int, size=(96, 72)):
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def copied(tmp_path):
    """Two classes and two parts; three copies, of which one has two labels."""
    root = tmp_path / "data"
    for number in range(6):
        noise(root / "train" / "ant" / f"{number}.png", number)
        noise(root / "train" / "bee" / f"{number}.png", 10 + number)
        noise(root / "test" / "ant" / f"{number}.png", 20 + number)
        noise(root / "test" / "bee" / f"{number}.png", 30 + number)
    shutil.copy(root / "train" / "ant" / "3.png", root / "test" / "ant" / "other name.png")
    with Image.open(root / "train" / "bee" / "2.png") as image:
        image.save(root / "test" / "bee" / "smaller.jpg", quality=70)
    shutil.copy(root / "train" / "ant" / "0.png", root / "train" / "bee" / "an ant.png")
    return root


SHARED = "test images that are in the train part too: 2 (1 pixel for pixel, 1 nearly; first: "


def test_copies_in_class_folders(copied):
    _, problems, bad, inspection = survey(Data(str(copied)), check=True)
    assert problems == []
    one, two = inspection.problems()
    of_test, of_train = copied / "test" / "ant" / "other name.png", copied / "train" / "ant" / "3.png"
    assert one.startswith(f"{SHARED}{of_test} ('ant', test) and {of_train} ('ant', train)); figures on them would be")
    an_ant, zero = copied / "train" / "bee" / "an ant.png", copied / "train" / "ant" / "0.png"
    first = f"{an_ant} ('bee', train) and {zero} ('ant', train)"
    assert two.startswith(f"images with two labels: 1 (1 pixel for pixel, 0 nearly; first: {first}); at least one")
    assert "delete" not in one + two
    assert "remove" not in one + two
    assert bad == []
    assert inspection.odd == {}


def test_copies_in_lists_packed_images_and_parquet(copied, tmp_path):
    """A list with the classes' numbers; the same images packed; the same as tables."""
    parts = find_parts(str(copied)).parts
    for part, images in parts.items():
        paths = [f"{part}/{path.decode()}" for path in images.images.paths_N]
        lines = (f"{path} {label}\n" for path, label in zip(paths, images.labels_N, strict=True))
        (tmp_path / f"{part}.txt").write_text("".join(lines))
        contents = [{"bytes": images.images.content(row), "path": "x"} for row in range(len(images))]
        (tmp_path / "tables").mkdir(exist_ok=True)
        table = {"image": pa.array(contents), "label": pa.array(images.labels_N)}
        pq.write_table(pa.table(table), tmp_path / "tables" / f"{part}-0.parquet")
    pack(find_parts(str(copied)), tmp_path / "packed", 256, 2)
    lists = {"train_list": str(tmp_path / "train.txt"), "test_list": str(tmp_path / "test.txt")}
    for data in (Data(str(copied), **lists), Data(str(tmp_path / "packed")), Data(str(tmp_path / "tables"))):
        problems = survey(data, check=True)[3].problems()
        assert [line for line in problems if line.startswith(SHARED)], data
        assert [line for line in problems if line.startswith("images with two labels: 1 (1 pixel")], data


def test_images_in_memory():
    _, problems, _, inspection = survey(Data("digits"), check=True)
    assert problems == inspection.problems() == []
    assert inspection.too_alike
    assert len(inspection.places) == 1797
    assert inspection.places[0].part == "train", "of the parts the training part is first"


def test_sizes_and_what_is_odd(tmp_path):
    for number in range(5):
        noise(tmp_path / "ant" / f"{number}.png", number)
    draw_picture(tmp_path / "bee" / "0.png", 1, 0, (90, 80))
    noise(tmp_path / "bee" / "long.png", 50, (400, 90))
    noise(tmp_path / "bee" / "small.png", 51, (16, 12))
    for name, low, high in (("dark", 0, 30), ("bright", 225, 256), ("gray", 100, 103)):
        pixels = np.random.default_rng(1).integers(low, high, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "bee" / f"{name}.png")
    (tmp_path / "bee" / "zz.jpg").write_bytes(b"no image")
    inspection = inspect(find_parts(str(tmp_path)).parts)
    names = {
        what: [inspection.places[place].name.rpartition("/")[2] for place in places]
        for what, places in inspection.odd.items()
    }
    assert names == {
        "of one colour": ["gray.png"],
        "very dark": ["dark.png"],
        "very bright": ["bright.png"],
        "more than 4 times as long as wide": ["long.png"],
        "much smaller than the others": ["small.png"],
    }
    assert inspection.sizes_N2[:6].tolist() == [[96, 72]] * 5 + [[90, 80]]
    assert [error.name for error in inspection.bad] == [str(tmp_path / "bee" / "zz.jpg")]
    assert len(inspection.places) == 11


def test_no_image_can_be_read(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(b"no image")
    inspection = inspect(find_parts(str(tmp_path)).parts)
    assert len(inspection.bad) == 2
    assert inspection.problems() == []
