"""One rank of a server: a process that makes what it is told, together with the other ranks."""

from __future__ import annotations

import mimetypes
import os
import signal
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from xdit_ir.errors import XditError
from xdit_ir.generation import files
from xdit_ir.generation.generate import called
from xdit_ir.generation.job import Job
from xdit_ir.generation.meter import Meter
from xdit_ir.generation.request import Request, UnfitRequest
from xdit_ir.generation.setup import Setup
from xdit_ir.ir.mesh import Mesh
from xdit_ir.porting.denoisers import denoisers
from xdit_ir.serving.work import DONE, FAILED, REFUSED, Made
from xdit_ir.transport.distributed import Communicator

READY, WORK, STOP, ENDED = "ready", "work", "stop", "ended"


@dataclass(frozen=True)
class RankSpec:
    """What a rank is started with: the pipeline, its place among `size` ranks and among the `near` ones of all replicas
    on this host, its device, where the store is."""

    setup: Setup
    rank: int
    size: int
    local: int
    near: int
    store: tuple[str, int]
    device: str | None
    fps: int

    def environment(self) -> dict[str, str]:
        """What a launcher would set. If one has started the server, that is not what it has set for that."""
        host, port = self.store
        found = {"RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_RANK": self.local, "LOCAL_WORLD_SIZE": self.near}
        found |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        return {name: str(value) for name, value in {**found, "MASTER_ADDR": host, "MASTER_PORT": port}.items()}


class Stopped(XditError):
    """The request that is worked on shall end."""


class Stopping:
    """Hears that a request shall end. All ranks look together, before each call of a denoiser, so all leave it at the
    same place; one that does not come ends the waiting of the others."""

    def __init__(self, connection: Connection, size: int, device: torch.device) -> None:
        self.connection, self.mesh, self.device = connection, Mesh.of(ulysses=size), device
        self.number, self.wanted = 0, False
        self.communicator: Communicator | None = None

    def begin(self, number: int) -> None:
        """A request begins."""
        self.number, self.wanted = number, False

    def check(self, *_: Any) -> None:
        """Raise `Stopped` on all ranks if one has heard it."""
        while self.connection.poll():
            self.wanted |= self.connection.recv() == (STOP, self.number)
        if self.communicator is None or self.communicator.ended:
            self.communicator = Communicator(self.mesh, self.device)
        with self.communicator.working():
            wanted = any(self.communicator.of_all(self.wanted))
        if wanted:
            raise Stopped(f"request {self.number} was stopped")


def run_rank(spec: RankSpec, connection: Connection) -> None:
    """Load the pipeline, say that it is ready or why it is not, and make what comes, until nobody is there."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends its ranks
    tqdm.set_lock(threading.RLock())  # by itself it takes a named semaphore, which stays when a rank is killed
    os.environ.update(spec.environment())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // spec.near))
    try:
        job = spec.setup.start((), spec.device)
        pipe = spec.setup.pipeline(job, Meter(job.device))
    except Exception as error:
        connection.send((FAILED, 0, f"{type(error).__name__}: {error}"))
        return
    pipe.set_progress_bar_config(disable=True)
    stopping = Stopping(connection, spec.size, job.device)
    for module in denoisers(pipe).values():
        module.register_forward_pre_hook(stopping.check)
    connection.send((READY, 0, None))
    with suppress(EOFError, BrokenPipeError):
        while True:
            kind, number, *rest = connection.recv()
            if kind == WORK:
                stopping.begin(number)
                outcome, result = _made(pipe, job, spec.fps, *rest)
                connection.send((outcome, number, result))


def _made(pipe: Any, job: Job, fps: int, request: Request, count: int) -> tuple[str, Any]:
    """What became of a request, and its results as files (of the first rank) or the text of its error."""
    try:
        calls, found = request.calls(pipe), []
        for place in range(count):
            seeded = replace(request, seed=request.seed + place)
            found += [item for call in calls for item in called(pipe, seeded, call, Meter(job.device))]
        return DONE, _encoded(found, fps) if job.leads else []
    except UnfitRequest as error:
        return REFUSED, str(error)
    except Exception as error:  # whatever it is, the next request is another one
        return FAILED, f"rank {job.replica.rank}: {error}"


def _encoded(items: list[Any], fps: int) -> list[Made]:
    with tempfile.TemporaryDirectory() as folder:
        paths = files.write(items, Path(folder), 0, fps)
        return [Made(mimetypes.guess_type(path.name)[0] or "image/png", path.read_bytes()) for path in paths]
