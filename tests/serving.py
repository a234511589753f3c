"""A server of `equipoise serve` in this process, and questions to it."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.client import HTTPConnection

import uvicorn

from equipoise.deploy import serve

COUNTS = (30, 12, 5)  # of `odd_run`


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


def until(happened: Callable[[], object]) -> None:
    """Wait for what takes a moment; one that never comes is an error, and not a test that never ends."""
    for _ in range(6000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it has not happened within a minute")
