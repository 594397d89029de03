"""Requests on their way: the queue, what becomes of each, and what is counted."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from xdit_ir.errors import ServingError
from xdit_ir.generation.request import Request

DONE, REFUSED, FAILED = "done", "refused", "failed"
CANCELLED, LATE, BUSY = "cancelled", "timed out", "busy"
OUTCOMES = (DONE, REFUSED, FAILED, CANCELLED, LATE, BUSY)


@dataclass(frozen=True)
class Made:
    """One image or video as a file."""

    media_type: str
    content: bytes


class WorkError(ServingError):
    """Why there is no result: one of `OUTCOMES`, and the text."""

    def __init__(self, outcome: str, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


@dataclass(eq=False)
class Work:
    """A request of `count` results, whose seeds follow each other; `stop`: why it shall end before it is done."""

    number: int
    request: Request
    count: int
    patience: float
    arrived: float = field(default_factory=time.monotonic)
    future: Future[list[Made]] = field(default_factory=Future)
    stop: str = ""
    running: bool = False

    @property
    def state(self) -> str:
        """What it is doing, or what became of it."""
        if not self.future.done():
            return "running" if self.running else "queued"
        error = self.future.exception()
        return DONE if error is None else getattr(error, "outcome", FAILED)

    def cancel(self) -> None:
        """Nobody wants the result any more."""
        self.stop = self.stop or CANCELLED

    def stopped(self) -> WorkError | None:
        """Why it shall end now, if it shall."""
        if not self.stop and time.monotonic() - self.arrived > self.patience:
            self.stop = LATE
        if not self.stop:
            return None
        took = f" after {self.patience:g} s" if self.stop == LATE else ""
        return WorkError(self.stop, f"request {self.number}: {self.stop}{took}")

    def finish(self, result: list[Made] | Exception) -> None:
        """Give the result, or why there is none, to who waits."""
        with suppress(InvalidStateError):  # nobody waits any more
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class Queue:
    """What is waiting, and what was counted; `room` for so many."""

    def __init__(self, room: int) -> None:
        self.room, self.closed = room, False
        self.outcomes: Counter[str] = Counter()
        self.seconds = 0.0
        self._waiting: deque[Work] = deque()
        self._numbers = itertools.count(1)
        self._news = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Request, count: int, patience: float) -> Work:
        """A request at the end; raises `WorkError` if there is no room."""
        with self._news:
            if self.closed or len(self._waiting) >= self.room:
                self.outcomes[BUSY] += 1
                text = "the server is stopping" if self.closed else f"{self.room} requests are waiting; try again later"
                raise WorkError(BUSY, text)
            work = Work(next(self._numbers), request, count, patience)
            work.future.add_done_callback(lambda _: self._count(work))
            self._waiting.append(work)
            self._news.notify()
        return work

    def take(self, wait: float) -> Work | None:
        """The next one that is still wanted; None if there is none for so many seconds."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self.closed, wait)
        for work in self._drained(1):
            work.running = True
            return work
        return None

    def sweep(self) -> None:
        """End those that wait and are not wanted any more, or have waited too long."""
        with self._news:
            dropped = [(work, error) for work in self._waiting if (error := work.stopped()) is not None]
            for work, _ in dropped:
                self._waiting.remove(work)
        for work, error in dropped:
            work.finish(error)

    def close(self, error: WorkError) -> None:
        """Take no more, and end all that wait."""
        with self._news:
            self.closed = True
            self._news.notify_all()
        for work in self._drained(len(self)):
            work.finish(error)

    def _drained(self, most: int) -> Iterator[Work]:
        self.sweep()
        with self._news:
            found = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        yield from found

    def _count(self, work: Work) -> None:
        with self._news:
            self.outcomes[work.state] += 1
            self.seconds += time.monotonic() - work.arrived
