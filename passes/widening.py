"""What a rank needs to compute more of a value than its part, and what that takes on a machine."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partial_attention import partial_attention
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec, is_block_call
from xdit_ir.ir.relayout import kind
from xdit_ir.rules import rule_for
from xdit_ir.rules.base import OpCall
from xdit_ir.sharding.cost import relayout_dims, relayout_sent
from xdit_ir.sharding.machine import Machine

Layouts = tuple[Layout, ...]


@dataclass(frozen=True)
class Widened:
    """An operator that makes more than a rank's part: the layouts of its operands, and the seconds and ticks of work
    that it takes beyond those of the part."""

    taken: Layouts
    seconds: float = 0.0
    work: int = 0


class Widening:
    """Prices of a program's operators and exchanges in other layouts than they have, each found once."""

    def __init__(self, mesh: Mesh, machine: Machine) -> None:
        self.mesh, self.machine = mesh, machine
        self._kinds: dict[Hashable, int] = {}
        self._kind_of: dict[fx.Node, int] = {}
        self._steps: dict[tuple[int, Any], Widened | None] = {}
        self._fetches: dict[tuple[fx.Node, Layout, Layout], float] = {}

    def holds(self, have: Layout, want: Layout) -> bool:
        """Whether ranks that have a value in one layout have it in another without talking."""
        return (
            have is want or have == want or (have.partial == want.partial and kind(self.mesh, have, want)[0] == "shard")
        )

    def fetching(self, node: fx.Node, want: Layout) -> float:
        """Seconds in which ranks exchange what they lack of a value, and put it beside what they have."""
        have: Layout = node.meta[LAYOUT]
        if self.holds(have, want):
            return 0.0
        key = (node, have, want)
        if key not in self._fetches:
            target, spec = ops.RELAYOUTS[kind(self.mesh, have, want)[0]], node.meta[SPEC]
            dims = relayout_dims(target, have, want, self.mesh)
            sent = relayout_sent(target, spec, have, want, self.mesh)
            seconds = self.machine.exchange_seconds(self.mesh, Counter({(dims, sent): 1}))
            put = max(spec.on(want, rank).nbytes for rank in range(self.mesh.world_size))
            self._fetches[key] = seconds + self.machine.writing(put)
        return self._fetches[key]

    def step(self, node: fx.Node, made: Any) -> Widened | None:
        """What it takes to make the results of an operator in this layout; None: that is not known, or its ranks would
        each draw other random numbers."""
        if node not in self._kind_of:
            self._kind_of[node] = self._kinds.setdefault(_looked_at(node), len(self._kinds))
        key = (self._kind_of[node], made)
        if key not in self._steps:
            self._steps[key] = self._step(node, made)
        return self._steps[key]

    def _step(self, node: fx.Node, made: Any) -> Widened | None:
        if node.op != "call_function" or is_block_call(node) or node.target is operator.getitem:
            return None
        have: Layouts = tuple(source.meta[LAYOUT] for source in operands(node))
        if is_halo(node):
            return Widened((made,))
        if node.target is ops.shard:
            return Widened(have if self.holds(have[0], made) else (made,))
        if made == node.meta[LAYOUT]:
            return Widened(have)
        if ops.is_relayout(node.target) or is_random(node.target) or any(layout.partial for layout in have):
            return None
        taken = self._demanded(node, have, made)
        if taken is None or not all(map(self._reaches, have, taken)):
            return None
        wide, usual = self._cost(node, taken, made), self._cost(node, have, node.meta[LAYOUT])
        seconds = max(a - b for (a, _), (b, _) in zip(wide, usual, strict=True))
        return Widened(taken, seconds, max(a - b for (_, a), (_, b) in zip(wide, usual, strict=True)))

    def _demanded(self, node: fx.Node, have: Layouts, made: Any) -> Layouts | None:
        rule = rule_for(node.target)
        taken = None if rule is None else rule.demand(OpCall(node, self.mesh, have), made)
        if rule is None or taken is None or len(taken) != len(have):
            return None
        if not all(self.mesh.covers(part) for one in taken for part in one.dims if part is not None):
            return None  # what nobody needs would be on no rank
        sharding = rule.forward(OpCall(node, self.mesh, taken))
        return taken if sharding.inputs == taken and sharding.outputs == made and not sharding.fallback else None

    def _reaches(self, have: Layout, want: Layout) -> bool:
        """Whether a layout is had, or is one that extends it."""
        return self.holds(have, want) or union([have, want]) is not None

    def _cost(self, node: fx.Node, taken: Layouts, made: Any) -> list[tuple[float, int]]:
        """Seconds and ticks of every rank."""
        machine, ranks, spec = self.machine, range(self.mesh.world_size), node.meta[SPEC]
        sources = [(source.meta[SPEC], layout) for source, layout in zip(operands(node), taken, strict=True)]
        ticks = machine.work(node, node.target, sources, (spec, made), self.mesh) or [0 for _ in ranks]
        writes = isinstance(spec, TensorSpec) and not ops.is_view(node.target)
        written = [spec.on(made, rank).nbytes if writes else 0 for rank in ranks]
        pairs = zip(ticks, written, strict=True)
        return [(max(work * machine.tick, machine.writing(amount)), work) for work, amount in pairs]


def _looked_at(node: fx.Node) -> Hashable:
    """All that rules and prices look at; operators of which it is equal take the same."""
    typed = fx.map_arg((node.args, node.kwargs), lambda source: source.meta[SPEC])
    layouts = tuple(source.meta[LAYOUT] for source in operands(node))
    return node.op, node.target, repr(typed), layouts, node.meta[SPEC], node.meta[LAYOUT]


def is_halo(node: fx.Node) -> bool:
    """Whether a change of layout only moves where each rank's run of some dims begins and ends, for windows, not for an
    attention in tiles."""
    tiles = any(user.target is partial_attention for user in node.users)
    if tiles or node.target not in (ops.halo_exchange, ops.all_to_all):
        return False
    [source] = operands(node)
    return union([source.meta[LAYOUT], node.meta[LAYOUT]]) is not None


def union(layouts: Iterable[Layout]) -> Layout | None:
    """The layout in which every rank has what it has in one of these; None where that is not one run of each dim, or
    other dims are divided."""
    return reduce(lambda a, b: None if a is None else _union(a, b), layouts)  # type: ignore[arg-type, return-value]


@lru_cache(maxsize=65536)
def _union(one: Layout, other: Layout) -> Layout | None:
    if one == other:
        return one
    if one.partial or other.partial:
        return None
    dims: dict[int, Partition | None] = {}
    for dim, (a, b) in enumerate(zip(one.dims, other.dims, strict=True)):
        if a == b:
            continue
        if a is None or b is None:
            return None
        parts = [_joined(*pair, a.size) for pair in zip(a.parts, b.parts, strict=True)]
        known = tuple(part for part in parts if part is not None)
        if len(known) < len(parts):
            return None
        dims[dim] = Partition(a.size, known)
    return one.with_dims(dims)


def _joined(one: Indices, other: Indices, size: int) -> Indices | None:
    """Two runs of a dim that touch as one; None: they do not, or are several. A run may go on from the last index of
    the dim to the first."""
    if not one.runs or not other.runs or one == other:
        return one if one.runs else other
    if len(one.runs) == len(other.runs) == 1:
        (a, count), (b, length) = one.runs[0], other.runs[0]
        if max(a, b) > min(a + count, b + length):
            return None
        return Indices.range(min(a, b), max(a + count, b + length))
    if not _goes_round(one, size) or not _goes_round(other, size):
        return None
    for first, second in ((one, other), (other, one)):
        start = first.runs[0][0]
        gap = (second.runs[0][0] - start) % size
        length = max(first.size, gap + second.size)
        if gap <= first.size and length <= size:
            return Indices.of_runs([(start, min(length, size - start)), (0, length - (size - start))])
    return None


def _goes_round(part: Indices, size: int) -> bool:
    """Whether it is a run, be it one that goes on from the last index to the first."""
    return len(part.runs) == 1 or (len(part.runs) == 2 and sum(part.runs[0]) == size and part.runs[1][0] == 0)
