"""The page about a data set: as text, and as headless Chromium draws it."""

import re
import shutil

import numpy as np
import pytest
from browser import look_at
from PIL import Image

from equipoise.config.recipe import Data
from equipoise.data.sources import survey
from equipoise.evaluation.labels import Doubt
from equipoise.report.data_page import write_data_page

ODD = "<b>x & y<"


@pytest.fixture
def data(tmp_path):
    """A class with an odd name; of two pictures copies in the test part, one of them pixel for pixel; one is dark."""
    root = tmp_path / "data"
    for part, count in (("train", 8), ("test", 2)):
        for label, name in enumerate((ODD, "bee")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                random = np.random.default_rng([len(part), label, number])
                small = random.integers(0, 255, (9, 12, 3), dtype=np.uint8)
                size = (90 + 10 * number, 80)
                Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(root / part / name / f"{number}.png")
    shutil.copy(root / "train" / ODD / "1.png", root / "test" / ODD / "same.png")
    with Image.open(root / "train" / ODD / "2.png") as image:
        image.save(root / "test" / ODD / "saved again.jpg", quality=60)
    Image.fromarray(np.random.default_rng(0).integers(0, 30, (60, 90, 3), dtype=np.uint8)).save(
        root / "train" / "bee" / "dark.png"
    )
    (root / "train" / "bee" / "zz.png").write_bytes(b"no image")
    return root


def write(data, out, doubts=None):
    """`doubts`: rows of the places that the inspection has."""
    found, _, _, inspection = survey(Data(str(data)), check=True)
    if doubts is not None:
        doubts = [Doubt(inspection.places[row], 0.0123, "bee & co", 0.9) for row in doubts]
    return write_data_page(str(data), found, inspection, out, doubts)


def test_everything_is_there(data, tmp_path):
    page = write(data, tmp_path / "page.html").read_text()
    headings = ["Copies in another part", "Odd images", "Images of each class", "Sizes"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    assert not re.search("<(script|iframe|object|b>x)", page)
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)', page))
    copies = page.split("<h2>")[1]
    kinds = re.findall("<span>(.*?)</span>", copies)
    assert kinds == ["look alike", "same pixels"], "what needs a look comes first"
    assert copies.count("<img ") == 4
    assert "&lt;b&gt;x &amp; y&lt;/b&gt;" not in copies
    assert "<b>&lt;b&gt;x &amp; y&lt;</b>, test" in copies
    of_test, of_train = (f"{data}/{part}/&lt;b&gt;x &amp; y&lt;/" for part in ("test", "train"))
    assert f"{of_test}same.png\t{of_train}1.png\tsame pixels\n" in copies
    assert "Very dark: 1" in page
    assert "bee/dark.png" in page.split("<h2>Odd")[1]
    assert "zz.png cannot be read (it is no image" in page
    sizes = page.split("<h2>Sizes</h2>")[1]
    assert "The smallest is 90 x 60" in sizes
    assert "the largest 160 x 80" in sizes


@pytest.mark.slow
def test_labels_to_look_at(browser, data, tmp_path):
    page = write(data, tmp_path / "page.html", [2, 9])
    text = page.read_text()
    assert "Labels to look at: 2. " in text.split("<h2>")[0]
    section = text.split("<h2>Labels to look at</h2>")[1].split("<h2>")[0]
    assert "For these 2 images another class is more likely" in section
    assert section.count("<img ") == section.count("1.2 % probable; rather <b>bee &amp; co</b>, 90.0 %") == 2
    assert f"<b>&lt;b&gt;x &amp; y&lt;</b>, train<br>{data}/train/&lt;b&gt;x &amp; y&lt;/2.png" in section
    look_at(browser, page)
    assert "; 60 are shown" in write(data, page, [0] * 70).read_text()
    text = write("digits", page, []).read_text()
    assert "No label is far less likely than it is for its class" in text
    assert "No copies, no images that cannot be read, none that are odd." in text


def test_nothing_to_complain_of(tmp_path):
    (page,) = [write("digits", tmp_path / "page.html").read_text()]
    assert "No copies, no images that cannot be read, none that are odd." in page
    assert "only exact copies could be told from them" in page
    assert "Copies in" not in page


@pytest.mark.slow
def test_in_a_browser(browser, data, tmp_path):
    assert look_at(browser, write(data, tmp_path / "page.html")) == 2
