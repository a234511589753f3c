"""The page of `equipoise serve` in headless Chromium."""

import base64
from dataclasses import replace

import pytest
import torch
from browser import asked_for, in_scheme, screens
from conftest import ODD_NAMES
from PIL import Image
from serving import COUNTS, running, until

from equipoise.deploy import serve
from equipoise.evaluation.none_of_these import KnownClasses

LOOK = """
const box = element => element.getBoundingClientRect();
return {
    wide: document.documentElement.scrollWidth,
    outside: [...document.querySelectorAll('main *')].filter(
        element => box(element).right > innerWidth + .5 || box(element).left < -.5).map(one => one.outerHTML),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector('.share')).color,
};
"""


def shown(browser) -> list[tuple[str, str, str]]:
    """Class, percent and training images of each line of the newest picture."""
    of_newest = browser.find_elements("css selector", "#results > li:first-child .classes li")
    return [tuple(line.text.split("\n")) for line in of_newest]


def wait_for(browser, pictures: int) -> None:
    """Until so many pictures lie on the page, and all have been looked at."""
    lines, busy = ("css selector", "#results > li"), ("css selector", "[aria-busy]")
    until(lambda: len(browser.find_elements(*lines)) == pictures and not browser.find_elements(*busy))


@pytest.mark.slow
def test_in_a_browser(browser, classifier, odd_run, picture, tmp_path):
    """Pictures come by the file dialog; the prior moves the figures to those of `predict`; three widths, light and
    dark; the browser complains of nothing and asks nobody else."""
    from selenium.webdriver import ActionChains, Keys

    photo = tmp_path / "a photograph whose name is long.jpg"
    Image.effect_noise((900, 500), 90).convert("RGB").save(photo)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    with running(classifier) as port:
        url = f"http://127.0.0.1:{port}/"
        browser.get(url)
        wait_for(browser, 0)
        files = browser.find_element("id", "files")
        assert (files.accessible_name, files.aria_role) == ("Choose pictures", "button")
        files.send_keys(f"{photo}\n{picture}")
        wait_for(browser, 2)
        status = browser.find_element("id", "status")
        assert (status.aria_role, status.text) == ("status", "2 pictures looked at")
        assert browser.find_element("css selector", "#results h3").text == picture.name
        slider = browser.find_element("id", "tau")
        assert slider.accessible_name == "How common are the classes where your pictures come from?"
        assert slider.aria_role == "slider"
        images = dict(zip(ODD_NAMES, COUNTS, strict=True))
        half_way = {name: count**0.5 for name, count in images.items()}
        for keys, prior in ("", "uniform"), (Keys.END, "train"), (Keys.HOME + 10 * Keys.ARROW_RIGHT, half_way):
            slider.send_keys(keys)
            ((_, expected),) = classifier.predict(picture, 5, prior)
            assert shown(browser) == [
                (" ".join(name.split()), f"{100 * share:.1f} %", f"{images[name]} training images")
                for name, share in expected
            ]
        slider.send_keys(Keys.END)
        about = "is taken to be 6 times as common as two lines| (5 training images)."
        assert about in browser.find_element("id", "meaning").text
        assert about in " ".join(slider.get_attribute("aria-valuetext").split())
        near = browser.find_elements("css selector", "#results > li:first-child .near img")
        assert len(near) == 4
        assert all(int(image.get_attribute("naturalWidth")) == 40 for image in near)
        for width, scheme in screens(browser):
            seen = browser.execute_script(LOOK)
            assert seen["wide"] <= width
            assert seen["outside"] == []
            assert in_scheme(seen, scheme)
        # What the keyboard reaches, and what each is called.
        reached = []
        browser.execute_script("document.getElementById('files').focus()")
        for _ in range(4):
            reached.append(browser.switch_to.active_element.accessible_name)
            ActionChains(browser).send_keys(Keys.TAB).perform()
        assert [name.split()[0] for name in reached] == ["Choose", "How", "Clear", "From"]
        browser.find_element("css selector", "summary").send_keys(Keys.ENTER)
        example = f'curl --data-binary @picture.jpg "{url}predict?top=3"'
        assert browser.find_element("css selector", "details[open] pre").text == example
        browser.find_element("id", "clear").send_keys(Keys.ENTER)
        wait_for(browser, 0)
        assert browser.switch_to.active_element.get_attribute("id") == "files"
        assert browser.get_log("browser") == []
        asked = {one for one in asked_for(browser) if not one.startswith(("data:", "blob:"))}
        assert asked == {url, f"{url}model", f"{url}predict?top=3"}


@pytest.mark.slow
def test_cleared_while_it_looks(browser, classifier, picture, held):
    free, order = held
    with running(classifier, explain=0) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        browser.find_element("id", "files").send_keys(str(picture))
        until(lambda: order)
        browser.find_element("id", "clear").click()
        free.set()
        until(lambda: not browser.execute_script("return looking"))
        assert browser.find_element("id", "status").text == "No picture yet."
        browser.find_element("id", "files").send_keys(str(picture))
        wait_for(browser, 1)
        assert browser.find_element("id", "status").text.startswith(f"{picture.name}: ")


@pytest.mark.slow
def test_a_page_without_its_model_says_so(browser, classifier, monkeypatch):
    monkeypatch.setattr(serve, "described", lambda *_: 1 / 0)
    with running(classifier, explain=0) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        about = browser.find_element("id", "about")
        until(lambda: about.text != "…")
        assert about.text.startswith("This page has failed (")


@pytest.mark.slow
def test_strange_pictures_and_files_in_a_browser(browser, classifier, picture):
    """Dropped on the page: one that shows none of the classes, and a file that is no picture."""
    width = classifier.model.width
    strange = replace(classifier, known=KnownClasses(torch.eye(3, width), threshold=1.1))
    drop = """
    const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], arguments[1]));
    document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
    """
    with running(strange, explain=0) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        about = browser.find_element("id", "about")
        browser.execute_script(drop, base64.b64encode(picture.read_bytes()).decode(), "x.png")
        wait_for(browser, 1)
        assert browser.find_element("css selector", "#results .none").text.startswith("None of these: ")
        assert browser.find_element("id", "status").text == "x.png: none of these"
        assert "It cannot tell" not in about.text
        assert "No nearest training pictures: they were not asked for." in about.text
        browser.execute_script(drop, base64.b64encode(b"words").decode(), "a.txt")
        wait_for(browser, 2)
        sentence = "this file cannot be read (it is no image: not JPEG, PNG, "
        assert sentence in browser.find_element("css selector", "#results .fault").text.replace("This", "this")
        assert browser.find_element("id", "status").text.startswith(f"a.txt: {sentence}")
        browser.execute_script(drop.replace("bytes = ", "bytes = new Uint8Array(21 << 20), unused = "), "", "b.bmp")
        wait_for(browser, 3)
        assert browser.find_element("id", "status").text == "b.bmp: this file is larger than 20 MB; make it smaller"
