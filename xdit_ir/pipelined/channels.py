"""The channels of a pipeline: which there are, who has an end of them, and over what they run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.ir.mesh import BATCH, TIME
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.pipefusion.rank_tasks import RankTasks
from xdit_ir.transport.distributed import Communicator, configured_timeout, peers_reachable
from xdit_ir.transport.messages import Broadcast, Channel, Envelope, Pair, Slots

Key = tuple[Any, ...]
Sizes = Callable[[], Sequence[int]]  # bytes of the messages of a pass, which only peers ask for
BETWEEN = "between stages"


@dataclass(frozen=True, eq=False)
class Channels:
    """This rank's ends: `between[s]` leads to stage s from the one before (None: not here), `returns` from the last
    stage to all ranks; where halves of `cfg` run different calls, one for each half."""

    between: tuple[Channel | None, ...]
    returns: tuple[Channel, ...]
    is_last: bool


class ChannelMaker:
    """Makes channels, each shared by all specialisations of a module that need it.

    GPUs that reach each other's memory use copy engines (`xdit_ir.transport.peer_channel`), all others the process
    group's backend.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator, self.timeout = communicator, configured_timeout(communicator.device)
        self._peers = peers_reachable(communicator)
        cuda = communicator.device.type == "cuda"
        self._aside = torch.cuda.Stream(communicator.device) if cuda else None  # type: ignore[no-untyped-call]
        self._groups: dict[Key, dist.ProcessGroup] = {}
        self._channels: dict[Key, Channel] = {}

    def open(self, pipeline: Pipeline, *, apart: bool = False) -> Channels:
        """The channels for a pipeline, in which halves of `cfg` may run calls `apart`. Collective: all ranks open the
        same ones."""
        everyone = range(pipeline.mesh.world_size)
        columns = {rank: RankTasks(pipeline, rank).ranks() for rank in everyone}
        between = {ranks: self._between(pipeline, ranks) for ranks in sorted(set(columns.values()))}
        returns = {}
        for rank in everyone:
            halves = [columns[other] for other in pipeline.mesh.group(rank, (BATCH,))] if apart else [columns[rank]]
            returns[rank] = tuple(self._returns(pipeline, half, halves) for half in halves)
        mine = self.communicator.rank
        return Channels(between[columns[mine]], returns[mine], mine == columns[mine][-1])

    def _between(self, pipeline: Pipeline, ranks: tuple[int, ...]) -> tuple[Channel | None, ...]:
        """Channels between the ranks of successive stages, each for one direction."""
        found: list[Channel | None] = [None]
        for stage, (source, target) in enumerate(itertools.pairwise(ranks), 1):
            key = (BETWEEN, stage, source, target)
            sizes = functools.partial(_sent_to, pipeline, stage)
            made = self._channel(key, source, (target,), sizes) if source != target else None
            found.append(made if self.communicator.rank in (source, target) else None)
        return tuple(found)

    def _returns(self, pipeline: Pipeline, half: tuple[int, ...], halves: Sequence[tuple[int, ...]]) -> Channel:
        """From the last stage of a half to the ranks of all halves."""
        source = half[-1]
        targets = tuple(sorted({rank for ranks in halves for rank in ranks} - {source}))
        sizes = functools.partial(_returned, pipeline)
        return self._channel(("returns", source, *targets), source, targets, sizes)

    def _channel(self, key: Key, source: int, targets: tuple[int, ...], sizes: Sizes) -> Channel:
        """One channel from `source`; ranks without an end of it only take part in making its process groups."""
        if self._peers:
            key = (*key, Slots.of(sizes()))
        if key not in self._channels:
            self._channels[key] = made = self._make(key, source, targets)
            if self.communicator.rank in (source, *targets):
                made.connect(source=self.communicator.rank == source)
        return self._channels[key]

    def _make(self, key: Key, source: int, targets: tuple[int, ...]) -> Channel:
        device, rank = self.communicator.device, self.communicator.rank
        if self._peers:
            from xdit_ir.transport.peer_channel import PeerChannel, PeerLink  # needs CUDA

            groups = {target: self._group(("peers", source, target), (source, target)) for target in targets}
            mine = [target for target in targets if rank in (source, target)]
            links = [PeerLink(device, groups[t].group_name, int(source > t), key[-1], self.timeout) for t in mine]
            return PeerChannel(device, links)
        group = self._group(key, (source, *targets))
        if key[0] == BETWEEN:
            return Pair(device, group, source, self._aside, target=targets[0])
        return Broadcast(device, group, source, self._aside)

    def _group(self, key: Key, members: tuple[int, ...]) -> dist.ProcessGroup:
        if key not in self._groups:
            self._groups[key] = dist.new_group(sorted(members), timeout=self.timeout)
        return self._groups[key]


def _sent_to(pipeline: Pipeline, stage: int) -> list[int]:
    """Bytes of the largest message to a stage, for each patch."""
    sizes = [0] * pipeline.patches
    for virtual in range(pipeline.virtual.world_size):
        patch = pipeline.virtual.index(virtual, (TIME,))
        message = Envelope.of(pipeline.part(stage, virtual).message(sent=False))
        sizes[patch] = max(sizes[patch], message.size)
    return sizes


def _returned(pipeline: Pipeline) -> list[int]:
    """Bytes of the largest result, for each patch."""
    works = [RankTasks(pipeline, rank) for rank in range(pipeline.mesh.world_size)]
    return [max(Envelope.of(work.result_types(p)).size for work in works) for p in range(pipeline.patches)]
