"""Two nodes of one machine: two agents of torchrun, each with a host name of its own (a UTS namespace).

Ranks of a node are successive, and ranks count from the outermost mesh dim to the innermost, so that Ulysses stays
inside nodes, and what exchanges less, or waits less for it, leads from one to the other.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

JOB = Path(__file__).with_name("two_nodes.py")
NAMED = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
CASES: dict[int, list[dict[str, Any]]] = {
    4: [{}, {"ring": 2, "ulysses": 2}],
    8: [
        {},
        {"ring": 2, "ulysses": 4},
        {"cfg": 2, "ulysses": 4},
        {"pipefusion": 2, "ulysses": 4},
        {"cfg": 2, "ring": 2, "ulysses": 2},
        {"ulysses": 8},
    ],
}
ACROSS: dict[int, list[list[str]]] = {
    4: [["ring"]],
    8: [["ring"], ["cfg"], ["pipefusion"], ["cfg"], ["ulysses"]],
}


def able() -> bool:
    """Whether a process may give itself a host name."""
    tools = all(map(shutil.which, ("unshare", "hostname")))
    return tools and not subprocess.run([*NAMED, "a", "true"], capture_output=True, check=False).returncode


def ranks_of(count: int, cases: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """What every rank wrote, half of them on each node."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    agents = []
    for node in range(2):
        how = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(count // 2)]
        where = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *how,
            *where,
            str(JOB),
            str(folder),
            json.dumps(cases),
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with (folder / f"agent{node}.log").open("w") as log:
            agents.append(subprocess.Popen([*NAMED, f"node-{node}", *command], env=env, stdout=log, stderr=log))
    try:
        statuses = [agent.wait(600) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert statuses == [0, 0], "".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("count", [4, 8])
def test_ulysses_stays_inside_a_node(count: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Without degrees that is planned; with degrees it is how ranks are numbered. Equal to one process either way."""
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: two agents with two or four processes each")
    if not able():
        pytest.skip("no UTS namespaces here")
    ranks = ranks_of(count, CASES[count], tmp_path)
    for found in ranks:
        assert max(one["error"] for one in found) < 1e-5
        assert found[0]["hosts"] == ["node-0"] * (count // 2) + ["node-1"] * (count // 2)
        planned, *given = found
        assert [one["across"] for one in given] == ACROSS[count]
        assert planned["degrees"] == ranks[0][0]["degrees"] and "ulysses" not in planned["across"], planned
    took, told = ranks[0][0]["said"]
    assert f"in hosts of {count // 2}: took" in took and told.startswith("2 hosts: ") and "would keep" not in told
