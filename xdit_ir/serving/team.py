"""The ranks of one replica, and the thread that gives them work and starts them anew."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from xdit_ir.errors import ServingError
from xdit_ir.generation.setup import Setup
from xdit_ir.serving.child import FAREWELL, Child
from xdit_ir.serving.hosts import Guest, Lobby, Seat
from xdit_ir.serving.rank import ENDED, READY, STOP, WORK, RankSpec
from xdit_ir.serving.work import CANCELLED, DONE, FAILED, Queue, Work, WorkError

LOG = logging.getLogger("xdit_ir")
TICK = 0.1  # seconds between looks at what shall stop


@dataclass(frozen=True)
class TeamSpec:
    """How the ranks of a replica are started: `first` of them among those of all replicas, of which `near` are on each
    host; `address` under which all hosts reach this one; `start` seconds to load, `grace` to stop."""

    setup: Setup
    size: int
    first: int
    device: str | None
    fps: int
    start: float
    grace: float
    near: int
    address: str = "127.0.0.1"

    def seat(self, rank: int) -> Seat:
        """The host of a rank, and its place there."""
        return divmod(self.first + rank, self.near)


class Ranks:
    """Running processes; whatever one of them does not do raises `ServingError`, which names it."""

    def __init__(self, spec: TeamSpec) -> None:
        self.spec = spec
        self.members: list[Child | Guest] = []

    def start(self, queue: Queue, lobby: Lobby | None) -> None:
        """Start all, wherever they are; those on other hosts may have to be waited for."""
        deadline = time.monotonic() + self.spec.start
        seats = [self.spec.seat(rank) for rank in range(self.spec.size)]
        while lobby is not None and (missing := lobby.missing(seats)) and not queue.closed:
            queue.sweep()
            if time.monotonic() > deadline:
                raise ServingError(f"host {missing[0][0]} did not come within {self.spec.start:g} s")
            time.sleep(TICK)
        if queue.closed:
            return
        # The store lives here, so that no one else can take its port; a new one for every start.
        self._store = TCPStore(self.spec.address, 0, is_master=True, wait_for_workers=False)
        for rank, seat in enumerate(seats):
            own = RankSpec(
                *(self.spec.setup, rank, self.spec.size, seat[1], self.spec.near),
                *((self.spec.address, self._store.port), self.spec.device, self.spec.fps),
            )
            self.members.append(Child(own) if lobby is None or not seat[0] else lobby.seated(seat, own))

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
        self._tell((WORK, work.number, work.request, work.count))
        answers: dict[int, tuple[str, Any]] = {}
        told = 0.0
        while len(answers) < self.spec.size:
            self._hear(work.number, answers)
            if not told and work.stopped() is not None:
                told = time.monotonic()
                self._tell((STOP, work.number))
            if told and time.monotonic() - told > self.spec.grace:
                missing = self._missing(answers)
                raise ServingError(f"rank {missing} did not stop within {self.spec.grace:g} s of request {work.number}")
        failed = [answer for _, answer in sorted(answers.items()) if answer[0] != DONE]
        return failed[0] if failed else answers[0]

    def check(self) -> None:
        """Raise if a rank has ended; nobody works."""
        self._hear(0, {}, 0.0)

    def close(self) -> None:
        """End all of them."""
        for member in self.members:
            member.stop()
        for member in self.members:
            member.join()

    def _tell(self, message: Any) -> None:
        for rank, member in enumerate(self.members):
            try:
                member.line.send(message)
            except OSError:
                raise self._gone(rank) from None

    def _hear(self, number: int, answers: dict[int, Any], limit: float = TICK) -> None:
        """Take what ranks say of a request, for a moment."""
        ranks = {id(member.line): rank for rank, member in enumerate(self.members)}
        for line in wait([member.line for member in self.members], limit):
            rank = ranks[id(line)]
            try:
                kind, told, content = self.members[rank].line.recv()
            except (EOFError, ConnectionError):
                raise self._gone(rank) from None
            if kind == ENDED:
                raise ServingError(f"rank {rank} {content}")
            if told == number:
                answers[rank] = kind, content
        for rank, member in enumerate(self.members):
            if len(answers) < self.spec.size and (how := member.ended()):
                raise ServingError(f"rank {rank} {how}")

    def _gone(self, rank: int) -> ServingError:
        return ServingError(f"rank {rank} {self.members[rank].ended(FAREWELL) or 'does not answer any more'}")

    def _missing(self, answers: dict[int, Any]) -> int:
        return min(set(range(self.spec.size)) - set(answers))


class Team:
    """A replica of the server."""

    def __init__(self, spec: TeamSpec, queue: Queue, starts: int, lobby: Lobby | None = None) -> None:
        self.spec, self.queue, self.starts, self.lobby = spec, queue, starts, lobby
        self.is_ready, self.restarts, self.trouble = False, 0, "its ranks are starting"
        self.fatal: ServingError | None = None
        self.members: Sequence[Child | Guest] = ()
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
            self.members = ranks.members
            try:
                ranks.start(self.queue, self.lobby)
                ranks.ready(self.queue)
                self.is_ready, failed, self.trouble = True, 0, ""
                LOG.info("%d ranks of %s are ready", self.spec.size, self.spec.setup.source)
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
