"""Replicas: the processes of a job in groups of equal size, each of which runs a mesh of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from xdit_ir.errors import ParallelizeError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Replica:
    """The replica of this process: number `index` of `count`, of `size` processes, among which this one is `rank`.

    Successive processes of the job are in one replica. Replicas know nothing of each other: what they are given, and
    how often, is up to the caller.
    """

    index: int = 0
    count: int = 1
    rank: int = 0
    size: int = 1

    @staticmethod
    def of(process: int, size: int, count: int) -> Replica:
        """That of a process of the job."""
        index, rank = divmod(process, size)
        return Replica(index, count, rank, size)

    @property
    def processes(self) -> range:
        """Its processes, as the job counts them."""
        return range(self.index * self.size, (self.index + 1) * self.size)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Its part of what all replicas do together: successive ones, as many as others have, or one more."""
        start, stop = (place * len(items) // self.count for place in (self.index, self.index + 1))
        return list(items[start:stop])


def checked_data(data: int) -> int:
    """The number of replicas; raises `ParallelizeError` for what is none."""
    if not isinstance(data, int) or isinstance(data, bool) or data < 1:
        raise ParallelizeError(f"data={data!r} is not a positive integer; the nearest legal one is data=1")
    return data
