"""Real processes that run jobs together: `workers(n).run("job", ...)` gives every rank's result, in time."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

# Processes are forked from one that has imported what takes long, and has done nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["xdit_ir.models", "diffusers.pipelines.pipeline_utils", "diffusers.loaders.peft"])


class Workers:
    """Processes with torchrun's environment, started once; job functions live in `jobs.py`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[BaseProcess] = []
        self._channels: list[Connection] = []
        self._store: TCPStore | None = None
        self._logs = tempfile.TemporaryDirectory()

    def run(self, job: str, limit: float = 240, lost: Sequence[int] = (), **arguments: Any) -> list[Any]:
        """Results of all ranks; a rank's exception comes as `{"error": class name, "message": text}`. Ranks that will
        be `lost` give none."""
        if not self._processes:
            self._start()
        for channel in self._channels:
            channel.send((job, arguments))
        deadline = time.monotonic() + limit
        results = [_answer(channel, deadline) for rank, channel in enumerate(self._channels) if rank not in lost]
        if None in results:
            logs = "\n".join(f"rank {rank}:\n{self._log(rank).read_text()[-3000:]}" for rank in range(self.count))
            self.stop()
            pytest.fail(f"job {job} did not end within {limit} s on every rank\n{logs}")
        return [json.loads(result) for result in results if result is not None]

    def _start(self) -> None:
        from worker import serve  # type: ignore[import-not-found]

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
            channel, theirs = FORKS.Pipe()
            process = FORKS.Process(target=serve, args=(theirs, own, str(self._log(rank))), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._channels.append(channel)

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name) / f"{rank}.log"

    def stop(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for channel in self._channels:
            channel.close()
        self._processes, self._channels = [], []


def _answer(channel: Connection, deadline: float) -> str | None:
    """A rank's answer, or None if it died or the time is up."""
    try:
        return channel.recv() if channel.poll(max(0.1, deadline - time.monotonic())) else None
    except EOFError:
        return None


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """Pools by number of processes."""
    pools: dict[int, Workers] = {}
    yield lambda count: pools.setdefault(count, Workers(count))
    for pool in pools.values():
        pool.stop()
