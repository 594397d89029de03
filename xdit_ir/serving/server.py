"""The server without its protocol: a queue, and the replicas that work on it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from xdit_ir.errors import ServingError
from xdit_ir.generation.request import Request, check_numbers, check_seed
from xdit_ir.serving.hosts import Lobby
from xdit_ir.serving.team import Team, TeamSpec
from xdit_ir.serving.work import BUSY, OUTCOMES, Queue, Work, WorkError

KEPT = 256  # results that nobody has fetched yet
MOST = 16  # results of one request
STOPPING = "the server is stopping"
STARTS = 3  # attempts to start the ranks of a replica before the server gives up


class Server:
    """Requests go in by `submit`, and their results come out of `Work.future`; other hosts wait in the `lobby`."""

    def __init__(self, spec: TeamSpec, replicas: int, room: int, patience: float, lobby: Lobby | None = None) -> None:
        self.queue, self.patience, self.model = Queue(room), patience, str(spec.setup.source)
        specs = [replace(spec, first=spec.first + place * spec.size) for place in range(replicas)]
        self.teams = [Team(one, self.queue, STARTS, lobby) for one in specs]
        self.kept: OrderedDict[int, Work] = OrderedDict()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start all ranks; they become ready in a while."""
        for team in self.teams:
            team.thread.start()

    def watch(self, stop: Callable[[], None]) -> None:
        """When all replicas have given up, end what waits and call `stop`, in a thread of its own."""

        def run() -> None:
            for team in self.teams:
                team.thread.join()
            self.queue.close(WorkError(BUSY, str(self.fatal or STOPPING)))
            stop()

        threading.Thread(target=run, name="xdit_ir watch", daemon=True).start()

    def submit(self, request: Request, count: int = 1, patience: float | None = None) -> Work:
        """Put a request into the queue; raises `WorkError` where there is no room, `GenerationError` for numbers that
        mean nothing."""
        check_numbers(width=request.width, height=request.height, frames=request.frames, steps=request.steps, n=count)
        check_seed(request.seed)
        if count > MOST:
            raise ServingError(f"n={count} results of one request, at most {MOST}; nearest legal: n={MOST}")
        if fatal := self.fatal:
            raise WorkError(BUSY, str(fatal))
        patience = self.patience if patience is None else min(patience, self.patience)
        return self.queue.put(request, count, patience)

    def keep(self, work: Work) -> None:
        """Let it be asked for by its number; the oldest are forgotten, and ended."""
        with self._lock:
            self.kept[work.number] = work
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)[1].cancel()

    @property
    def fatal(self) -> ServingError | None:
        """Why nothing will be made any more; None as long as a replica may go on."""
        return self.teams[0].fatal if all(team.fatal is not None for team in self.teams) else None

    @property
    def trouble(self) -> str:
        """Why no replica is ready; empty if one is."""
        return "" if any(team.is_ready for team in self.teams) else self.teams[0].trouble

    def metrics(self) -> str:
        """What is counted, as Prometheus reads it."""
        lines = [f'xdit_ir_requests_total{{outcome="{one}"}} {self.queue.outcomes[one]}' for one in OUTCOMES]
        values = {
            "request_seconds_sum": self.queue.seconds,
            "request_seconds_count": sum(self.queue.outcomes[one] for one in OUTCOMES if one != BUSY),
            "queue_length": len(self.queue),
            "replicas": len(self.teams),
            "replicas_ready": sum(team.is_ready for team in self.teams),
            "restarts_total": sum(team.restarts for team in self.teams),
        }
        return "\n".join([*lines, *(f"xdit_ir_{name} {value:g}" for name, value in values.items()), ""])

    def close(self) -> None:
        """End everything."""
        self.queue.close(WorkError(BUSY, STOPPING))
        for team in self.teams:
            team.thread.join()
