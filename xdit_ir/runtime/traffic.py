"""What all specialisations of a module share: channels between stages, the request, and work that was put off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from xdit_ir.patches import Pipeline
from xdit_ir.runtime.distributed import Communicator, configured_timeout
from xdit_ir.runtime.messages import Broadcast, Channel, Pair
from xdit_ir.runtime.requests import Requests
from xdit_ir.runtime.schedule import Item
from xdit_ir.work import RankWork


class Pass(Protocol):
    """One pass of patches through the stages."""

    number: int

    def execute(self, item: Item) -> None:
        """Run a stage."""
        ...


@dataclass(frozen=True, eq=False)
class Channels:
    """This rank's ends: `between[s]` leads to stage s from the one before (None: not here), `returns` from the last
    stage to all ranks; where halves of `cfg` run different calls, one for each half."""

    between: tuple[Channel | None, ...]
    returns: tuple[Channel, ...]
    is_last: bool


Observer = Callable[[int, Item], None]
Key = tuple[Any, ...]


class Traffic:
    """One for each module and process. `observe(pass, item)` is told before every run of a stage; `last` is the runner
    that made the last call."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator, self.requests = communicator, Requests()
        self.observe: Observer | None = None
        self.last: Any = None
        self.previous: list[torch.Tensor] = []
        self._queue: list[tuple[Item, Pass]] = []
        self._running: list[tuple[Item, Pass]] = []
        self._groups: dict[Key, dist.ProcessGroup] = {}
        self._channels: dict[Key, Channel] = {}
        cuda = communicator.device.type == "cuda"
        self._aside = torch.cuda.Stream(communicator.device) if cuda else None  # type: ignore[no-untyped-call]

    def open(self, pipeline: Pipeline, *, apart: bool = False) -> Channels:
        """The channels for a pipeline, in which halves of `cfg` may run calls `apart`. Collective: all ranks open the
        same ones."""
        everyone = range(pipeline.mesh.world_size)
        columns = {rank: RankWork(pipeline, rank).ranks() for rank in everyone}
        between = {ranks: self._between(ranks) for ranks in sorted(set(columns.values()))}
        returns = {}
        for rank in everyone:
            halves = [columns[other] for other in pipeline.mesh.group(rank, ("cfg",))] if apart else [columns[rank]]
            returns[rank] = tuple(self._returns(half, halves) for half in halves)
        mine = self.communicator.rank
        return Channels(between[columns[mine]], returns[mine], mine == columns[mine][-1])

    def _between(self, ranks: tuple[int, ...]) -> tuple[Channel | None, ...]:
        """Channels between the ranks of successive stages; one process group for each, so one direction on each."""
        found: list[Channel | None] = [None]
        for stage, (source, target) in enumerate(itertools.pairwise(ranks), 1):
            found.append(None if source == target else self._channel((stage, source, target), Pair, (source, target)))
        return tuple(found)

    def _returns(self, half: tuple[int, ...], halves: Sequence[tuple[int, ...]]) -> Channel:
        """From the last stage of a half to the ranks of all halves."""
        members = tuple(sorted({rank for ranks in halves for rank in ranks}))
        found = self._channel(("returns", half[-1], *members), Broadcast, (half[-1], *members))
        assert found is not None
        return found

    def _channel(self, key: Key, kind: type[Pair] | type[Broadcast], ranks: tuple[int, ...]) -> Channel | None:
        """One channel, shared by all specialisations that need it; None if this rank has no end of it."""
        device, source = self.communicator.device, ranks[0]
        group = self._group(key, tuple(sorted(set(ranks))))
        if key not in self._channels:
            made: Channel = Broadcast(group, source, device, self._aside)
            if kind is Pair:
                made = Pair(group, source, ranks[1], device, self._aside)
            self._channels[key] = made
        return self._channels[key] if kind is Broadcast or self.communicator.rank in ranks else None

    def _group(self, key: Key, members: tuple[int, ...]) -> dist.ProcessGroup:
        if key not in self._groups:
            timeout = configured_timeout(self.communicator.device)
            self._groups[key] = dist.new_group(sorted(members), timeout=timeout)
        return self._groups[key]

    def put_off(self, work: Pass, items: list[Item]) -> None:
        """Add items to what is to be done."""
        self._queue = sorted([*self._queue, *((item, work) for item in items)], key=lambda entry: entry[0].turn)

    def run(self, until: Callable[[], bool] | None = None, before: int | None = None) -> None:
        """Do it in turn: all, or only until something is true, or what comes before this turn."""
        while self._queue and not (until is not None and until()):
            if before is not None and self._queue[0][0].turn >= before:
                return
            item, work = self._queue.pop(0)
            self._running.append((item, work))
            if self.observe is not None:
                self.observe(work.number, item)
            work.execute(item)
            self._running.pop()

    def settle(self) -> None:
        """Before something is waited for that others make of what this rank sends: do all, unless a run waits for it,
        which then needs nothing that comes later."""
        if not self._running:
            self.run()

    def abandon(self) -> list[tuple[Item, Pass]]:
        """Forget the request; what was still to be done."""
        queue = [*reversed(self._running), *self._queue]
        self._queue, self._running, self.previous, self.last = [], [], [], None
        self.requests.forget()
        return queue
