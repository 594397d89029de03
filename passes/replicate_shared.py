"""`replicate-shared`: what every block would gather of a value that they share is gathered once, or not divided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import Program, Seeding
from xdit_ir.passes.find_tokens import segments_of
from xdit_ir.passes.lower_attention import LowerAttention
from xdit_ir.rules.joins import concat_partitions, section
from xdit_ir.sharding.assignment import Assignment
from xdit_ir.sharding.layout_graph import LayoutGraph, LayoutNode
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.propagate import Propagation, Seeds

# The work of the slowest rank that may be done for fewer exchanges, whatever they cost, to what it was.
REPEATED = 1.10


@dataclass(frozen=True)
class ReplicateShared:
    """Given how token streams shall be divided, which of them, or of what is made of them, every rank had better have
    whole.

    A short text that is divided saves the projections of its keys, but each block then waits for a gather of them.
    What all calls of a block share is gathered before them instead (or one segment of it is, or a stream is not
    divided in the first place) where that takes less time: more FLOPs of the slowest rank, fewer bytes and exchanges.
    """

    name: ClassVar[str] = "replicate-shared"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.SEEDS})

    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program whose seeds leave such values whole; the first seed stays."""
        given = program.seeding
        assert given is not None
        seeds = self._improved(program, given) if given.seeds else {}
        return program.replace(seeding=replace(given, seeds=seeds))

    def _improved(self, program: Program, given: Seeding) -> Seeds:
        mesh, seeds = given.mesh, given.seeds
        run = Propagation(program, mesh, LowerAttention(mesh, self.machine).infer)
        best, limit = run.attempt(seeds), None
        while count := _count(best):
            limit = limit or REPEATED * max(best.flops())
            tried = [(run.attempt(one), one) for one in _candidates(program, mesh, best, seeds)]
            fewer = [pair for pair in tried if _count(pair[0]) < count and max(pair[0].flops()) <= limit]
            choice, chosen = min(fewer, key=lambda pair: self._seconds(pair[0]), default=(best, seeds))
            if self._seconds(choice) >= self._seconds(best):
                break
            best, seeds = choice, chosen
        return seeds

    def _seconds(self, attempt: Assignment) -> float:
        return max(attempt.work(self.machine)) * self.machine.tick + attempt.exchange_seconds(self.machine)


def _candidates(program: Program, mesh: Mesh, attempt: Assignment, seeds: Seeds) -> Iterator[Seeds]:
    for name in list(seeds)[1:]:
        yield {other: layouts for other, layouts in seeds.items() if other != name}
    for value in _shared(attempt):
        name = value.node.name
        for layout in dict.fromkeys(_wider(program, mesh, value.layout)):
            if layout != value.layout:
                yield {**seeds, name: (*seeds.get(name, ()), layout)}


def _wider(program: Program, mesh: Mesh, layout: Layout) -> Iterator[Layout]:
    """The layout with a divided dim whole, or one of the segments that it is joined of."""
    for dim, partition in enumerate(layout.dims):
        if partition is None or not mesh.dividing_dims(partition) & set(SEQUENCE):
            continue
        yield layout.with_dims({dim: mesh.gathered(partition, SEQUENCE)})
        if mesh.dividing_dims(partition) <= set(SEQUENCE):
            for sizes in segments_of(program, partition.size):
                yield from (layout.with_dims({dim: _with_whole(partition, sizes, i)}) for i in range(len(sizes)))


def _with_whole(partition: Partition, sizes: tuple[int, ...], whole: int) -> Partition | None:
    """The partition with one of its segments on every rank."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [section(partition, start, size) for start, size in zip(starts, sizes, strict=True)]
    return concat_partitions([None if i == whole else part for i, part in enumerate(parts)], sizes)


def _gathers(body: LayoutGraph) -> list[LayoutNode]:
    return [step for step in body.steps if step.target is ops.gather]


def _count(attempt: Assignment) -> int:
    return sum(len(_gathers(body)) for body in attempt.bodies())


def _shared(attempt: Assignment) -> list[LayoutNode]:
    """The values that every call of a block is given in the same place and of which that block gathers something."""
    given: dict[tuple[str, int], list[LayoutNode]] = {}
    wanted: dict[tuple[str, int], None] = {}
    for call in attempt.draft.calls:
        body = attempt.body(call)
        for place, source in enumerate(call.sources):
            given.setdefault((call.body[0], place), []).append(source)
        wanted |= dict.fromkeys((call.body[0], place) for place in _origins(body, _gathers(body)))
    found = [given[key] for key in wanted]
    return list({values[0].node: values[0] for values in found if len({value.node for value in values}) == 1}.values())


def _origins(body: LayoutGraph, steps: list[LayoutNode]) -> list[int]:
    """The places of the arguments that values come from."""
    before, waiting = set(steps), list(steps)
    while waiting:
        new = [source for source in waiting.pop().sources if source not in before]
        before |= set(new)
        waiting += new
    arguments = [step for step in body.steps if step.node.op == "placeholder" and not step.relayout]
    return [place for place, step in enumerate(arguments) if step in before]
