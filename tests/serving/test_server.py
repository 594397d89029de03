"""A real server of two ranks, the second on what counts as another host: every answer is what one process makes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from xdit_ir.generation.request import Request
from xdit_ir.generation.setup import Setup
from xdit_ir.models import digits
from xdit_ir.serving.hosts import Hosts, Lobby, keep_seats
from xdit_ir.serving.server import Server
from xdit_ir.serving.team import TeamSpec

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from xdit_ir.tools.served import Alone, ask, images  # noqa: E402

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
        return ask(self.port, path, body, method)

    def wait(self, *, ready: bool, limit: float = 240) -> None:
        deadline = time.monotonic() + limit
        while (self.ask("/health")[0] == 200) != ready:
            assert time.monotonic() < deadline and self.server.fatal is None, self.server.trouble
            time.sleep(0.1)

    def counted(self, outcome: str) -> int:
        return self.server.queue.outcomes[outcome]


def ranks() -> dict[str, int]:
    """The processes of the server, by name."""
    found = multiprocessing.active_children()
    return {one.name: one.pid or 0 for one in found if one.name.startswith("rank")}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    from xdit_ir.serving.app import make_app

    spec = TeamSpec(setup(ulysses=2), 2, 0, "cpu", 16, start=300, grace=60, near=1)
    store = HashStore()
    lobby = Lobby(store, {})
    elsewhere = threading.Thread(target=keep_seats, args=(store, Hosts(2, 1), 1, {}))
    elsewhere.start()
    server = Server(spec, replicas=1, room=100, patience=280, lobby=lobby)
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
    lobby.close(2, 1)
    elsewhere.join(30)
    assert not elsewhere.is_alive() and not ranks()
    assert all(not team.thread.is_alive() for team in server.teams)


@pytest.fixture(scope="module")
def alone() -> Alone:
    """What one process makes."""
    return Alone(str(digits.PIPELINE))


def wanted(labels: list[int], guidance: float = 2.0, steps: int = 2, seed: int = 0) -> dict[str, Any]:
    return {"arguments": {"class_labels": labels}, "guidance": guidance, "steps": steps, "seed": seed}


def check(alone: Any, body: dict[str, Any], answer: tuple[int, Any]) -> None:
    status, content = answer
    assert status == 200, content
    assert not alone.wrong(body, content)


def test_many_requests_of_several_shapes(client: Client, alone: Alone) -> None:
    """Some are cancelled, while they wait or run; all others are right."""
    bodies = [wanted(labels, guidance, seed=place % 2) for place in range(3) for labels, guidance in SHAPES]
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


def test_a_request_that_is_wrong_or_too_late(client: Client, alone: Alone) -> None:
    status, content = client.ask("/v1/images/generations", {"prompt": "a cat"})
    assert status == 400 and "does not take prompt" in content["error"]["message"], content
    status, content = client.ask("/generate", {"promt": "a cat"})
    assert status == 400 and "does not take promt; did you mean prompt?" in content["error"]["message"], content
    status, content = client.ask("/v1/images/generations", {"seed": "one"})
    assert status == 400 and content["error"]["message"].startswith("seed: "), content
    assert client.ask("/generate", wanted([3]) | {"steps": 0})[0] == 400
    assert client.ask("/generate", wanted([3]) | {"n": 1000})[0] == 400
    assert client.ask("/v1/images/generations", {"response_format": "url"})[0] == 400
    status, content = client.ask("/generate", {"arguments": {"class_labels": ["three"]}})
    assert status in (400, 500) and content["error"]["message"], content
    status, content = client.ask("/generate", wanted([3], steps=LONG) | {"timeout": 1})
    assert status == 504 and "timed out after 1 s" in content["error"]["message"], content
    check(alone, wanted([3]), client.ask("/generate", wanted([3])))


def test_a_client_that_leaves(client: Client, alone: Alone) -> None:
    before = client.counted("cancelled")
    with socket.create_connection(("127.0.0.1", client.port)) as line:
        body = json.dumps(wanted([3], steps=LONG)).encode()
        lines = ["POST /generate HTTP/1.1", "host: x", "content-type: application/json"]
        line.sendall("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)
        time.sleep(1)
    check(alone, wanted([7]), client.ask("/generate", wanted([7])))
    assert client.counted("cancelled") == before + 1


def test_several_results_have_seeds_that_follow(client: Client, alone: Alone) -> None:
    status, content = client.ask("/generate", wanted([3], seed=5) | {"n": 2})
    assert status == 200 and len(images(content)) == 2
    for place, item in enumerate(content["items"]):
        assert not alone.wrong(wanted([3], seed=5 + place), {"items": [item]})


def test_a_rank_that_dies(client: Client, alone: Alone) -> None:
    """The request that ran is lost, and says why; those that wait are made by the ranks that are started then."""
    with ThreadPoolExecutor(2) as pool:
        lost = pool.submit(client.ask, "/generate", wanted([3], steps=LONG))
        time.sleep(2)
        waiting = pool.submit(client.ask, "/generate", wanted([3, 7]))
        time.sleep(0.5)
        os.kill(ranks()["rank 1"], signal.SIGKILL)
        status, content = lost.result()
        assert status == 500 and "rank 1 was ended by SIGKILL" in content["error"]["message"], content
        check(alone, wanted([3, 7]), waiting.result())
    client.wait(ready=True)
    metrics = client.ask("/metrics")[1]
    assert "xdit_ir_restarts_total 1\n" in metrics and "xdit_ir_replicas_ready 1\n" in metrics
    assert 'xdit_ir_requests_total{outcome="failed"}' in metrics


def test_ranks_that_cannot_start(tmp_path: Any) -> None:
    """The server gives up, and tells those who wait the reason."""
    broken = Setup(str(tmp_path), {"ulysses": 1}, None, (), whole=False, offload=False, data=1)
    server = Server(TeamSpec(broken, 1, 0, "cpu", 16, start=200, grace=10, near=1), 1, 4, 100)
    server.start()
    waiting, stopped = server.submit(Request()), threading.Event()
    server.watch(stopped.set)
    assert stopped.wait(280)
    assert "rank 0 cannot start" in str(waiting.future.exception(0))  # or its client would keep the server
    assert server.fatal is not None and "rank 0 cannot start: GenerationError" in str(server.fatal)
    assert server.trouble == server.teams[0].trouble
    server.close()
    assert waiting.state == "busy"


def test_a_small_soak(request: pytest.FixtureRequest) -> None:
    """Twelve shapes from eight clients, some cancelled, a rank killed: all right, and nothing left."""
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: takes a minute on two idle cores")
    command = [sys.executable, "-m", "xdit_ir.tools.soak_serving", "--requests", "40", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0 and "nothing wrong, nothing left" in done.stdout, done.stdout + done.stderr[-2000:]
