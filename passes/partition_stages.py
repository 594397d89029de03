"""`partition-stages`: which stage of a pipeline computes what."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.passes.inline import inline
from xdit_ir.profile import Profile, Value, boundaries, profile
from xdit_ir.program import STAGE, Program

# "As few bytes as at the boundary": a second, smaller stream may be in two states at once.
ROOM = 1.5
# Among cuts that are this close to the best balance, the one with the fewest bytes is taken.
SLACK = 1.001


@dataclass(frozen=True)
class PartitionStages:
    """Cut the operators, in their order, into `count` runs of equal FLOPs, and note the stage of every outer node that
    follows the token stream. A cut lies between blocks, or inside one where about as few bytes are alive as around it.

    `stages`: instead, how many of the blocks each stage gets. Numerics: exact.
    """

    count: int
    stages: tuple[int, ...] | None = None
    name: str = "partition-stages"

    def apply(self, program: Program) -> Program:
        """The program with `STAGE` noted; block calls that a cut goes through are expanded."""
        if self.count == 1:
            return program
        sources = [axis.value for axis in program.tokens[:1]] or [
            node.name for node in program.graph.nodes if node.op == "placeholder"
        ]
        found = profile(program, sources)
        cuts = _balanced(found, self.count) if self.stages is None else _given(found, self.count, self.stages)
        calls = {value.call for place in cuts if (value := _crossed(found, place)) is not None}

        called = {call: place for place, call in boundaries(found)}

        def note(call: fx.Node | None, node: fx.Node, new: fx.Node) -> None:
            value = Value(call, node)
            place = found.place[value] if value in found.followed else called.get(node)
            if place is not None:
                new.meta[STAGE] = bisect.bisect_right(cuts, place)

        return inline(program, [call for call in calls if call is not None], note)


def _crossed(found: Profile, place: int) -> Value | None:
    """The operator before which a cut lies, if it is inside a block."""
    value, before = found.entries[place], found.entries[place - 1]
    return value if value.call is not None and value.call is before.call else None


def _candidates(found: Profile) -> list[int]:
    """Places for cuts: the fewest bytes for every sum of FLOPs before, and no more than at the blocks around."""
    edges = [place for place, _ in boundaries(found)]
    around = [int(found.alive[place]) for place in edges] or [int(found.alive[1:-1].max(initial=0))]
    best: dict[int, tuple[int, int]] = {}
    done = 0
    for place in range(len(found.entries)):
        last = bisect.bisect_right(edges, place) - 1
        allowed = max(around[max(last, 0)], around[min(last + 1, len(around) - 1)])
        alive = int(found.alive[place])
        if 0 < alive <= allowed * ROOM and done:
            best[done] = min(best.get(done, (alive, place)), (alive, place))
        done += found.flops[place]
    best.pop(done, None)
    return [place for _, place in best.values()]


def _balanced(found: Profile, count: int) -> list[int]:
    places = _candidates(found)
    if len(places) < count - 1:
        raise ParallelizeError(
            f"pipefusion={count} needs {count - 1} places to cut the model, but it has {len(places)}; "
            f"use at most pipefusion={len(places) + 1}"
        )
    before = [0, *itertools.accumulate(found.flops)]
    marks = [0, *(before[place] for place in places), before[-1]]
    limit = _limit(marks, count)
    return [places[i - 1] for i in _cheapest(marks, [int(found.alive[p]) for p in places], count, limit * SLACK)]


def _limit(marks: Sequence[int], count: int) -> int:
    """The least work of the slowest of `count` runs between `marks`."""
    low, high = marks[-1] // count, marks[-1]
    while low < high:
        middle = (low + high) // 2
        at = 0
        for _ in range(count):
            at = bisect.bisect_right(marks, marks[at] + middle) - 1
        low, high = (low, middle) if at == len(marks) - 1 else (middle + 1, high)
    return low


def _cheapest(marks: Sequence[int], alive: Sequence[int], count: int, limit: float) -> list[int]:
    """The marks at which to cut so that no run exceeds the limit: fewest bytes, then least sum of squares."""
    end = len(marks) - 1
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for stage in range(count):
        reached: dict[int, tuple[int, int, list[int]]] = {}
        for start, (cost, squares, cuts) in best.items():
            for stop in range(start + 1, bisect.bisect_right(marks, marks[start] + limit)):
                if (stop == end) != (stage == count - 1):
                    continue
                own = 0 if stop == end else alive[stop - 1]
                option = (cost + own, squares + (marks[stop] - marks[start]) ** 2, [*cuts, stop])
                if stop not in reached or option[:2] < reached[stop][:2]:
                    reached[stop] = option
        best = reached
    return best[end][2][:-1]


def _given(found: Profile, count: int, stages: Sequence[int]) -> list[int]:
    edges = [place for place, _ in boundaries(found)]
    legal = len(stages) == count and all(isinstance(n, int) and n > 0 for n in stages) and sum(stages) == len(edges)
    if not legal:
        share, more = divmod(len(edges), count)
        near = [share + (stage < more) for stage in range(count)]
        raise ParallelizeError(
            f"stages={list(stages)} must give each of the pipefusion={count} stages at least one of the "
            f"{len(edges)} blocks, for example {near}"
        )
    return [edges[first] for first in itertools.accumulate(stages[:-1])]
