"""A server on several hosts: a launcher starts one process on each; the first is the server, others run its ranks.

Each rank elsewhere has a *seat*: host, and place there. Whoever keeps a seat calls the server's lobby, and waits there
until ranks are started; what the rank and the server say to each other then goes through that call.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from xdit_ir.errors import ServingError
from xdit_ir.serving.child import FAREWELL, Child
from xdit_ir.serving.rank import ENDED, RankSpec
from xdit_ir.transport.sockets import HELLO_LIMIT, exactly, listening

KEY = "xdit_ir/serving"
SILENCE = 20  # seconds until a host that has lost its power or its network is given up
_SEAT = struct.Struct("!II")
Seat = tuple[int, int]


@dataclass(frozen=True)
class Hosts:
    """The hosts of a server, and which one this is; the ranks find each other by the `address` of the first."""

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"

    @staticmethod
    def here() -> Hosts:
        """As the launcher (torchrun) tells by the environment; without one this host is the only one.

        Raises:
            ServingError: it has started several processes on this host.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Hosts()
        if (here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
            raise ServingError(
                f"serve starts the ranks of a host itself and needs one process there, this job has {here}: "
                "torchrun --nproc-per-node 1"
            )
        return Hosts(int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), os.environ["MASTER_ADDR"])

    def share(self, ranks: int) -> int:
        """Ranks on each host; raises `ServingError` if they cannot be shared evenly."""
        if ranks % self.count:
            less, more = ranks // self.count * self.count, -(-ranks // self.count) * self.count
            legal = " or ".join(str(number) for number in (less, more) if number)
            raise ServingError(f"{ranks} ranks cannot be shared evenly by {self.count} hosts; nearest legal: {legal}")
        return ranks // self.count


@dataclass(frozen=True)
class Way:
    """To a lobby."""

    address: str
    port: int
    token: str


class Guest:
    """A rank on another host, by the call of who keeps its seat."""

    def __init__(self, line: Connection, seat: Seat, spec: RankSpec) -> None:
        self.line, self.host = line, seat[0]
        line.send(spec)

    def ended(self, wait: float = 0.0) -> str:
        """Only its line tells; when that is closed, this."""
        return f"is on host {self.host}, which cannot be reached any more" if wait else ""

    def stop(self) -> None:
        """Tell it to end."""
        self.line.close()

    def join(self) -> None:
        """It is ended where it runs."""


class Lobby:
    """Where those wait who keep seats; found by `store`, and only by who was started with the same `terms`."""

    def __init__(self, store: Any, terms: Mapping[str, str]) -> None:
        self._token, self._server, self._news = secrets.token_hex(16), listening(), threading.Condition()
        self._waiting: dict[Seat, Connection] = {}
        self.port = self._server.getsockname()[1]
        store.set(KEY, json.dumps({"port": self.port, "token": self._token, "terms": dict(terms)}))
        self._thread = threading.Thread(target=self._welcome, name="xdit_ir lobby", daemon=True)
        self._thread.start()

    def way(self, address: str) -> Way:
        """Here, under an address of this host."""
        return Way(address, self.port, self._token)

    def missing(self, seats: Sequence[Seat]) -> list[Seat]:
        """Those of other hosts that nobody keeps now."""
        with self._news:
            return [seat for seat in seats if seat[0] and seat not in self._waiting]

    def seated(self, seat: Seat, spec: RankSpec) -> Guest:
        """A rank, started on a seat that somebody keeps."""
        with self._news:
            return Guest(self._waiting.pop(seat), seat, spec)

    def close(self, hosts: int, near: int) -> None:
        """Send all home: each seat comes back when its rank has ended."""
        seats = list(itertools.product(range(1, hosts), range(near)))
        with self._news:
            self._news.wait_for(lambda: len(self._waiting) == len(seats), 2 * FAREWELL)
            for line in self._waiting.values():
                with suppress(OSError):
                    line.send(None)
                line.close()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends the waiting in the thread
        self._thread.join()
        self._server.close()

    def _welcome(self) -> None:
        while True:
            try:
                caller, _ = self._server.accept()
            except OSError:
                return
            try:
                caller.settimeout(HELLO_LIMIT)
                said = exactly(caller, len(self._token) + _SEAT.size)
            except OSError:
                said = b""
            if not secrets.compare_digest(said[: len(self._token)], self._token.encode()):
                caller.close()
                continue
            host, place = _SEAT.unpack(said[len(self._token) :])
            with self._news:
                if old := self._waiting.pop((host, place), None):
                    old.close()
                self._waiting[host, place] = _connection(caller)
                self._news.notify_all()


def keep_seats(store: Any, hosts: Hosts, places: int, terms: Mapping[str, str]) -> None:
    """Keep the seats of this host until the server sends them home.

    Raises:
        ServingError: the server was started with other terms, or is gone.
    """
    found = json.loads(store.get(KEY))
    for name, value in terms.items():
        if found["terms"].get(name) != value:
            first = found["terms"].get(name)
            raise ServingError(f"host {hosts.index} was started with {name}={value}, host 0 with {name}={first}")
    errors: list[Exception] = []
    way = Way(hosts.address, found["port"], found["token"])

    def keep(place: int) -> None:
        try:
            while sit(way, (hosts.index, place)):
                pass
        except Exception as error:  # a thread has nobody to raise to
            errors.append(error)

    threads = [
        threading.Thread(target=keep, args=(place,), name="xdit_ir seat", daemon=True) for place in range(places)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise ServingError(f"host {hosts.index} has lost the server at {hosts.address}: {errors[0]}") from errors[0]


def sit(way: Way, seat: Seat, gpu: int | None = None) -> bool:
    """Call the lobby, and run a rank for as long as the server wants it, on this GPU if one is named; whether there may
    be another one."""
    caller = socket.create_connection((way.address, way.port), timeout=HELLO_LIMIT)
    caller.sendall(way.token.encode() + _SEAT.pack(*seat))
    with _connection(caller) as line:
        spec = line.recv()
        if spec is None:
            return False
        child = Child(spec if gpu is None else replace(spec, local=gpu))
        try:
            _relay(line, child)
        except OSError:  # the server wants it no more, or is gone: the next call tells
            pass
        finally:
            child.stop()
            child.join()
    return True


def _relay(line: Connection, child: Child) -> None:
    """Carry what the server and a rank say, until one of them is gone."""
    while True:
        for one in wait([line, child.line]):
            try:
                said = one.recv_bytes()  # type: ignore[union-attr]
            except (EOFError, ConnectionError):
                if one is child.line:
                    line.send((ENDED, 0, child.ended(FAREWELL) or "does not answer any more"))
                return
            (child.line if one is line else line).send_bytes(said)


def _connection(call: socket.socket) -> Connection:
    """For objects; a host that is gone without a word is noticed."""
    call.settimeout(None)
    call.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    call.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    call.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)
    for option, seconds in ((socket.TCP_KEEPIDLE, SILENCE // 2), (socket.TCP_KEEPINTVL, 2)):
        call.setsockopt(socket.IPPROTO_TCP, option, seconds)
    return Connection(call.detach())
