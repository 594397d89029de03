"""What all specialisations of a module share: channels between stages, the request, and work that was put off."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
    """This rank's ends: `between[s]` leads to stage s from the one before (None: not here), `returns` to all ranks."""

    between: tuple[Channel | None, ...]
    returns: Channel
    is_last: bool


Observer = Callable[[int, Item], None]


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
        self._groups: dict[tuple[Any, ...], dist.ProcessGroup] = {}
        self._channels: dict[tuple[int, ...], Channels] = {}
        cuda = communicator.device.type == "cuda"
        self._aside = torch.cuda.Stream(communicator.device) if cuda else None  # type: ignore[no-untyped-call]

    def open(self, pipeline: Pipeline) -> Channels:
        """The channels for a pipeline. Collective: all ranks open the same ones."""
        columns = sorted({RankWork(pipeline, rank).ranks() for rank in range(pipeline.mesh.world_size)})
        for ranks in columns:
            if ranks not in self._channels:
                made = self._open(ranks)
                if self.communicator.rank in ranks:
                    self._channels[ranks] = made
        return self._channels[RankWork(pipeline, self.communicator.rank).ranks()]

    def _open(self, ranks: tuple[int, ...]) -> Channels:
        """Channels between the ranks of successive stages; one process group for each, so one direction on each."""
        mine, device = self.communicator.rank, self.communicator.device
        between: list[Channel | None] = [None]
        for stage, (source, target) in enumerate(itertools.pairwise(ranks), 1):
            if source == target:
                between.append(None)
                continue
            group = self._group((stage, source, target), (source, target))
            ends = mine in (source, target)
            between.append(Pair(group, source, target, device, self._aside) if ends else None)
        members = tuple(sorted(set(ranks)))
        returns = self._group(("returns", *members), members)
        return Channels(tuple(between), Broadcast(returns, ranks[-1], device, self._aside), mine == ranks[-1])

    def _group(self, key: tuple[Any, ...], members: tuple[int, ...]) -> dist.ProcessGroup:
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
