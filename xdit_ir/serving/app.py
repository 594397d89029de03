"""The protocol: OpenAI's images endpoint, a plain one for images and videos, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import difflib
import secrets
import time
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import fastapi
from fastapi import responses
from fastapi.exceptions import RequestValidationError

from xdit_ir.errors import XditError
from xdit_ir.generation.request import Request, parse_size
from xdit_ir.serving.server import Server
from xdit_ir.serving.work import BUSY, CANCELLED, FAILED, LATE, REFUSED, Made, Work, WorkError

STATUS = {REFUSED: 400, FAILED: 500, CANCELLED: 499, LATE: 504, BUSY: 503}
IMAGES = "/v1/images/generations"
TICK = 0.2  # seconds between looks whether the client is still there
STRICT = {"extra": "forbid"}


@dataclass
class ImagesBody:
    """OpenAI's request for images. What stands in the last line has no meaning here, and is taken."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    prompt: str = ""
    n: int = 1
    size: str = "auto"
    response_format: str = "b64_json"
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    user: str = ""
    quality: str = ""
    style: str = ""


@dataclass
class PlainBody:
    """What `generate` takes, for one prompt; `timeout`: seconds, at most the server's."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    n: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    timeout: float | None = None


def make_app(server: Server) -> Any:
    """The endpoints of a server."""
    app, points = fastapi.FastAPI(title="xdit-ir"), _Endpoints(server)
    app.add_api_route(IMAGES, points.images, methods=["POST"])
    app.add_api_route("/v1/models", points.models, methods=["GET"])
    app.add_api_route("/generate", points.generate, methods=["POST"])
    app.add_api_route("/requests", points.submit, methods=["POST"], status_code=202)
    app.add_api_route("/requests/{number}", points.fetch, methods=["GET"])
    app.add_api_route("/requests/{number}", points.cancel, methods=["DELETE"])
    app.add_api_route("/health", points.health, methods=["GET"])
    app.add_api_route("/metrics", points.metrics, methods=["GET"], response_class=responses.PlainTextResponse)
    app.add_exception_handler(XditError, _failed)
    app.add_exception_handler(RequestValidationError, _unfit)
    return app


async def _failed(_: fastapi.Request, error: Exception) -> Any:
    """An error as OpenAI's clients read it."""
    outcome = error.outcome if isinstance(error, WorkError) else REFUSED
    kind = "invalid_request_error" if outcome == REFUSED else "server_error"
    content = {"error": {"message": str(error), "type": kind, "param": None, "code": outcome.replace(" ", "_")}}
    return responses.JSONResponse(content, STATUS[outcome])


async def _unfit(http: fastapi.Request, error: Exception) -> Any:
    """A body that is none of the endpoint, by the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    wrong = error.errors()[0]
    where = ".".join(str(part) for part in wrong["loc"][1:])
    text = f"{where}: {wrong['msg']}" if where else str(wrong["msg"])
    if wrong["type"] == "unexpected_keyword_argument":
        names = [one.name for one in fields(ImagesBody if http.url.path == IMAGES else PlainBody)]
        near = difflib.get_close_matches(where, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        text = f"{http.url.path} does not take {where}; {hint}it takes {', '.join(names)}"
    return await _failed(http, WorkError(REFUSED, text))


class _Endpoints:
    def __init__(self, server: Server) -> None:
        self.server = server

    async def images(self, body: ImagesBody, http: fastapi.Request) -> dict[str, Any]:
        if body.response_format != "b64_json":
            text = f"response_format={body.response_format!r}: expected 'b64_json'; nothing is stored for a URL"
            raise WorkError(REFUSED, text)
        width, height = (None, None) if body.size == "auto" else parse_size(body.size)
        request = request_of(body, body.prompt or None, width, height)
        made = await _awaited(self.server.submit(request, body.n), http)
        return {"created": int(time.time()), "data": [{"b64_json": _text(one)} for one in made]}

    async def generate(self, body: PlainBody, http: fastapi.Request) -> dict[str, Any]:
        work = self._submitted(body)
        return _told(work, await _awaited(work, http))

    async def submit(self, body: PlainBody) -> dict[str, Any]:
        work = self._submitted(body)
        self.server.keep(work)
        return _told(work)

    async def fetch(self, number: int) -> dict[str, Any]:
        work = self._kept(number)
        if not work.future.done():
            return _told(work)
        del self.server.kept[number]
        return _told(work, work.future.result())

    async def cancel(self, number: int) -> dict[str, Any]:
        work = self._kept(number)
        work.cancel()
        return _told(work)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.server.model, "object": "model", "owned_by": "xdit-ir"}]}

    async def health(self) -> Any:
        trouble = self.server.trouble
        content = {"ready": not trouble, "why": trouble, "queued": len(self.server.queue)}
        return responses.JSONResponse(content, 503 if trouble else 200)

    async def metrics(self) -> str:
        return self.server.metrics()

    def _submitted(self, body: PlainBody) -> Work:
        request = request_of(body, body.prompt, body.width, body.height, body.frames)
        return self.server.submit(request, body.n, body.timeout)

    def _kept(self, number: int) -> Work:
        if number not in self.server.kept:
            raise fastapi.HTTPException(404, f"there is no request {number}, or its result was fetched already")
        return self.server.kept[number]


def request_of(
    body: ImagesBody | PlainBody, prompt: str | None, width: int | None, height: int | None, frames: int | None = None
) -> Request:
    """What both endpoints ask for; a seed is drawn here if none is given, as all ranks need the same."""
    return Request(
        () if prompt is None else (prompt,),
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        frames=frames,
        steps=body.steps,
        guidance=body.guidance,
        seed=secrets.randbelow(1 << 31) if body.seed is None else body.seed,
        arguments=body.arguments,
    )


def _text(made: Made) -> str:
    return base64.b64encode(made.content).decode()


def _told(work: Work, made: list[Made] | None = None) -> dict[str, Any]:
    items = [{"media_type": one.media_type, "b64": _text(one)} for one in made or ()]
    return {"id": work.number, "state": work.state, "seed": work.request.seed} | ({"items": items} if items else {})


async def _awaited(work: Work, http: fastapi.Request) -> list[Made]:
    """The result, for as long as the client is there."""
    future = asyncio.wrap_future(work.future)
    try:
        while not future.done():
            await asyncio.wait([future], timeout=TICK)
            if not future.done() and await http.is_disconnected():
                work.cancel()
        return future.result()
    finally:
        if not work.future.done():  # the server itself stops
            work.cancel()
