"""What the processes of a tree hold, as Linux tells it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC, SHARED = Path("/proc"), Path("/dev/shm")


def children(pid: int) -> list[int]:
    """The processes that a process has started, and that have not ended."""
    found = []
    for path in PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def tree(pid: int) -> list[int]:
    """A process and all below it, from the top down."""
    pids = [pid]
    for one in pids:
        pids += children(one)
    return pids


def forked(pid: int) -> list[int]:
    """The processes below one that a server of `multiprocessing` has forked, as ranks are."""
    return [
        one for server in tree(pid) if b"multiprocessing.forkserver" in _command(server) for one in children(server)
    ]


def _command(pid: int) -> bytes:
    with suppress(OSError):  # it has ended meanwhile
        return (PROC / str(pid) / "cmdline").read_bytes()
    return b""


def orphans() -> set[str]:
    """Shared memory that no process has open or mapped; without semaphores, of which Python itself tells."""
    found = {name for name in os.listdir(SHARED) if not name.startswith("sem.")}
    for path in PROC.glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended meanwhile
            found -= {line.rpartition(f"{SHARED}/")[2].split(" ")[0] for line in path.read_text().splitlines()}
    for path in PROC.glob("[0-9]*/fd/*"):
        with suppress(OSError):
            found.discard(path.readlink().name)
    return found


@dataclass(frozen=True)
class Holdings:
    """Of one process: open files, threads, and MiB of memory of its own."""

    files: int
    threads: int
    mib: int

    @staticmethod
    def of(pid: int) -> Holdings:
        """Now."""
        status = dict(line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines())
        return Holdings(
            len(os.listdir(PROC / str(pid) / "fd")), int(status["Threads"]), int(status["RssAnon"].split()[0]) >> 10
        )


@dataclass(frozen=True)
class Census:
    """A process and all below it, from the top down."""

    pids: tuple[int, ...]
    held: tuple[Holdings, ...]

    @staticmethod
    def of(pid: int) -> Census:
        """Now."""
        return Census.among(tree(pid))

    @staticmethod
    def among(pids: Sequence[int]) -> Census:
        """These processes now."""
        return Census(tuple(pids), tuple(map(Holdings.of, pids)))

    def __str__(self) -> str:
        return "; ".join(f"{one.files} files, {one.threads} threads, {one.mib} MiB" for one in self.held)

    def more_than(self, other: Census) -> list[str]:
        """Where there is more than there was; memory is not judged."""
        if len(self.pids) != len(other.pids):
            return [f"{len(self.pids)} processes, there were {len(other.pids)}"]
        return [
            f"process {place} holds {now}, it held {then}"
            for place, (now, then) in enumerate(zip(self.held, other.held, strict=True))
            if now.files > then.files or now.threads > then.threads
        ]
