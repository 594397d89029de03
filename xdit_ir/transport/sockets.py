"""Connections between all processes of a job, beside whatever moves tensors: one socket for each pair."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from xdit_ir.errors import LostError
from xdit_ir.transport import spread

KEY = "xdit_ir/line"
SEND_LIMIT = 20.0  # seconds: messages are small, so that one that cannot be sent has no receiver
HELLO_LIMIT = 10.0
_LENGTH = struct.Struct("!I")


def connect_all(store: Any, rank: int, world: int, timeout: timedelta) -> dict[int, socket.socket]:
    """A socket to every other rank. Collective: each rank calls the lower ones and is called by the higher ones.

    Raises:
        LostError: a rank did not come in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    token = secrets.token_hex(16)
    with listening() as server:
        turn = store.add(f"{KEY}/{rank}", 1)
        mine = {"token": token, "port": server.getsockname()[1], "hosts": _addresses(store), "node": spread.host()}
        store.set(f"{KEY}/{rank}/{turn}", json.dumps(mine))
        found = {}
        for other in range(rank):
            found[other] = _call(_looked_up(store, f"{KEY}/{other}/{turn}", other, timeout), rank, other)
        for _ in range(rank + 1, world):
            caller, line = _called(server, token, deadline, missing=set(range(rank + 1, world)) - set(found))
            found[caller] = line
    for line in found.values():
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.settimeout(SEND_LIMIT)
    return found


def framed(message: Any) -> bytes:
    """A message as it travels."""
    text = json.dumps(message).encode()
    return _LENGTH.pack(len(text)) + text


class Inbox:
    """What has come through one socket, put together to messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def messages(self, data: bytes) -> Iterator[Any]:
        """Those that `data` completes."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._bytes)
            end = _LENGTH.size + size
            if len(self._bytes) < end:
                return
            message = json.loads(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield message


def listening() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _addresses(store: Any) -> list[str]:
    """Under which others may reach this host, the likeliest first: the one that it has towards the store's host."""
    found = []
    host = os.environ.get("MASTER_ADDR") or getattr(store, "host", "")
    with contextlib.suppress(OSError, TypeError):
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it only finds the way
            found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys(map(str, found)))


def _looked_up(store: Any, key: str, rank: int, timeout: timedelta) -> dict[str, Any]:
    try:
        store.wait([key], timeout)
    except Exception as error:
        raise LostError(f"rank {rank} did not make its first call within {timeout}", rank) from error
    found: dict[str, Any] = json.loads(store.get(key))
    return found


def _call(there: dict[str, Any], rank: int, other: int) -> socket.socket:
    """Connected to another rank, which has said that it is the right one."""
    near = ["127.0.0.1"] if there["node"] == spread.host() else []
    reason = "it has no address"
    for host in (*near, *there["hosts"]):
        try:
            line = socket.create_connection((host, there["port"]), timeout=HELLO_LIMIT)
            line.sendall(there["token"].encode() + _LENGTH.pack(rank))
            line.settimeout(None)  # it answers once it has called all lower ranks
            if line.recv(1) == b"+":
                return line
            line.close()
        except OSError as error:
            reason = f"{host}:{there['port']}: {error}"
    raise LostError(f"rank {other} cannot be reached from rank {rank}: {reason}", other)


def _called(server: socket.socket, token: str, deadline: float, missing: set[int]) -> tuple[int, socket.socket]:
    """The next one that calls, and knows the token."""
    while True:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            line, _ = server.accept()
        except TimeoutError as error:
            raise LostError(f"rank {min(missing)} did not make its first call in time", min(missing)) from error
        try:
            line.settimeout(HELLO_LIMIT)
            said = exactly(line, len(token) + _LENGTH.size)
            if secrets.compare_digest(said[: len(token)], token.encode()):
                line.sendall(b"+")
                return int(_LENGTH.unpack(said[len(token) :])[0]), line
        except OSError:
            pass
        line.close()


def exactly(line: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = line.recv(size - len(found))
        if not more:
            raise ConnectionError("closed")
        found += more
    return found
