"""The ranks of one replica as child processes, and the thread that gives them work and starts them anew."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from xdit_ir.errors import ServingError
from xdit_ir.generation.setup import Setup
from xdit_ir.serving.rank import READY, STOP, WORK, RankSpec, run_rank
from xdit_ir.serving.work import CANCELLED, DONE, FAILED, Queue, Work, WorkError

LOG = logging.getLogger("xdit_ir")
TICK = 0.1  # seconds between looks at what shall stop
PRELOADED = ["xdit_ir.serving.rank", "diffusers.pipelines.pipeline_utils", "diffusers.loaders.peft"]
FAREWELL = 5.0  # seconds in which a rank may end by itself


@dataclass(frozen=True)
class TeamSpec:
    """How the ranks of a replica are started: `first` of their devices; `start` seconds to load, `grace` to stop."""

    setup: Setup
    size: int
    first: int
    device: str | None
    fps: int
    start: float
    grace: float


class Ranks:
    """Running child processes; whatever one of them does not do raises `ServingError`, which names it."""

    def __init__(self, spec: TeamSpec) -> None:
        self.spec = spec
        # The store lives here, so that no one else can take its port; a new one for every start.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # Forked from one that has imported what takes long, and has done nothing else: a rank is soon there again.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.lines: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(spec.size):
            mine, theirs = context.Pipe()
            one = RankSpec(spec.setup, rank, spec.size, spec.first + rank, self._store.port, spec.device, spec.fps)
            process = context.Process(target=run_rank, args=(one, theirs), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self.lines.append(mine)
            self.processes.append(process)

    def ready(self, queue: Queue) -> None:
        """Wait until all have loaded the pipeline."""
        deadline = time.monotonic() + self.spec.start
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.spec.size and not queue.closed:
            queue.sweep()
            self._hear(0, answers)
            if time.monotonic() > deadline:
                raise ServingError(f"rank {self._missing(answers)} was not ready after {self.spec.start:g} s")
            for rank, (kind, text) in answers.items():
                if kind != READY:
                    raise ServingError(f"rank {rank} cannot start: {text}")

    def run(self, work: Work) -> Any:
        """What became of a request: what the first rank says that is no success on all, or else its results."""
        for line in self.lines:
            line.send((WORK, work.number, work.request, work.count))
        answers: dict[int, tuple[str, Any]] = {}
        told = 0.0
        while len(answers) < self.spec.size:
            self._hear(work.number, answers)
            if not told and work.stopped() is not None:
                told = time.monotonic()
                for line in self.lines:
                    line.send((STOP, work.number))
            if told and time.monotonic() - told > self.spec.grace:
                missing = self._missing(answers)
                raise ServingError(f"rank {missing} did not stop within {self.spec.grace:g} s of request {work.number}")
        failed = [answer for _, answer in sorted(answers.items()) if answer[0] != DONE]
        return failed[0] if failed else answers[0]

    def check(self) -> None:
        """Raise if a rank has ended."""
        for rank, process in enumerate(self.processes):
            if not process.is_alive():
                raise ServingError(f"rank {rank} {_end(process)}")

    def close(self) -> None:
        """End all of them."""
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(FAREWELL)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    def _hear(self, number: int, answers: dict[int, tuple[str, Any]]) -> None:
        """Take what ranks say of a request, for a moment."""
        for line in wait(self.lines, TICK):
            rank = next(rank for rank, one in enumerate(self.lines) if one is line)
            try:
                kind, told, content = self.lines[rank].recv()
            except (EOFError, ConnectionError):
                self.processes[rank].join(FAREWELL)
                raise ServingError(f"rank {rank} {_end(self.processes[rank])}") from None
            if told == number:
                answers[rank] = kind, content
        if len(answers) < self.spec.size:
            self.check()

    def _missing(self, answers: dict[int, Any]) -> int:
        return min(set(range(self.spec.size)) - set(answers))


class Team:
    """A replica of the server."""

    def __init__(self, spec: TeamSpec, queue: Queue, starts: int) -> None:
        self.spec, self.queue, self.starts = spec, queue, starts
        self.is_ready, self.restarts, self.trouble = False, 0, "its ranks are starting"
        self.fatal: ServingError | None = None
        self.processes: Sequence[Any] = ()
        self.thread = threading.Thread(target=self._run, name="xdit_ir team", daemon=True)

    def _run(self) -> None:
        try:
            self._keep_running()
        except Exception as error:  # a thread has nobody to raise to
            self.fatal = ServingError(f"a replica has ended: {type(error).__name__}: {error}")

    def _keep_running(self) -> None:
        failed = 0
        while not self.queue.closed and failed < self.starts:
            ranks = Ranks(self.spec)
            self.processes = ranks.processes
            try:
                ranks.ready(self.queue)
                self.is_ready, failed, self.trouble = True, 0, ""
                self._serve(ranks)
            except (ServingError, OSError) as error:
                failed += not self.is_ready
                self.trouble, self.restarts = str(error), self.restarts + 1
                LOG.error("%s; starting all ranks of this replica anew", error)
            finally:
                self.is_ready = False
                ranks.close()
        if failed:
            self.fatal = ServingError(f"{self.trouble} ({failed} times in a row)")

    def _serve(self, ranks: Ranks) -> None:
        while not self.queue.closed:
            ranks.check()
            work = self.queue.take(TICK)
            if work is None:
                continue
            try:
                outcome, content = ranks.run(work)
            except (ServingError, OSError) as error:
                work.finish(WorkError(FAILED, f"request {work.number} was lost: {error}"))
                raise
            if outcome == DONE and work.stop != CANCELLED:
                work.finish(content)
            else:
                work.finish(work.stopped() or WorkError(outcome, content))


def _end(process: Any) -> str:
    """How a process has ended."""
    code = process.exitcode
    if code is None:
        return "does not answer any more"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
