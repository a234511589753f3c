"""The page to try a model on: over real HTTP, and as a process."""

import base64
import io
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import ODD_NAMES, refusal
from PIL import Image
from serving import COUNTS, ask, running, until

from equipoise import UserError, load
from equipoise.cli import use
from equipoise.deploy import serve
from equipoise.runs.checkpoint import load_checkpoint

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
            until(lambda content=content: content in arrived)
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
        until(lambda: sum(answer.done() for answer in answers) == 8)
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
        until(lambda: ask(port, "/predict", picture.read_bytes())[0] == 200)  # it has noticed
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
