"""The thread behind the line: it receives, gives signs of life, and notices who is gone."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from xdit_ir.errors import LostError
from xdit_ir.transport.sockets import Inbox, framed

BEAT = 1.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one, while this rank waits: a process that is stopped, or a host that is gone
GRACE = 0.5  # seconds in which what a rank sent before it ended may still arrive
SUSPICIOUS = 3.0  # seconds of silence that explain a message that did not come


@dataclass(frozen=True)
class Failure:
    """Which rank failed, and how."""

    rank: int
    why: str

    def error(self) -> LostError:
        """As it is raised on the other ranks."""
        return LostError(f"rank {self.rank} {self.why}", self.rank)


class Listener(Protocol):
    """Who is told."""

    @property
    def depth(self) -> int:
        """Whether this rank is at work; otherwise nobody who is gone is missed."""
        ...

    def hear(self, rank: int, message: dict[str, Any]) -> None:
        """A message has come."""
        ...

    def lost(self, failure: Failure) -> None:
        """A rank is gone, or seems to be."""
        ...


class Patrol:
    """Serves the `sockets` to the other ranks until `close`, or until the `listener`, a weak proxy, is gone."""

    def __init__(self, sockets: Mapping[int, socket.socket], listener: Listener, timeout: timedelta) -> None:
        self._sockets, self._listener = dict(sockets), listener
        self._limit = min(SILENCE, timeout.total_seconds())
        self._locks = {rank: threading.Lock() for rank in sockets}
        self._silence = dict.fromkeys(sockets, 0.0)
        self._gone: dict[int, tuple[float, str]] = {}
        self._open = True
        self._thread = threading.Thread(target=self._run, name="xdit_ir line", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """To all that are there."""
        data = framed(message)
        for rank, line in self._sockets.items():
            if rank not in self._gone:
                try:
                    with self._locks[rank]:
                        line.sendall(data)
                except OSError as error:
                    self._lose(rank, f"cannot be reached: {error}")

    def suspect(self) -> Failure | None:
        """Who may be the one that does not answer."""
        if self._gone:
            rank, (_, why) = next(iter(self._gone.items()))
            return Failure(rank, why)
        rank = max(self._silence, key=self._silence.__getitem__)
        if self._silence[rank] > SUSPICIOUS:
            return self._silent(rank)
        return Failure(rank, "left this rank without an answer") if len(self._silence) == 1 else None

    def close(self) -> None:
        """Take leave of the others, and end."""
        if self._open:
            self._open = False
            self.send({"bye": True})
            if threading.current_thread() is not self._thread:
                self._thread.join(2 * BEAT)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.suppress(ReferenceError):
            inboxes = {rank: Inbox() for rank in self._sockets}
            for rank, line in self._sockets.items():
                selector.register(line, selectors.EVENT_READ, rank)
            beat = last = time.monotonic()
            while self._open:
                for key, _ in selector.select(BEAT / 4):
                    if not self._receive(key.data, inboxes[key.data]):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - beat >= BEAT:
                    beat = now
                    self.send({})
                self._judge(now, min(now - last, 2 * BEAT))  # not more: this process may have been stopped itself
                last = now
        for line in self._sockets.values():
            line.close()

    def _receive(self, rank: int, inbox: Inbox) -> bool:
        """Hand on what has come; whether more may come."""
        try:
            data = self._sockets[rank].recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._lose(rank, "has ended")
            return False
        self._silence[rank] = 0.0
        for message in inbox.messages(data):
            if "bye" in message:
                self._lose(rank, "has ended, or destroyed its process group")
            elif message:
                self._listener.hear(rank, message)
        return True

    def _lose(self, rank: int, why: str) -> None:
        self._gone.setdefault(rank, (time.monotonic(), why))

    def _judge(self, now: float, passed: float) -> None:
        for rank in self._silence:
            self._silence[rank] += passed
        if not self._listener.depth:
            return
        for rank, (since, why) in list(self._gone.items()):
            if now - since >= GRACE:
                self._listener.lost(Failure(rank, why))
        for rank, silence in self._silence.items():
            if silence >= self._limit and rank not in self._gone:
                self._listener.lost(self._silent(rank))

    def _silent(self, rank: int) -> Failure:
        return Failure(rank, f"is stopped or unreachable: it has not been heard of for {self._silence[rank]:.0f} s")
