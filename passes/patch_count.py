"""How many patches, where nobody says it: as many as stages, or more where waiting for messages costs more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.flops import is_counted
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import TIME
from xdit_ir.ir.program import is_block_call, scope_of
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.sharding.machine import Machine

# More patches read more stale values, and make more and smaller products: they must save so much of a step.
WORTH_MORE = 0.9


@dataclass(frozen=True)
class StepTime:
    """A displaced step of so many `patches` over so many `ranks` on a machine. Seconds in which a rank is `busy` with
    all patches, and in which its kernels begin and end for each (`started`); and in which the messages of a patch are
    under way (`between`), of which `latency` is there for any size."""

    patches: int
    ranks: int
    busy: float
    started: float
    between: float
    latency: float

    @property
    def seconds(self) -> float:
        """A rank works on all patches, or waits for the first one to come back from the last stage."""
        return self.least(self.patches)

    def least(self, patches: int) -> float:
        """That of so many patches if their sizes cost nothing else."""
        work = self.busy + self.started * patches
        sent = self.latency + (self.between - self.latency) * self.patches / patches
        return max(work, work * self.ranks / patches + sent)


def step_time(pipeline: Pipeline, machine: Machine) -> StepTime:
    """Work by the sizes that each patch has, and messages by the links between the ranks of successive stages."""
    virtual, patches, ranks = pipeline.virtual, pipeline.patches, pipeline.mesh.size((TIME,))
    places = [virtual.index(rank, (TIME,)) for rank in range(virtual.world_size)]
    seconds, kernels = [0.0] * len(places), 0
    for _, graph, times in all_graphs(pipeline.program):
        for node in graph.nodes:
            once = scope_of(node).is_once
            if node.op != "call_function" or is_block_call(node):
                continue
            kernels += times * (is_counted(node) and not once)
            for rank, each in enumerate(machine.work_seconds(node, virtual)):
                seconds[rank] += times * each * (not once or places[rank] == 0)
    started, inside = machine.gap * kernels / ranks, machine.kernels is not None
    all_patches = sum(max(s for s, at in zip(seconds, places, strict=True) if at == p) for p in range(patches)) / ranks
    busy = all_patches - started * patches * inside
    sent = max(sum(x.nbytes for x in pipeline.part(0, v).message(sent=True)) for v in range(len(places)))
    hops = [(pipeline.rank(s, 0), pipeline.rank((s + 1) % pipeline.stages, 0)) for s in range(pipeline.stages)]
    away = [hop for hop in hops if hop[0] != hop[1]]
    between, latency = (sum(machine.message_seconds(hop, size) for hop in away) for size in (sent, 0))
    return StepTime(patches, ranks, busy, started, between, latency)


def cheapest(first: Pipeline, machine: Machine, make: Callable[[int], Pipeline]) -> Pipeline:
    """Of a pipeline with as many patches as ranks along it, and those that `make` makes with one more and with twice as
    many, the one whose step takes least; these are made only where they could be worth it."""
    count = first.patches
    known = step_time(first, machine)
    best, least = first, known.seconds * WORTH_MORE
    for more in dict.fromkeys((count + 1, 2 * count)):
        if known.least(more) >= least:
            continue
        try:
            made = make(more)
        except ParallelizeError:  # the model cannot be divided so
            continue
        if (seconds := step_time(made, machine).seconds) < least:
            best, least = made, seconds
    return best
