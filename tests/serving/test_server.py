"""A real server of two ranks: every answer is what one process makes, whatever happens to other requests."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from xdit_ir.generation.generate import called
from xdit_ir.generation.meter import Meter
from xdit_ir.generation.request import Request
from xdit_ir.generation.setup import Setup
from xdit_ir.models import digits
from xdit_ir.serving.server import Server
from xdit_ir.serving.team import TeamSpec

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
LONG = 400  # steps: it would take longer than any of these tests
SHAPES = [([3], 1.0), ([3], 2.0), ([3, 7], 2.0), ([1, 4, 8], 1.0)]


def setup(**degrees: int) -> Setup:
    return Setup(str(digits.PIPELINE), degrees, torch.float32, (), whole=False, offload=False, data=1)


@dataclass
class Client:
    """Speaks to a server as anybody would."""

    server: Server
    port: int

    def ask(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text

    def wait(self, *, ready: bool, limit: float = 240) -> None:
        deadline = time.monotonic() + limit
        while (self.ask("/health")[0] == 200) != ready:
            assert time.monotonic() < deadline and self.server.fatal is None, self.server.trouble
            time.sleep(0.1)

    def counted(self, outcome: str) -> int:
        return self.server.queue.outcomes[outcome]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    from xdit_ir.serving.app import make_app

    spec = TeamSpec(setup(ulysses=2), 2, 0, "cpu", 16, start=300, grace=60)
    server = Server(spec, replicas=1, room=100, patience=280)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        http = uvicorn.Server(uvicorn.Config(make_app(server), log_level="warning"))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
        server.start()
        thread.start()
        made = Client(server, listening.getsockname()[1])
        made.wait(ready=True)
        yield made
        http.should_exit = True
        thread.join()
    server.close()
    assert all(not team.thread.is_alive() for team in server.teams)


@pytest.fixture(scope="module")
def alone() -> Any:
    """What one process makes."""
    one = setup()
    meter = Meter(torch.device("cpu"))
    pipe = one.pipeline(one.start((), "cpu"), meter)
    pipe.set_progress_bar_config(disable=True)

    @functools.cache
    def made(text: str) -> list[np.ndarray[Any, Any]]:
        body = json.loads(text)
        arguments, steps, guidance, seed = (body[name] for name in ("arguments", "steps", "guidance", "seed"))
        request = Request(steps=steps, guidance=guidance, seed=seed, arguments=arguments)
        return [np.array(image).astype(int) for image in called(pipe, request, request.calls(pipe)[0], meter)]

    return lambda body: made(json.dumps(body))


def wanted(labels: list[int], guidance: float = 2.0, steps: int = 2, seed: int = 0) -> dict[str, Any]:
    return {"arguments": {"class_labels": labels}, "guidance": guidance, "steps": steps, "seed": seed}


def images(answer: Any) -> list[np.ndarray[Any, Any]]:
    texts = [one.get("b64_json") or one["b64"] for one in answer.get("data") or answer["items"]]
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int) for text in texts]


def check(alone: Any, body: dict[str, Any], answer: tuple[int, Any]) -> None:
    status, content = answer
    assert status == 200, content
    want = alone(body)
    got = images(content)
    assert len(got) == len(want) and all(abs(a - b).max() <= 1 for a, b in zip(got, want, strict=True))


def test_many_requests_of_several_shapes(client: Client, alone: Any) -> None:
    """Some are cancelled, while they wait or run; all others are right."""
    bodies = [wanted(labels, guidance, seed=place % 2) for place in range(6) for labels, guidance in SHAPES]
    running = client.ask("/requests", wanted([5], steps=LONG))[1]["id"]
    with ThreadPoolExecutor(len(bodies)) as pool:
        paths = ["/generate" if place % 2 else "/v1/images/generations" for place in range(len(bodies))]
        answers = [pool.submit(client.ask, path, body) for path, body in zip(paths, bodies, strict=True)]
        waiting = [client.ask("/requests", wanted([6]))[1]["id"] for _ in range(3)]
        for number in (*waiting, running):
            assert client.ask(f"/requests/{number}", method="DELETE")[0] == 200
        found = [answer.result() for answer in answers]
    for body, answer in zip(bodies, found, strict=True):
        check(alone, body, answer)
    for number in (*waiting, running):
        status, content = client.ask(f"/requests/{number}")
        assert status == 499 and "cancelled" in content["error"]["message"], content
    assert client.counted("cancelled") == 4
    assert len(client.server.kept) == len(client.server.queue) == 0


def test_a_request_that_is_wrong_or_too_late(client: Client, alone: Any) -> None:
    status, content = client.ask("/v1/images/generations", {"prompt": "a cat"})
    assert status == 400 and "does not take prompt" in content["error"]["message"], content
    assert client.ask("/generate", {"promt": "a cat"})[0] == 422
    assert client.ask("/generate", wanted([3]) | {"steps": 0})[0] == 400
    assert client.ask("/generate", wanted([3]) | {"n": 1000})[0] == 400
    assert client.ask("/v1/images/generations", {"response_format": "url"})[0] == 400
    status, content = client.ask("/generate", {"arguments": {"class_labels": ["three"]}})
    assert status in (400, 500) and content["error"]["message"], content
    status, content = client.ask("/generate", wanted([3], steps=LONG) | {"timeout": 1})
    assert status == 504 and "timed out after 1 s" in content["error"]["message"], content
    check(alone, wanted([3]), client.ask("/generate", wanted([3])))


def test_a_client_that_leaves(client: Client, alone: Any) -> None:
    before = client.counted("cancelled")
    with socket.create_connection(("127.0.0.1", client.port)) as line:
        body = json.dumps(wanted([3], steps=LONG)).encode()
        lines = ["POST /generate HTTP/1.1", "host: x", "content-type: application/json"]
        line.sendall("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)
        time.sleep(1)
    check(alone, wanted([7]), client.ask("/generate", wanted([7])))
    assert client.counted("cancelled") == before + 1


def test_several_results_have_seeds_that_follow(client: Client, alone: Any) -> None:
    status, content = client.ask("/generate", wanted([3], seed=5) | {"n": 2})
    assert status == 200 and len(images(content)) == 2
    for place, image in enumerate(images(content)):
        assert abs(image - alone(wanted([3], seed=5 + place))[0]).max() <= 1


def test_a_rank_that_dies(client: Client, alone: Any) -> None:
    """The request that ran is lost, and says why; those that wait are made by the ranks that are started then."""
    with ThreadPoolExecutor(2) as pool:
        lost = pool.submit(client.ask, "/generate", wanted([3], steps=LONG))
        time.sleep(2)
        waiting = pool.submit(client.ask, "/generate", wanted([3, 7]))
        time.sleep(0.5)
        os.kill(client.server.teams[0].processes[1].pid, signal.SIGKILL)
        status, content = lost.result()
        assert status == 500 and "rank 1 was ended by SIGKILL" in content["error"]["message"], content
        check(alone, wanted([3, 7]), waiting.result())
    client.wait(ready=True)
    metrics = client.ask("/metrics")[1]
    assert "xdit_ir_restarts_total 1\n" in metrics and "xdit_ir_replicas_ready 1\n" in metrics
    assert 'xdit_ir_requests_total{outcome="failed"}' in metrics


def test_ranks_that_cannot_start(tmp_path: Any) -> None:
    """The server gives up, with the reason."""
    broken = Setup(str(tmp_path), {"ulysses": 1}, None, (), whole=False, offload=False, data=1)
    server = Server(TeamSpec(broken, 1, 0, "cpu", 16, start=200, grace=10), 1, 4, 100)
    server.start()
    waiting = server.submit(Request())
    for team in server.teams:
        team.thread.join(280)
    assert server.fatal is not None and "rank 0 cannot start: GenerationError" in str(server.fatal)
    assert server.trouble == server.teams[0].trouble
    server.close()
    assert waiting.state == "busy"
