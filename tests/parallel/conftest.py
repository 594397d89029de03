"""Real processes that run jobs together: `workers(n).run("job", ...)` gives every rank's result, in time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from torch.distributed import TCPStore

WORKER = Path(__file__).with_name("worker.py")
HERE = str(WORKER.parent)
if HERE not in sys.path:  # pytest runs in `importlib` mode: helpers of this folder are made importable here
    sys.path.insert(0, HERE)


class Workers:
    """Processes with torchrun's environment, started once; job functions live in `jobs.py`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[str]] = []
        self._answers: list[queue.Queue[str | None]] = []
        self._logs: list[IO[str]] = []
        self._store: TCPStore | None = None

    def run(self, job: str, limit: float = 240, lost: Sequence[int] = (), **arguments: Any) -> list[Any]:
        """Results of all ranks; a rank's exception comes as `{"error": class name, "message": text}`. Ranks that will
        be `lost` give none."""
        if not self._processes:
            self._start()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"job": job, "arguments": arguments}) + "\n")
            process.stdin.flush()
        deadline = time.monotonic() + limit
        results = [self._answer(answers, deadline) for rank, answers in enumerate(self._answers) if rank not in lost]
        if None in results:
            logs = "\n".join(f"rank {rank}:\n{self._tail(rank)}" for rank in range(self.count))
            self.stop()
            pytest.fail(f"job {job} did not end within {limit} s on every rank\n{logs}")
        return [json.loads(result) for result in results if result is not None]

    def _answer(self, answers: queue.Queue[str | None], deadline: float) -> str | None:
        """A rank's answer, or None if it died or the time is up."""
        try:
            return answers.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            return None

    def _start(self) -> None:
        # As torchrun's agent does: the store lives here, so that no one else can take its port in the meantime.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": self.count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "OMP_NUM_THREADS": 1,
        }
        for rank in range(self.count):
            own = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **own},
            )
            answers: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(process, answers), daemon=True).start()
            self._processes.append(process)
            self._answers.append(answers)
            self._logs.append(log)

    def _tail(self, rank: int) -> str:
        self._logs[rank].seek(0)
        return self._logs[rank].read()[-3000:]

    def stop(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()
        self._processes, self._answers, self._logs = [], [], []


def _read(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """Pools by number of processes."""
    pools: dict[int, Workers] = {}
    yield lambda count: pools.setdefault(count, Workers(count))
    for pool in pools.values():
        pool.stop()
