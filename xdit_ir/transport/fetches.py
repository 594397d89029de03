"""What copy engines fetch beside the work of a GPU: in pieces, with exchanges of that work in between."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from xdit_ir.ir.collective_ops import ALL

PIECE = 2**12  # bytes, of which there are whole ones in all copies but the last

Copy = Callable[[int, int, int, torch.cuda.Stream], None]
"""Starts to copy to an address from another one so many bytes, on a stream."""


@dataclass
class _Run:
    """Bytes one behind the other, of which `done` are on their way."""

    target: int
    source: int
    size: int
    stream: torch.cuda.Stream
    done: int = 0


@dataclass(eq=False)
class Fetch:
    """What is copied into `whole`, which stays in memory as long as this. Whoever runs exchanges finds it among those
    that are `ongoing`, until it is finished. `there`: events that tell when all of it is there, each recorded behind
    the last copy on its stream, where the next fetch begins to travel before this one is awaited."""

    whole: torch.Tensor
    copy: Copy
    there: list[torch.cuda.Event] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)
    begun: int = 0

    def __post_init__(self) -> None:
        ongoing(self.whole.device).add(self)

    def add(self, target: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
        """Copy this too, on a stream of those that fetch."""
        self.runs.append(_Run(target, source, size, stream))

    def go_on(self, parts: int, behind: Sequence[torch.cuda.Stream]) -> None:
        """Start so many more of `ALL` parts, behind what these streams do now; the first time, all wait for that."""
        if self.begun == ALL or (self.begun and not parts):
            return
        streams = dict.fromkeys(run.stream for run in self.runs)
        for stream in streams:
            for other in behind:
                stream.wait_stream(other)
        self.begun = min(self.begun + parts, ALL)
        for run in self.runs:
            end = run.size if self.begun == ALL else run.size * self.begun // ALL // PIECE * PIECE
            if end > run.done:
                self.copy(run.target + run.done, run.source + run.done, end - run.done, run.stream)
                run.done = end
        if self.begun == ALL:
            self.there += [stream.record_event() for stream in streams]

    def finish(self) -> list[torch.cuda.Event]:
        """Start what is left; the events that tell when all is there."""
        ongoing(self.whole.device).discard(self)
        self.go_on(ALL, [])
        return self.there


@functools.cache
def ongoing(device: torch.device) -> weakref.WeakSet[Fetch]:
    """All that is on its way to a device; what nobody holds any more has ended."""
    return weakref.WeakSet()
