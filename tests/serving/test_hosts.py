"""Several hosts: what is refused at the start; and, with --large, two hosts emulated by network namespaces."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed import HashStore

from xdit_ir.errors import ServingError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.models import digits
from xdit_ir.serving.hosts import Hosts, Lobby, keep_seats
from xdit_ir.tools.census import Census, children
from xdit_ir.tools.cli import main
from xdit_ir.transport.spread import crossing, near, told

TWO = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("degrees", "hosts", "across"),
    [
        ({"ring": 2, "ulysses": 2}, TWO, ("ring",)),
        ({"cfg": 2, "ulysses": 2}, TWO, ("cfg",)),
        ({"pipefusion": 2, "tensor": 2}, TWO, ("pipefusion",)),
        ({"cfg": 2, "ring": 2}, ["a", "b", "a", "b"], ("ring",)),
        ({"ulysses": 4}, TWO, ("ulysses",)),
        ({"ulysses": 2}, TWO, ()),  # two replicas
        ({"ulysses": 2, "cfg": 2}, ["a"] * 4, ()),
    ],
)
def test_the_outer_dims_go_between_hosts(degrees: dict[str, int], hosts: list[str], across: tuple[str, ...]) -> None:
    assert crossing(Mesh.of(**degrees), hosts) == across


@pytest.mark.parametrize(
    ("degrees", "hosts", "text"),
    [
        ({"ring": 2, "ulysses": 2}, TWO, "2 hosts: ring=2 between them, ulysses=2 inside them"),
        (
            {"cfg": 2, "ulysses": 4},
            [*TWO, "c", "c", "d", "d"],
            "4 hosts: cfg=2 x ulysses=4 between them; ring=2 x ulysses=2 would keep what waits in every block inside",
        ),
        ({"ulysses": 2}, ["a", "b"], "2 hosts: ulysses=2 between them"),
        ({"ulysses": 2}, TWO, "2 hosts: no exchange of a request between them, ulysses=2 inside them"),
        ({"ulysses": 2}, ["a", "a"], ""),
    ],
)
def test_what_is_said_of_it(degrees: dict[str, int], hosts: list[str], text: str) -> None:
    assert told(Mesh.of(**degrees), hosts) == text


def test_how_many_are_near() -> None:
    assert [near(one) for one in (TWO, "abab", "aaab", "aaaabbcc", "a")] == [2, 1, 1, 2, 1]


def test_one_process_on_each_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Hosts.here() == Hosts()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Hosts.here() == Hosts(2, 1, "10.0.0.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ServingError, match="one process there, this job has 2: torchrun --nproc-per-node 1"):
        Hosts.here()


def test_hosts_that_cannot_share() -> None:
    assert Hosts(2).share(4) == 2
    with pytest.raises(ServingError, match="3 ranks cannot be shared evenly by 2 hosts; nearest legal: 2 or 4"):
        Hosts(2).share(3)


def test_hosts_that_were_started_differently() -> None:
    store = HashStore()
    lobby = Lobby(store, {"ulysses": "2", "ring": "1"})
    with pytest.raises(ServingError, match="host 1 was started with ring=2, host 0 with ring=1"):
        keep_seats(store, Hosts(2, 1), 1, {"ulysses": "2", "ring": "2"})
    lobby.close(1, 0)


def test_a_server_that_is_gone() -> None:
    store = HashStore()
    Lobby(store, {}).close(1, 0)
    with pytest.raises(ServingError, match=r"host 1 has lost the server at 127\.0\.0\.1: .*refused"):
        keep_seats(store, Hosts(2, 1), 2, {})


emulated = runpy.run_path(str(Path(__file__).with_name("emulated.py")))


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Any]:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: more processes than cores")
    try:
        made = emulated["Emulated"]()
    except emulated["Unable"] as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield made
    made.close()


CALL = ["--set", "class_labels=[3,7]", "--steps", "4", "--guidance", "2", "--dtype", "fp32", "--device", "cpu"]


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        ({"ring": 2, "ulysses": 2}, "2 hosts: ring=2 between them, ulysses=2 inside them"),
        ({"cfg": 2, "ulysses": 2}, "2 hosts: cfg=2 between them, ulysses=2 inside them"),
    ],
    ids=["r2u2", "c2u2"],
)
def test_generate(hosts: Any, tmp_path: Path, degrees: dict[str, int], said: str) -> None:
    command = ["generate", str(digits.PIPELINE), *CALL]
    assert main([*command, "--output", str(tmp_path / "alone")]) == 0
    options = [text for name, degree in degrees.items() for text in (f"--{name}", str(degree))]
    command += [*options, "--output", str(tmp_path / "both")]
    logs = [tmp_path / f"host{host}.log" for host in range(2)]
    agents = [hosts.torchrun(host, 2, command, log) for host, log in enumerate(logs)]
    for agent, log in zip(agents, logs, strict=True):
        assert ended(agent, 400) == 0, log.read_text()[-3000:]
    assert json.loads((tmp_path / "both" / "generate.json").read_text())["hosts"] == said
    assert said in " ".join(logs[0].read_text().split())
    for name in ("0000-0.png", "0000-1.png"):
        got, want = (np.array(Image.open(tmp_path / one / name)).astype(int) for one in ("both", "alone"))
        assert want.std() > 10 and abs(got - want).max() <= 1
    assert min(hosts.cable.carried) > 10_000 and hosts.cable.lost


def test_serve(hosts: Any, tmp_path: Path) -> None:
    """A rank is killed on the host that does not have the server; the others are those of the next requests."""
    from xdit_ir.tools.served import Alone, ask, until_ready

    where, port = hosts.outside, 8123
    command = ["serve", str(digits.PIPELINE), "--cfg", "2", "--device", "cpu", "--dtype", "fp32"]
    command += ["--host", "0.0.0.0", "--port", str(port)]
    logs = [tmp_path / f"host{host}.log" for host in range(2)]
    agents = [hosts.torchrun(host, 1, command, log) for host, log in enumerate(logs)]
    alone = Alone(str(digits.PIPELINE))
    bodies = [{"arguments": {"class_labels": [*range(count)]}, "guidance": 2.0, "steps": 2} for count in (1, 2, 3)]
    try:
        until_ready(agents[0], port, where)
        for body in bodies:
            status, content = ask(port, "/generate", {**body, "seed": 1}, host=where)
            assert status == 200 and not alone.wrong({**body, "seed": 1}, content), content
        number = ask(port, "/requests", {**bodies[0], "steps": 900}, host=where)[1]["id"]
        time.sleep(3)
        (worker,) = children(agents[1].pid)
        (rank,) = [rank for fork in children(worker) for rank in children(fork)]
        os.kill(rank, signal.SIGKILL)
        began = time.monotonic()
        while (answer := ask(port, f"/requests/{number}", host=where))[0] == 200:
            time.sleep(0.1)
        assert answer[0] == 500 and "rank 1 was ended by SIGKILL" in str(answer[1]), answer
        status, content = ask(port, "/generate", {**bodies[1], "seed": 2}, host=where)
        assert status == 200 and not alone.wrong({**bodies[1], "seed": 2}, content), content
        print(f"recovered in {time.monotonic() - began:.1f} s")
    finally:
        pids = [pid for agent in agents for pid in Census.of(agent.pid).pids]
        os.kill(children(agents[0].pid)[0], signal.SIGINT)
        statuses = [ended(agent, 60) for agent in agents]
    said = [log.read_text() for log in logs]
    assert statuses == [1, 0] and "leaked" not in "".join(said), said  # torchrun's, of a job that was stopped
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert "2 hosts: cfg=2 between them" in said[0]


def ended(agent: subprocess.Popen[str], limit: float) -> int:
    """The status of an agent, which is killed with all that it has started if it takes longer."""
    try:
        return agent.wait(limit)
    except subprocess.TimeoutExpired:
        for pid in Census.of(agent.pid).pids:
            os.kill(pid, signal.SIGKILL)
        return agent.wait()
