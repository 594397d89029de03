"""The channels of a pipeline: which there are, who has an end of them, and over what they run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.ir.mesh import BATCH, TIME
from xdit_ir.ir.program import TensorSpec
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.pipefusion.rank_tasks import RankTasks, StageTask
from xdit_ir.pipelined.schedule import StageRun
from xdit_ir.transport.distributed import Communicator, peers_reachable
from xdit_ir.transport.messages import Arrival, Broadcast, Channel, CollectiveChannel, Envelope, Pair, Slots

Key = tuple[Any, ...]
Sizes = Callable[[], Sequence[int]]  # bytes of the messages of a pass, which only peers ask for
BETWEEN = "between stages"


@dataclass(frozen=True, eq=False)
class Channels:
    """The ends of a rank with these tasks: `between[s]` leads to stage s from the one before (None: not here),
    `returns` from the last stage to all ranks; where parts of `cfg` run different calls, one for each part, of which
    this rank's is `half`."""

    tasks: RankTasks
    between: tuple[Channel | None, ...]
    returns: tuple[Channel, ...]
    half: int
    is_last: bool

    @property
    def pipeline(self) -> Pipeline:
        """Of the tasks."""
        return self.tasks.pipeline

    @cached_property
    def types(self) -> Sequence[Sequence[TensorSpec]]:
        """Of the results of each patch."""
        return [self.tasks.result_types(patch) for patch in range(self.pipeline.patches)]

    def arrivals(self, runs: Iterable[tuple[StageRun, StageTask]]) -> dict[StageRun, Arrival]:
        """Expect the messages for these runs of stages, where there are any."""
        found = {}
        for item, task in runs:
            channel, message = self.between[item.stage], _envelope(task.receives)
            if channel is not None and message is not None:
                found[item] = channel.expect(message, item.issue_order - 1)
        return found

    def results(self, number: int, half: int, *, synchronous: bool) -> dict[int | None, Arrival | None]:
        """Expect the results of a pass that a half runs, by patch, None for all patches: those that other ranks make;
        None for results of which there are none."""
        if self.is_last and half == self.half:
            return {}
        found: dict[int | None, Arrival | None] = {}
        for patch in (None,) if synchronous else range(self.pipeline.patches):
            message = _envelope([spec for p, types in enumerate(self.types) if patch in (None, p) for spec in types])
            due = self.pipeline.issue_order(self.pipeline.stages - 1, number, patch or 0)
            found[patch] = None if message is None else self.returns[half].expect(message, due)
        return found

    def send(self, item: StageRun, task: StageTask, outputs: Sequence[torch.Tensor]) -> None:
        """Hand what a stage gave to the next one, or as results to all ranks."""
        message = _envelope(task.sends)
        if message is not None:
            channel = self.between[item.stage + 1]
            assert channel is not None
            channel.send(message, outputs[: len(task.sends)])
        message = _envelope(task.results)
        if message is not None:
            self.returns[self.half].send(message, outputs)

    def free(self, number: int) -> None:
        """Before a pass: fetch results that nobody has read, except those of the last one, so that there is room."""
        limit = self.pipeline.issue_order(self.pipeline.stages - 1, number - 1, 0)
        for channel in self.returns:
            channel.free(limit)

    def post_sent(self, limit: float) -> None:
        """Post what is sent before a turn."""
        for channel in (*filter(None, self.between), *self.returns):
            channel.post_sent(limit)


class ChannelMaker:
    """Makes channels, each shared by all specialisations of a module that need it.

    GPUs that reach each other's memory use copy engines (`xdit_ir.transport.peer_channel`), all others the process
    group's backend.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self._peers = peers_reachable(communicator)
        cuda = communicator.device.type == "cuda"
        self._aside = torch.cuda.Stream(communicator.device) if cuda else None  # type: ignore[no-untyped-call]
        self._groups: dict[Key, dist.ProcessGroup] = {}
        self._channels: dict[Key, Channel] = {}

    def open(self, tasks: RankTasks, *, apart: bool = False) -> Channels:
        """The channels for a rank's tasks; parts of `cfg` may run calls `apart`. Collective: all ranks open those of
        the same pipeline."""
        pipeline = tasks.pipeline
        everyone = range(pipeline.mesh.world_size)
        columns = {rank: RankTasks(pipeline, rank).ranks() for rank in everyone}
        between = {ranks: self._between(pipeline, ranks) for ranks in sorted(set(columns.values()))}
        returns = {}
        for rank in everyone:
            halves = [columns[other] for other in pipeline.mesh.group(rank, (BATCH,))] if apart else [columns[rank]]
            returns[rank] = tuple(self._returns(pipeline, half, halves) for half in halves)
        mine = self.communicator.rank
        half = pipeline.mesh.index(mine, (BATCH,)) if apart else 0
        return Channels(tasks, between[columns[mine]], returns[mine], half, mine == columns[mine][-1])

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
            links = [
                PeerLink(device, groups[t].group_name, int(source > t), key[-1], self.communicator.timeout)
                for t in mine
            ]
            for link in links:
                self.communicator.release.watch(link.waits)
            return PeerChannel(device, links)
        group = self._group(key, (source, *targets))
        first, target = self.communicator.process(source), self.communicator.process(targets[0])
        made: CollectiveChannel = Broadcast(device, group, first, self._aside)
        if key[0] == BETWEEN:
            made = Pair(device, group, first, self._aside, target=target)
        self.communicator.flush(made.leaving)
        return made

    def _group(self, key: Key, members: tuple[int, ...]) -> dist.ProcessGroup:
        if key not in self._groups:
            self._groups[key] = self.communicator.new_group(members)
        return self._groups[key]


def _envelope(specs: Sequence[TensorSpec]) -> Envelope | None:
    """The message for tensors of these types; None if there is nothing in it."""
    made = Envelope.of(specs)
    return made if made.size else None


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
