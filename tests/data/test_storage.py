"""Data at URLs: a real S3 server of this machine (moto) and web servers; what is fetched, how often, and what fails."""

import functools
import http.server
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import fsspec
import pytest
import torch
from conftest import draw_folder, opened, refusal, write_parquet
from launch import ENVIRONMENT, torchrun
from moto.server import ThreadedMotoServer

from equipoise import UserError
from equipoise.cli.main import main
from equipoise.config.recipe import Data
from equipoise.data import packed
from equipoise.data.decode import BadImageError, decode
from equipoise.data.images import ImageList
from equipoise.data.sources import find_parts
from equipoise.data.storage import copied

SMALL = ["--set", "views.size=24", "--arch", "resnet8", "--epochs", "1", "--batch-size", "8", "--precision", "fp32"]


class _Logged(http.server.SimpleHTTPRequestHandler):
    """Notes what is asked for, and breaks off in the middle of the files that are to be cut."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.path in self.server.cut else content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """A web server of a folder. `asked`: the paths of its GET requests."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Logged, directory=folder)) as server:
        server.asked, server.cut = [], set()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def _server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(_server, monkeypatch):
    """An empty bucket `pictures` of an S3 server, to which this process and its children turn."""
    known = {
        "ENDPOINT_URL": _server,
        "ACCESS_KEY_ID": "me",
        "SECRET_ACCESS_KEY": "secret",
        "DEFAULT_REGION": "us-east-1",
    }
    for name, value in known.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = boto3.resource("s3").Bucket("pictures")
    bucket.create()
    fsspec.filesystem("s3").invalidate_cache()
    yield bucket
    bucket.objects.all().delete()
    bucket.delete()


@pytest.fixture
def set_of_tars(tmp_path, monkeypatch) -> Path:
    """Packed images, 33 to train on in four tars."""
    monkeypatch.setattr(packed, "_IMAGES", 9)
    data = tmp_path / "data"
    draw_folder(data / "train", {"ant": 20, "bee": 13})
    draw_folder(data / "val", {"ant": 3, "bee": 3})
    packed.pack(find_parts(str(data)), tmp_path / "tars", 24, 0)
    assert len(list((tmp_path / "tars").iterdir())) == 5
    return tmp_path / "tars"


def upload(folder: Path, bucket, prefix: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), f"{prefix}/{file.relative_to(folder).as_posix()}")


def contents(images: ImageList) -> list[bytes]:
    return [images.images.content(index) for index in range(len(images))]


def check_same(there: dict[str, ImageList], here: dict[str, ImageList]) -> None:
    assert there.keys() == here.keys()
    for one, other in zip(there.values(), here.values(), strict=True):
        assert one.fingerprint() == other.fingerprint()
        assert contents(one) == contents(other)


# ---------------------------------------------------------------------------------------------- packed sets


def test_a_set_in_s3_is_the_one_that_was_packed(set_of_tars, bucket):
    upload(set_of_tars, bucket, "my/set")
    there, here = find_parts("s3://pictures/my/set/"), find_parts(str(set_of_tars))
    check_same(there.parts, here.parts)
    assert (there.kind, there.divided, there.named) == ("packed class folders", True, True)
    assert opened("s3://pictures/my/set").train.class_counts == (20, 13)
    one = find_parts("s3://pictures/my/set/validation-00000-of-00001.tar")
    assert list(one.parts) == ["validation"]


def test_each_file_is_fetched_once_and_again_when_it_has_changed(set_of_tars):
    for file in set_of_tars.iterdir():  # else the others may be of the same second and size
        os.utime(file, (1e9, 1e9))
    with web(set_of_tars) as server:
        find_parts(server.url)
        find_parts(server.url)
        asked = [path for path in server.asked if path != "/"]
        assert sorted(asked) == sorted(f"/{path.name}" for path in set_of_tars.iterdir())
        before = find_parts(server.url).parts["train"]
        for file in set_of_tars.iterdir():
            file.unlink()
        for part, (cats, dogs) in {"train": (20, 13), "val": (3, 3)}.items():  # files of the same names
            draw_folder(set_of_tars / "../other" / part, {"cat": cats, "dog": dogs})
        packed.pack(find_parts(str(set_of_tars / "../other")), set_of_tars, 24, 0)
        assert find_parts(server.url).parts["train"].class_names == ("cat", "dog")
        assert len(contents(before)) == 33, "what is open stays"


def test_what_was_listed_is_listed_anew(set_of_tars, bucket):
    """s3fs keeps listings for the life of a process."""
    upload(set_of_tars, bucket, "set")
    find_parts("s3://pictures/set")
    (set_of_tars / "more").mkdir()
    member = tarfile.TarInfo("stray")
    with tarfile.open(set_of_tars / "more" / "z.tar", "w") as tar:
        tar.addfile(member)
    upload(set_of_tars / "more", bucket, "set")
    assert any("z.tar" in note for note in find_parts("s3://pictures/set").notes)


def test_a_rank_begins_with_its_own_files(set_of_tars, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with web(set_of_tars) as server:
        copied(server.url, packed.FOLDERS)
        assert [path[-15:-13] for path in server.asked[1:]] == ["01", "03", "00", "02", "00"]


FETCH = "import sys; from equipoise.data.sources import *; print(copied(sys.argv[1], FOLDERS))"


def test_ranks_share_the_work(set_of_tars):
    """Two processes at once: one copy of each file."""
    with web(set_of_tars) as server:
        command = [sys.executable, "-c", FETCH, server.url]
        ranks = [{**os.environ, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
        started = [subprocess.Popen(command, env=rank, stdout=subprocess.PIPE, text=True) for rank in ranks]
        said = [process.communicate()[0].splitlines()[-1] for process in started]
        assert said[0] == said[1]
        assert len(server.asked) == 2 + 5, "each rank lists, and each file is fetched by one"


@pytest.mark.slow
def test_training_from_a_url_is_training_from_the_folder(set_of_tars, bucket, tmp_path, monkeypatch):
    upload(set_of_tars, bucket, "set")
    monkeypatch.setattr("launch.ENVIRONMENT", {**ENVIRONMENT, **os.environ})
    weights = []
    for name, data in (("there", "s3://pictures/set"), ("here", str(set_of_tars))):
        words = ["-m", "equipoise", "train", "pictures", "--data", data, *SMALL, "--out", str(tmp_path / name)]
        done = torchrun(2, *words, "--set", "data.holdout=0")
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["weights"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_names_in_braces_where_nothing_is_listed(set_of_tars):
    with web(set_of_tars) as server:
        (set_of_tars / "index.html").write_text("nothing is listed here")
        with pytest.raises(
            UserError, match=r"no packed images .* listed at http.*: pack .* train-\{000000..000011\}.tar"
        ):
            find_parts(server.url)
        parts = find_parts(f"{server.url}/train-{{00000..00003}}-of-00004.tar").parts
        assert {part: len(images) for part, images in parts.items()} == {"train": 33}
        with pytest.raises(UserError, match=r"3 of the 00004|3 of the 4 files .*/train-\*.tar are there"):
            find_parts(f"{server.url}/train-{{00001..00003}}-of-00004.tar")


def test_a_transfer_that_breaks_off_leaves_nothing(set_of_tars):
    with web(set_of_tars) as server:
        server.cut.add("/train-00002-of-00004.tar")
        with pytest.raises(UserError, match=r"train-00002-of-00004.tar cannot be read .*: look at the address"):
            find_parts(server.url)
        folder = next((Path(os.environ["XDG_CACHE_HOME"]) / "equipoise" / "storage").iterdir())
        assert sorted(path.name for path in folder.glob("*.tar")) == [f"train-0000{n}-of-00004.tar" for n in range(2)]
        assert not list(folder.glob(".*"))
        left = folder / ".train-00002-of-00004.tar.x1y2.equipoise-part"
        left.write_bytes(b"of a killed process")
        server.cut.clear()
        check_same(find_parts(server.url).parts, find_parts(str(set_of_tars)).parts)
        assert server.asked.count("/train-00000-of-00004.tar") == 1
        assert not left.exists()


def test_a_signature_is_no_part_of_the_name(set_of_tars):
    with web(set_of_tars) as server:
        for signature in ("a/b", "other"):
            found = find_parts(f"{server.url}/validation-00000-of-00001.tar?X-Amz-Signature={signature}")
            assert list(found.parts) == ["validation"]
        assert server.asked == ["/validation-00000-of-00001.tar?X-Amz-Signature=a/b"], "and it was copied once"
        with pytest.raises(UserError) as error:
            find_parts(f"{server.url}/absent.tar?X-Amz-Signature=secret")
        assert "secret" not in str(error.value)


def test_parquet_and_folders_of_parts(tmp_path):
    for part, labels in (("train", [0, 1, 1]), ("test", [1, 0])):
        write_parquet(tmp_path / f"set/data/{part}-00000-of-00001.parquet", labels)
    with web(tmp_path / "set") as server:
        parts = find_parts(server.url).parts
    assert {part: images.labels_N.tolist() for part, images in parts.items()} == {"train": [0, 1, 1], "test": [1, 0]}


# ---------------------------------------------------------------------------------------------- lists of images


@pytest.fixture
def listed(tmp_path) -> Path:
    root = draw_folder(tmp_path / "images", {"ant": 8, "bee": 7})
    lines = [f"{path.relative_to(root)} {int('bee' in str(path))}\n" for path in sorted(root.rglob("*.png"))]
    (root / "train.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("where", ["s3", "http"])
def test_a_list_of_images(listed, where, request):
    def check(url: str) -> None:
        there = find_parts(Data(url, train_list=f"{url}/train.txt")).parts["train"]
        here = find_parts(Data(str(listed), train_list=str(listed / "train.txt"))).parts["train"]
        assert there.images.name(0) == f"{url}/ant/0.png"
        check_same({"train": there}, {"train": here})
        assert contents(there) == contents(here), "and once more, from here"

    if where == "s3":
        upload(listed, request.getfixturevalue("bucket"), "images")
        check("s3://pictures/images")
    else:
        with web(listed) as server:
            check(server.url)
            assert server.asked.count("/ant/0.png") == 1


def test_a_list_may_be_called_anything(listed):
    (listed / "train.txt").rename(listed / "train.lst")
    with web(listed) as server:
        data = Data(server.url, train_list=f"{server.url}/train.lst?X-Amz-Signature=a/b")
        assert len(find_parts(data).parts["train"]) == 15


def test_an_image_that_is_not_there_is_a_bad_one_and_a_network_that_fails_is_not(listed):
    (listed / "ant" / "3.png").unlink()
    with web(listed) as server:
        images = find_parts(Data(server.url, train_list=str(listed / "train.txt"))).parts["train"]
        decode(images, 0)
        with pytest.raises(BadImageError, match=r"http.*/ant/3.png cannot be read \(no such file or directory\)"):
            decode(images, 3)
    decode(images, 0)
    with pytest.raises(UserError, match=r"http.*/ant/1.png cannot be read \(.*connect.*\): look at") as error:
        decode(images, 1)
    assert not isinstance(error.value, BadImageError)


@pytest.mark.slow
def test_training_from_a_list_in_s3(listed, bucket, tmp_path):
    upload(listed, bucket, "images")
    words = ["--train-list", "s3://pictures/images/train.txt", "--set", "data.holdout=0.25", *SMALL]
    run = tmp_path / "run"
    assert main(["train", "pictures", "--data", "s3://pictures/images", *words, "--out", str(run)]) == 0
    assert json.loads((run / "run.json").read_text())["data"]["kind"] == "list files"
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 0
    assert main(["evaluate", str(run)]) == 0


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://no-such-bucket/x", "no such file or directory: s3://no-such-bucket/x"),
        ("s3://pictures/no/such/folder", "no such file or directory: s3://pictures/no/such/folder"),
        ("s3://pictures/no/a.tar", "no such file or directory: s3://pictures/no/a.tar"),
        ("https://no-such-host.invalid/x", "https://no-such-host.invalid/x cannot be read (name or service not known)"),
        ("https://no-such-host.invalid/a.tar", "a.tar cannot be read (name or service not known)"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x cannot be read ("),
        ("nothing://x/y", "nothing://x/y cannot be read (Protocol not known: nothing)"),
        ("gs://pictures/x", "gs://pictures/x needs gcsfs: "),
        ("https://example.org/a.zip", "https://example.org/a.zip cannot be read (an archive: unpack it)"),
    ],
)
def test_what_cannot_be_read(url, said, bucket, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    assert said in refusal(capsys, "train", "pictures", "--data", url, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError) as error:  # not OSError: only that is expected of data
        find_parts(Data(url))
    assert ("look at the address" in str(error.value)) == ("cannot be read" in said and ".zip" not in url)


def test_nobody_said_who_we_are(bucket, monkeypatch, tmp_path):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # it would be asked for three seconds
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://pictures/x cannot be read \(Unable to locate credentials\)"):
        find_parts("s3://pictures/x")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_full_disk(set_of_tars, capsys, monkeypatch, tmp_path):
    def full(_self, _remote: str, _local: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.get_file", full)
    said = refusal(capsys, "data", f"file://{set_of_tars}")
    assert said.startswith(f"no space left on device: {tmp_path}/cache/equipoise/storage/")
    assert not [path for path in (tmp_path / "cache").rglob("*.*") if path.suffix != ".lock" and path.is_file()]


def _in_a_child(images: ImageList, answers) -> None:
    answers.put(contents(images))


def test_a_forked_process_copies_images_too(listed):
    """Loader processes are forked from one that has used fsspec's thread, which they do not have."""
    context = multiprocessing.get_context("fork")
    with web(listed) as server:
        images = find_parts(Data(server.url, train_list=f"{server.url}/train.txt")).parts["train"]
        expected = [images.images.content(0), *[path.read_bytes() for path in sorted(listed.rglob("*.png"))[1:]]]
        answers = context.Queue()
        process = context.Process(target=_in_a_child, args=(images, answers))
        process.start()
        assert answers.get(timeout=60) == expected
        process.join()
