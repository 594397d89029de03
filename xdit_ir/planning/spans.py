"""A schedule as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Something that a rank does: on its processor (`compute`), on its links (`link`), in microseconds."""

    rank: int
    lane: str
    name: str
    kind: str
    start: float
    end: float
    stage: int = -1
    patch: int = -1
    step: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Timeline:
    """A schedule worked out from sizes and speeds; not a measurement. `busy[rank]`: part of the time it computes."""

    spans: Sequence[Span]
    total: float
    busy: Sequence[float]
    steps: Sequence[str]
    note: str
