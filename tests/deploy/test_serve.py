"""The page to try a model on: over real HTTP, as a process, and in headless Chromium."""

import base64
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from browser import brightness
from conftest import ODD_NAMES, refusal
from PIL import Image

from equipoise import UserError, load
from equipoise.cli import use
from equipoise.deploy import serve
from equipoise.evaluation.none_of_these import KnownClasses
from equipoise.runs.checkpoint import load_checkpoint

COUNTS = (30, 12, 5)


@pytest.fixture(scope="module")
def classifier(odd_run, tmp_path_factory):
    """Of `odd_run`; the features of its training images are kept in this object."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    loaded = load(odd_run)
    _ = loaded.train
    patch.undo()
    return loaded


@pytest.fixture
def picture(odd_run) -> Path:
    return odd_run.parent / "data" / "test" / ODD_NAMES[1] / "2.png"


@contextmanager
def running(classifier, explain=4):
    """The port of a server of this process."""
    server = uvicorn.Server(uvicorn.Config(serve.application(classifier, explain), log_level="error", lifespan="off"))
    with serve.listen(0) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield opened.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def ask(port: int, path: str, content: bytes | None = None, **headers: str):
    """The status of the answer, and what it says."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET" if content is None else "POST", path, content, headers)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    return response.status, json.loads(said) if response.headers["content-type"] == "application/json" else said


# ---- what is answered


def test_answers_are_those_of_predict(classifier, picture):
    with running(classifier, explain=2) as port:
        answers = {tau: ask(port, f"/predict?tau={tau}&top=3", picture.read_bytes()) for tau in (0, 0.5, 1)}
        _, model = ask(port, "/model")
    assert model["class_names"] == list(ODD_NAMES)
    assert model["training_images"] == list(COUNTS)
    assert model["calibration"] == classifier.calibration
    assert (model["tells_none_of_these"], model["without_neighbours"]) == (False, "")
    half = {name: count**0.5 for name, count in zip(ODD_NAMES, COUNTS, strict=True)}
    for tau, prior in ((0, "uniform"), (0.5, half), (1, "train")):
        status, answer = answers[tau]
        assert status == 200
        predicted = classifier.predict(picture, 3, prior, explain=2)
        ((_, expected),) = predicted
        assert [of["name"] for of in answer["classes"]] == [name for name, _ in expected]
        assert [of["probability"] for of in answer["classes"]] == pytest.approx([share for _, share in expected])
        assert all(of["training_images"] == COUNTS[ODD_NAMES.index(of["name"])] for of in answer["classes"])
        assert answer["none_of_these"] is None
        near = [(of["file"], of["of_class"], of["cosine"]) for of in answer["neighbours"]]
        assert near == [pytest.approx(of[:3]) for of in predicted.neighbours[0]]
        for of in answer["neighbours"]:
            kind, _, data = of["thumbnail"].partition("base64,")
            assert kind == "data:image/png;"
            with Image.open(io.BytesIO(base64.b64decode(data))) as shown, Image.open(of["file"]) as file:
                assert np.array_equal(np.asarray(shown), np.asarray(file))


def test_a_run_whose_training_images_are_gone(odd_run, picture, tmp_path):
    run = shutil.copytree(odd_run, tmp_path / "run")
    checkpoint = load_checkpoint(run / "best.pt")
    gone = replace(checkpoint.recipe, data=replace(checkpoint.recipe.data, path=str(tmp_path / "gone")))
    replace(checkpoint, recipe=gone).save(run / "best.pt")
    with running(load(run)) as port:
        _, model = ask(port, "/model")
        status, answer = ask(port, "/predict", picture.read_bytes())
    assert model["without_neighbours"].endswith(f"there is no file or folder at {tmp_path}/gone")
    assert (status, answer["neighbours"]) == (200, [])


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"", 400, "this file cannot be read (it is empty: 0 bytes)"),
        (b"%PDF-1.7", 400, "this file cannot be read (it is PDF: convert it to JPEG)"),
        (b"some words", 400, "this file cannot be read (it is no image: not JPEG, "),
        (b"P5 99999 99999 255\n", 400, "it has more than 268,435,456 pixels: make it smaller"),
        (b"P5 40 40 255\nabc", 400, "this file cannot be read (image file is truncated"),
        (bytes(30_000_000), 413, "this file is larger than 20 MB; make it smaller"),
    ],
)
def test_a_wrong_file_gets_its_sentence(content, status, sentence, classifier):
    with running(classifier, explain=0) as port:
        answered, said = ask(port, "/predict", content)
        assert answered == status
        assert sentence in said["detail"]
        said = "tau: Input should be less than or equal to 1; top: Input should be greater than or equal to 1"
        assert ask(port, "/predict?tau=1.1&top=0", b"") == (422, {"detail": said})


def test_a_model_without_counts(classifier, picture):
    unknown = replace(classifier, checkpoint=replace(classifier.checkpoint, class_counts=()))
    with running(unknown, explain=0) as port:
        assert ask(port, "/predict?tau=1", picture.read_bytes())[0] == 400
        _, answer = ask(port, "/predict", picture.read_bytes())
    assert [of["training_images"] for of in answer["classes"]] == [None] * 3


def test_others_are_refused(classifier):
    """By the name they came by (DNS rebinding), and by the page that sent them."""
    with running(classifier, explain=0) as port:
        own = f"localhost:{port}"
        for path in ("/", "/model", "/openapi.json", "/nothing"):
            for headers in (
                {"Host": "evil.example"},
                {"Host": f"evil.example:{port}"},
                {"Host": "127.0.0.1.evil.example"},
                {"Host": own, "Origin": "http://evil.example"},
                {"Host": own, "Origin": "null"},
                {"Host": own, "Origin": "http://localhost:1"},  # another program of this machine
                {"Host": own, "Origin": f"https://{own}"},
            ):
                status, said = ask(port, path, **headers)
                assert status == 403, headers
                assert said["detail"].startswith("only this machine is answered")
        for host in (own, f"127.0.0.1:{port}", "localhost"):
            assert (
                ask(port, "/model", Host=host)[0] == ask(port, "/model", Host=host, Origin=f"http://{host}")[0] == 200
            )
        assert ask(port, "/predict", b"", Host=own, Origin="http://evil.example")[0] == 403
        _, described = ask(port, "/openapi.json")
    documented = {path: {*next(iter(of.values()))["responses"]} for path, of in described["paths"].items()}
    assert documented == {"/model": {"200", "403"}, "/predict": {"200", "400", "403", "413", "422", "503"}}


# ---- many at once


@pytest.fixture
def held(monkeypatch):
    """The server's work on the first picture lasts until this is set; what was worked on is in `order`."""
    free, order, real = threading.Event(), list[bytes](), serve.look_at

    def look_at(classifier, content, *options):
        order.append(content)
        if len(order) == 1:
            free.wait(20)
        return real(classifier, content, *options)

    monkeypatch.setattr(serve, "look_at", look_at)
    yield free, order
    free.set()


def test_twenty_at_once_are_answered_in_order(classifier, picture, held, monkeypatch):
    """One after the other, as they came, each with its own answer."""
    free, order = held
    arrived, received = [], serve._received

    async def receive(request):
        arrived.append(await received(request))
        return arrived[-1]

    monkeypatch.setattr(serve, "_received", receive)
    pictures = [picture.read_bytes() + bytes([number]) for number in range(20)]  # PNG ignores what follows
    with running(classifier, explain=0) as port, ThreadPoolExecutor(20) as senders:
        alone = ask(port, "/model")
        answers = []
        for content in pictures:
            answers.append(senders.submit(ask, port, "/predict", content))
            while content not in arrived:
                time.sleep(0.01)
            assert ask(port, "/model") == alone, "it answers meanwhile"
        assert order == pictures[:1]
        free.set()
        said = [answer.result() for answer in answers]
    assert order == pictures
    assert said == [said[0]] * 20
    assert said[0][0] == 200


def test_too_many_at_once_are_refused(classifier, picture, held):
    free, _ = held
    with running(classifier, explain=0) as port, ThreadPoolExecutor(40) as senders:
        answers = [senders.submit(ask, port, "/predict", picture.read_bytes()) for _ in range(40)]
        while sum(answer.done() for answer in answers) < 8:
            time.sleep(0.01)
        large = bytes(15_000_000)  # more than the system takes off the sender before the server reads
        assert ask(port, "/predict", large)[0] == 503
        free.set()
        said = [answer.result() for answer in answers]
        assert [status for status, _ in said].count(200) == 32
        refused = {answer["detail"] for status, answer in said if status == 503}
        assert refused == {"32 pictures are waiting already; send this one again in a moment"}
        assert ask(port, "/predict", picture.read_bytes())[0] == 200


def test_a_sender_that_goes_away(classifier, picture, capfd):
    with running(classifier, explain=0) as port:
        for _ in range(40):  # more than may wait
            with socket.create_connection(("127.0.0.1", port)) as sender:
                sender.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        for _ in range(600):  # until it has noticed
            if ask(port, "/predict", picture.read_bytes())[0] == 200:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("their places stay taken")
    assert capfd.readouterr().err == ""


# ---- the command


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there SIGINT cannot be sent to another process")
def test_the_command(odd_run, picture, capsys):
    """Until Ctrl-C, then quietly, also where it is at work; its port is its own."""
    words = [sys.executable, "-m", "equipoise", "serve", str(odd_run), "--port", "0", "--explain", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith(f"{odd_run}/best.pt, best checkpoint")
            url = process.stdout.readline().split()[0]
            port = int(url.removeprefix("http://127.0.0.1:"))
            assert b"<title>Equipoise" in ask(port, "/")[1]
            assert ask(port, "/model")[1]["without_neighbours"] == "they were not asked for"
            said = refusal(capsys, "serve", str(odd_run), "--port", str(port))
            assert said == (
                f"port {port} cannot be had (address already in use); name another with --port, or 0 for a free one"
            )
            content = picture.read_bytes()
            senders = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
            for sender in senders:
                head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
                sender.sendall(head.encode() + content)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
            for sender in senders:
                sender.close()
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def test_the_recipe_of_an_authors_checkpoint(monkeypatch, capsys):
    """As of `predict`: the authors' checkpoint does not say with which mean it was trained."""
    taken = []

    def stop(*words):
        taken.extend(words)
        raise UserError("enough")

    monkeypatch.setattr(use, "load", stop)
    words = "serve", "inat.pth.tar", "--recipe", "inat2018", "--device", "cpu", "--port", "0"
    assert refusal(capsys, *words) == "enough"
    assert taken == ["inat.pth.tar", "cpu", "inat2018"]


def test_refusals(odd_run, capsys, monkeypatch):
    assert refusal(capsys, "serve", str(odd_run), "--port", "65536") == "--port must be from 0 to 65535, not 65536"
    assert refusal(capsys, "serve", str(odd_run), "--explain", "-1") == "--explain must be at least 0, not -1"
    monkeypatch.setattr(use, "find_spec", lambda name: None)
    said = refusal(capsys, "serve", str(odd_run))
    assert said == "serve needs FastAPI and uvicorn: pip install fastapi uvicorn"


# ---- the page


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
    for _ in range(600):
        lines = browser.find_elements("css selector", "#results > li")
        if len(lines) == pictures and not browser.find_elements("css selector", "[aria-busy]"):
            return
        time.sleep(0.05)
    raise AssertionError(browser.find_element("id", "status").text)


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
        for width in (360, 768, 1280):
            for scheme in ("light", "dark"):
                screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
                media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                seen = browser.execute_script(LOOK)
                assert seen["wide"] <= width
                assert seen["outside"] == []
                paper, ink = brightness(seen["paper"]), brightness(seen["ink"])
                assert (paper > 0.9 and ink < 0.6) if scheme == "light" else (paper < 0.15 and ink > 0.5)
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
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        assert {one for one in asked if not one.startswith(("data:", "blob:"))} == {
            url, *(url + path for path in ("model", "predict?top=3"))
        }  # fmt: skip


@pytest.mark.slow
def test_cleared_while_it_looks(browser, classifier, picture, held):
    free, order = held
    with running(classifier, explain=0) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        browser.find_element("id", "files").send_keys(str(picture))
        while not order:
            time.sleep(0.01)
        browser.find_element("id", "clear").click()
        free.set()
        while browser.execute_script("return looking"):
            time.sleep(0.01)
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
        while about.text == "…":
            time.sleep(0.01)
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
