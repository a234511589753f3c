"""A trained model on a page in the browser, `serve.html`: pictures dropped on it become classes. Programs get the same
as JSON. Only this machine is answered, and of the pages in its browsers only this one.

Pictures are looked at one at a time, in the order in which they have arrived.
"""

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import ClientDisconnect

from equipoise import __version__
from equipoise.base.errors import UserError
from equipoise.deploy.predict import Classifier
from equipoise.report.charts import thumbnail
from equipoise.runs.checkpoint import described

_MOST_BYTES = 20 * 2**20  # of a picture; its pixels are limited where it is decoded
_MOST_WAITING = 32  # pictures, each of which is in memory
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_BODY = {"requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}
_REFUSED = {"description": "refused; `detail` is a sentence that says why"}
_TAU = "how frequent classes are: as their training images to this power, so 0 for all alike and 1 for as in training"
Tau = Annotated[float, Query(ge=0, le=1, description=_TAU)]
Top = Annotated[int, Query(ge=1, description="how many of the most probable classes")]


@dataclass(frozen=True)
class OfClass:
    """`training_images`: None where the model does not say how many there were."""

    name: str
    probability: float
    training_images: int | None


@dataclass(frozen=True)
class Near:
    """A training image, the cosine of its features with those of the picture, and a data URL of it, made small; None
    where it cannot be read any more."""

    file: str
    of_class: str
    cosine: float
    thumbnail: str | None


@dataclass(frozen=True)
class Answer:
    """The most probable classes, whether the picture shows none of all classes (None where the model cannot tell), and
    the nearest training images."""

    classes: list[OfClass]
    none_of_these: bool | None
    neighbours: list[Near]


@dataclass(frozen=True)
class Model:
    """`training_images`: by class, empty where they are not known. `without_neighbours`: why there are none, if so.
    `most_bytes`: of a picture."""

    model: str
    checkpoint: str
    calibration: str
    class_names: list[str]
    training_images: list[int]
    tells_none_of_these: bool
    without_neighbours: str
    most_bytes: int


def listen(port: int) -> socket.socket:
    """A socket of this machine at `port` (0: a free one). Raises UserError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be from 0 to 65535, not {port}")
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()  # Python adds to the error's own
        raise UserError(f"port {port} cannot be had ({why}); name another with --port, or 0 for a free one") from None


def serve(classifier: Classifier, explain: int, opened: socket.socket) -> None:
    """Answer at the socket until SIGINT comes, with `explain` of the nearest training images."""
    app = application(classifier, explain)
    print(f"http://127.0.0.1:{opened.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
    plain: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off"}  # whatever else is installed
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, **plain))
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)  # of requests that are given up
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[opened])


def application(classifier: Classifier, explain: int) -> FastAPI:
    """The page and the same as JSON. The features of the training images are computed first, unless they were."""
    app = FastAPI(title="Equipoise", version=__version__, docs_url=None, redoc_url=None, responses={403: _REFUSED})
    app.middleware("http")(_refuse_others)
    app.exception_handler(RequestValidationError)(_refuse_parameters)
    without_neighbours = "" if explain else "they were not asked for"
    try:
        _ = explain and classifier.train
    except UserError as error:
        explain, without_neighbours = 0, str(error)
    checkpoint, worker, places = classifier.checkpoint, ThreadPoolExecutor(1), asyncio.Semaphore(_MOST_WAITING)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return Path(__file__).with_name("serve.html").read_text(encoding="utf-8")

    @app.get("/model")
    async def model() -> Model:
        """The model and its classes."""
        about = str(classifier.origin), described(classifier.origin, checkpoint), classifier.calibration
        classes, known = (list(checkpoint.class_names), list(checkpoint.class_counts)), classifier.known is not None
        return Model(*about, *classes, known, without_neighbours, _MOST_BYTES)

    @app.post("/predict", openapi_extra=_BODY, responses=dict.fromkeys((400, 413, 422, 503), _REFUSED))
    async def predict(request: Request, tau: Tau = 0, top: Top = 5) -> Answer:
        """The classes of a picture, which is the body."""
        if places.locked():
            raise HTTPException(503, f"{_MOST_WAITING} pictures are waiting already; send this one again in a moment")
        async with places:
            work = look_at, classifier, await _received(request), tau, top, explain
            return await asyncio.get_running_loop().run_in_executor(worker, *work)

    return app


def look_at(classifier: Classifier, content: bytes, tau: float, top: int, explain: int) -> Answer:
    """The answer about a picture, from the bytes of its file. Raises HTTPException where there is none."""
    counts = dict(zip(classifier.checkpoint.class_names, classifier.checkpoint.class_counts, strict=False))
    if tau and not counts:
        raise HTTPException(400, "this model has no counts of its training images; leave out tau")
    prior = {name: count**tau for name, count in counts.items()} if tau else "uniform"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture"
        file.write_bytes(content)
        predicted = classifier.predict(file, top, prior, explain=explain)
    for error in predicted.errors:
        raise HTTPException(400, str(error).replace(str(file), "this file"))
    (_, classes), (near,), (strange,) = next(iter(predicted)), predicted.neighbours, predicted.strange
    return Answer(
        [OfClass(name, share, counts.get(name)) for name, share in classes],
        strange,
        [Near(of, name, x, thumbnail(classifier.train[0], row, 160)) for of, name, x, row in near],
    )


async def _received(request: Request) -> bytes:
    """The body. What is refused here or before is read and dropped by uvicorn, so that its sender gets the answer."""
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > _MOST_BYTES:
                raise HTTPException(413, f"this file is larger than {_MOST_BYTES // 2**20} MB; make it smaller")
    except ClientDisconnect:
        raise HTTPException(400, "the picture has not arrived as a whole") from None
    return bytes(content)


async def _refuse_parameters(_: Request, error: RequestValidationError) -> Response:
    return JSONResponse({"detail": "; ".join(f"{of['loc'][-1]}: {of['msg']}" for of in error.errors())}, 422)


async def _refuse_others(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse what pages of other sites ask, even of one whose name leads to this machine's address (DNS rebinding)."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if host.split(":")[0] not in ("127.0.0.1", "localhost") or origin not in (None, f"http://{host}"):
        detail = "only this machine is answered, at http://127.0.0.1 or http://localhost, and no pages of other sites"
        response = JSONResponse({"detail": detail}, 403)
    else:
        response = await answer(request)
    response.headers.update(_HEADERS)
    return response
