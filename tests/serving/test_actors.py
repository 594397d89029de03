"""Ranks kept by actors of Ray; with --large, where `ray` is installed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xdit_ir.models import digits
from xdit_ir.tools.census import Census, children
from xdit_ir.tools.cli import main

Ask = Callable[[int], tuple[int, Any]]


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Ask]]:
    """A server of two ranks: its process, and what asks it with a seed and compares."""
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: starts a Ray cluster")
    pytest.importorskip("ray")
    from xdit_ir.tools.served import Alone, ask, until_ready

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "xdit_ir.tools.cli", "serve", str(digits.PIPELINE), "--port", str(port), "--ray"]
    alone = Alone(str(digits.PIPELINE))

    def asked(seed: int) -> tuple[int, Any]:
        body = {"arguments": {"class_labels": [3, 7]}, "guidance": 2.0, "steps": 2, "seed": seed}
        status, content = ask(port, "/generate", body)
        return status, alone.wrong(body, content) if status == 200 else content["error"]["message"]

    with (tmp_path / "log").open("w+") as log:
        options = ["--ulysses", "2", "--device", "cpu", "--dtype", "fp32"]
        process = subprocess.Popen(
            [*command, *options], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
        try:
            until_ready(process, port)
            yield process.pid, asked
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def test_ranks_and_actors_that_end_are_started_anew(served: tuple[int, Ask]) -> None:
    pid, asked = served
    assert asked(1) == (200, "")
    keepers = [one for one in Census.of(pid).pids if "ray::Keeper" in Path(f"/proc/{one}/cmdline").read_text()]
    assert len(keepers) == 2
    (rank,) = [rank for fork in children(keepers[1]) for rank in children(fork)]
    for lost, why in ((rank, "was ended by SIGKILL"), (keepers[0], "cannot be reached")):
        os.kill(lost, signal.SIGKILL)
        status, text = asked(2)  # may come before it is noticed
        assert status == 200 or why in text, text
        assert asked(3) == (200, "")


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else name)
    assert main(["serve", str(digits.PIPELINE), "--ray", "--device", "cpu"]) == 2
    assert "--ray needs ray: pip install xdit-ir[ray]" in capsys.readouterr().err
