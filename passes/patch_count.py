"""How many patches, where nobody says it: as many as stages, or more where waiting for messages costs more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import TIME
from xdit_ir.ir.program import scope_of
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.sharding.machine import Machine

# More patches read more stale values, and make more and smaller products: they must save so much of a step.
WORTH_MORE = 0.9


@dataclass(frozen=True)
class StepTime:
    """A displaced step of so many `patches` over so many `ranks` on a machine: seconds in which a rank computes all
    patches (`work`), and those in which the messages of a patch are under way (`between`), of which `latency` is there
    for any size."""

    patches: int
    ranks: int
    work: float
    between: float
    latency: float

    @property
    def seconds(self) -> float:
        """A rank is busy with all patches, or waits for the first one to come back from the last stage."""
        return max(self.work, self.work * self.ranks / self.patches + self.between)

    def least(self, patches: int) -> float:
        """That of so many patches if smaller products took no longer for their size."""
        sent = self.latency + (self.between - self.latency) * self.patches / patches
        return max(self.work, self.work * self.ranks / patches + sent)


def step_time(pipeline: Pipeline, machine: Machine) -> StepTime:
    """Work by the sizes that each patch has, and messages by the links between the ranks of successive stages."""
    virtual, patches = pipeline.virtual, range(pipeline.patches)
    seconds = [0.0] * virtual.world_size
    for _, graph, times in all_graphs(pipeline.program):
        for node in graph.nodes:
            if node.op == "call_function":
                once = scope_of(node).is_once
                for rank, each in enumerate(machine.work_seconds(node, virtual)):
                    seconds[rank] += times * each * (not once or virtual.index(rank, (TIME,)) == 0)
    ranks = pipeline.mesh.size((TIME,))
    by_patch = [max(s for v, s in enumerate(seconds) if virtual.index(v, (TIME,)) == patch) for patch in patches]
    sizes = [sum(spec.nbytes for spec in pipeline.part(0, v).message(sent=True)) for v in range(virtual.world_size)]
    hops = [(pipeline.rank(s, 0), pipeline.rank((s + 1) % pipeline.stages, 0)) for s in range(pipeline.stages)]
    away = [hop for hop in hops if hop[0] != hop[1]]
    latency = sum(machine.message_seconds(hop, 0) for hop in away)
    between = sum(machine.message_seconds(hop, max(sizes)) for hop in away)
    return StepTime(len(patches), ranks, sum(by_patch) / ranks, between, latency)


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
