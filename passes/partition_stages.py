"""`partition-stages`: which stage of a pipeline computes what."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.dataflow import ProgramValue
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph, expand_call, placeholders
from xdit_ir.ir.program import STAGE, Program, called_block
from xdit_ir.pipefusion.liveness import Liveness, boundaries, liveness
from xdit_ir.pipefusion.stage_search import CutPoints, StagePlan, contiguous, cut_folded, cut_straight, folded
from xdit_ir.sharding.machine import Machine

# "As few bytes as at the boundary": a second, smaller stream may be in two states at once.
ROOM = 1.5
# How much more than its share of the weights a rank may have: the first of these with which a step takes at most EVEN
# times as long as with contiguous stages without a bound.
WEIGHTS = (1.1, 1.2, 1.5, 2.0)
EVEN = 1.05
Choice = tuple[tuple[int, ...], list[int]]


@dataclass(frozen=True)
class PartitionStages:
    """Cut the operators, in their order, into `count` runs of equal work, or into twice as many, of which the rank of
    the first one also has the last one (folded); note the stage of every outer node that follows the token stream. A
    cut lies between blocks, or inside one where about as few bytes are alive as around it.

    Folded where the weights, or the bytes of long skips, are spread better so. `stages`: instead, how many of the
    blocks each stage gets.
    """

    name: ClassVar[str] = "partition-stages"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.STAGES})

    count: int
    stages: tuple[int, ...] | None = None
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program with `STAGE` noted; block calls that a cut goes through are expanded."""
        if self.count == 1:
            return program
        sources = [axis.value for axis in program.tokens[:1]] or [node.name for node in placeholders(program.graph)]
        found = liveness(program, sources, self.machine)
        coordinates, cuts = (
            _balanced(found, self.count, self.machine)
            if self.stages is None
            else _given(found, self.count, self.stages)
        )
        crossed = [value.call for place in cuts if (value := _crossed(found, place)) is not None]
        called = {call: place for place, call in boundaries(found)}

        def note(call: fx.Node | None, copies: Mapping[fx.Node, fx.Node]) -> None:
            for node, new in copies.items():
                value = ProgramValue(call, node)
                place = found.place[value] if value in found.followed else called.get(node)
                if place is not None:
                    new.meta[STAGE] = bisect.bisect_right(cuts, place)

        graph = copy_graph(program.graph)
        copies = dict(zip(program.graph.nodes, graph.nodes, strict=True))
        note(None, copies)
        for call in dict.fromkeys(crossed):
            assert call is not None
            note(call, expand_call(graph, copies[call], program.blocks[called_block(call)].graph, prefixed=True))
        return program.with_graph(graph).replace(coordinates=coordinates)


def _crossed(found: Liveness, place: int) -> ProgramValue | None:
    """The operator before which a cut lies, if it is inside a block."""
    value, before = found.entries[place], found.entries[place - 1]
    return value if value.call is not None and value.call is before.call else None


def _candidates(found: Liveness) -> list[int]:
    """Places for cuts: the fewest bytes for every sum of work before, and no more than at the blocks around."""
    edges = [place for place, _ in boundaries(found)]
    around = [int(found.alive[place]) for place in edges] or [int(found.alive[1:-1].max(initial=0))]
    best: dict[int, tuple[int, int]] = {}
    before = [0, *itertools.accumulate(found.work.tolist())]
    for place in range(len(found.entries)):
        last = bisect.bisect_right(edges, place) - 1
        allowed = max(around[max(last, 0)], around[min(last + 1, len(around) - 1)])
        alive = int(found.alive[place])
        done = before[place]
        if 0 < alive <= allowed * ROOM and 0 < done < before[-1]:
            best[done] = min(best.get(done, (alive, place)), (alive, place))
    return [place for _, place in best.values()]


def _balanced(found: Liveness, count: int, machine: Machine) -> Choice:
    """Contiguous or folded stages: whose slowest rank is done first, among those that spread the weights well."""
    places = _candidates(found)
    if len(places) < count - 1:
        raise ParallelizeError(
            f"pipefusion={count} needs {count - 1} places to cut the model, but it has {len(places)}; "
            f"use at most pipefusion={len(places) + 1}"
        )
    marks = _marks(found, places)
    straight = cut_straight(marks, count, float("inf"))
    assert straight is not None

    def seconds(plan: StagePlan) -> float:
        return plan.slowest * machine.tick + machine.relay(plan.bytes)

    for bound in WEIGHTS:
        best = min(_options(marks, count, bound), key=seconds, default=None)
        if best is not None and seconds(best) <= EVEN * seconds(straight):
            break
    else:
        best = min(_options(marks, count, float("inf")), key=seconds)
    return best.coordinates, [places[mark - 1] for mark in best.marks]


def _options(marks: CutPoints, count: int, bound: float) -> list[StagePlan]:
    weights = bound * float(marks.weights[-1]) / count
    found = (cut(marks, count, weights) for cut in (cut_straight, cut_folded))
    return [cuts for cuts in found if cuts is not None]


def _marks(found: Liveness, places: Sequence[int]) -> CutPoints:
    edges = [0, *places, len(found.entries)]
    sent = np.zeros((len(edges), len(edges)), dtype=np.int64)
    for made, uses, nbytes in found.crossing():
        first, last = bisect.bisect_right(edges, made), bisect.bisect_right(edges, uses[-1])
        for mark in range(first, last):
            following = uses[bisect.bisect_left(uses, edges[mark])]
            sent[mark, bisect.bisect_right(edges, following) :] += nbytes
            sent[:first, mark] += nbytes
    work, weights = (np.concatenate([[0], np.cumsum(each)])[edges] for each in (found.work, found.weights))
    return CutPoints(work, weights, sent)


def _given(found: Liveness, count: int, stages: Sequence[int]) -> Choice:
    edges = [place for place, _ in boundaries(found)]
    forms = {len(form): form for form in (folded(count), contiguous(count))}
    whole = all(isinstance(n, int) and n > 0 for n in stages) and sum(stages) == len(edges)
    if not whole or len(stages) not in forms:
        share, more = divmod(len(edges), count)
        near = [share + (stage < more) for stage in range(count)]
        raise ParallelizeError(
            f"stages={list(stages)} must give each of the pipefusion={count} stages (or of twice as many, there and "
            f"back again) at least one of the {len(edges)} blocks, for example {near}"
        )
    return forms[len(stages)], [edges[first] for first in itertools.accumulate(stages[:-1])]
