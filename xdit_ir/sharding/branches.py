"""Independent parts of a program, such as the tiles of a decoder: found by data flow, to be shared out over ranks."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.leaf import Leaf
from xdit_ir.ir.program import SPEC, Program, TensorSpec, where_of
from xdit_ir.sharding.cost import outer_flops

# The part of the work that every rank may repeat, as several branches need it.
REPEATED = 0.02
# What can be shared out over so many ranks, such that the slowest does at most so many times a fair share, need not be
# divided otherwise.
MANY, EVEN = 8, 1.25


@dataclass(frozen=True)
class Sharing:
    """Which rank computes which of the values `Branches.ends`, and the work of each rank; `whole` are those that every
    rank computes, as they cost nothing that it does not compute anyway."""

    ranks: tuple[tuple[fx.Node, ...], ...]
    whole: tuple[fx.Node, ...]
    flops: tuple[int, ...]

    @property
    def slowest(self) -> int:
        """FLOPs of the rank that has most to do."""
        return max(self.flops)


@dataclass(frozen=True)
class Branches:
    """The outer graph of a program, cut where all that counts has been computed.

    `work`: what is in front of the cut. `ends`: values there that are used behind. `needs`: FLOPs by what needs them,
    as a bit for each of the ends.
    """

    work: frozenset[fx.Node]
    ends: tuple[fx.Node, ...]
    needs: Mapping[int, int]

    @staticmethod
    def of(program: Program) -> Branches:
        """Those of a program; none where something draws random numbers, or may: ranks that compute other parts would
        draw others afterwards."""
        if any(isinstance(target, Leaf) or is_random(target) for target in _targets(program)):
            return Branches(frozenset(), (), {})
        nodes = list(program.graph.nodes)
        flops = {node: found[0] for node, found in outer_flops(program, None).items() if found[0]}
        work = _in_front(nodes, flops.keys())
        ends = tuple(node for node in nodes if node in work and _is_end(node, work))
        places = {node: 1 << place for place, node in enumerate(ends)}
        reached: dict[fx.Node, int] = {}
        needs: Counter[int] = Counter()
        for node in reversed(nodes):
            if node in work:
                bits = places.get(node, 0)
                for user in node.users:
                    bits |= reached.get(user, 0)
                reached[node] = bits
                needs[bits] += flops.get(node, 0)
        return Branches(work, ends, {bits: count for bits, count in needs.items() if count})

    @cached_property
    def total(self) -> int:
        """FLOPs of all."""
        return sum(self.needs.values())

    @property
    def are_fine(self) -> bool:
        """Whether the work falls apart so far that nothing else need be divided."""
        found = self.shared(MANY) if len(self.ends) >= MANY else None
        return found is not None and found.slowest * MANY <= EVEN * self.total

    def shared(self, ranks: int) -> Sharing | None:
        """The ends shared out so that the slowest of so many ranks has least to do, what several need being done by one
        of them, but for a little that most need; None where the program does not fall apart."""
        wide = sorted((bits for bits in self.needs if bits.bit_count() > 1), key=int.bit_count, reverse=True)
        best, repeated = self._dealt(wide, ranks), 0
        for place, bits in enumerate(wide):
            repeated += self.needs[bits]
            if repeated > REPEATED * self.total or best is None:
                break
            found = self._dealt(wide[place + 1 :], ranks)
            best = found if found is not None and found.slowest < best.slowest else best
        return None if best is None or best.slowest >= self.total else best

    def _dealt(self, joined: Sequence[int], ranks: int) -> Sharing | None:
        """The ends shared out, largest branch first, where one rank has all that one of `joined` names."""
        if len(self.ends) < 2:
            return None
        groups = _groups(joined, len(self.ends))
        costs = [sum(count for bits, count in self.needs.items() if not bits & ~group) for group in groups]
        dealt, loads, whole = [0] * ranks, [0] * ranks, 0
        for group, cost in sorted(zip(groups, costs, strict=True), key=lambda pair: -pair[1]):
            if not cost:
                whole |= group
                continue
            rank = loads.index(min(loads))
            dealt[rank] |= group
            loads[rank] += cost
        flops = tuple(sum(count for bits, count in self.needs.items() if bits & (own | whole)) for own in dealt)
        return Sharing(tuple(map(self._named, dealt)), self._named(whole), flops)

    def _named(self, bits: int) -> tuple[fx.Node, ...]:
        return tuple(end for place, end in enumerate(self.ends) if bits >> place & 1)


def draws(program: Program) -> str:
    """Where in the model random numbers are drawn, or nothing: ranks that run other programs would draw others."""
    for _, graph, _ in all_graphs(program):
        for node in graph.nodes:
            if node.target.draws if isinstance(node.target, Leaf) else is_random(node.target):
                return where_of(node).source or where_of(node).module
    return ""


def _targets(program: Program) -> set[object]:
    return {node.target for _, graph, _ in all_graphs(program) for node in graph.nodes}


def _in_front(nodes: Sequence[fx.Node], counted: object) -> frozenset[fx.Node]:
    """What counts, all that it is computed from, and the results of calls that count."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node in counted or any(user in found for user in node.users):  # type: ignore[operator]
            found.add(node)
    found |= {node for node in nodes if node.target is operator.getitem and node.args[0] in found}
    return frozenset(found)


def _is_end(node: fx.Node, work: frozenset[fx.Node]) -> bool:
    """Whether a value is used behind the cut; inputs and weights are there in any case."""
    computed = node.op == "call_function" and isinstance(node.meta[SPEC], TensorSpec)
    return computed and any(user not in work for user in node.users)


def _groups(joined: Sequence[int], count: int) -> list[int]:
    """The bits of `count` values, grouped so that those which one of `joined` names are together."""
    groups = [1 << place for place in range(count)]
    for bits in joined:
        apart = [group for group in groups if not group & bits]
        together = sum(group for group in groups if group & bits)
        groups = [*apart, together] if len(apart) < len(groups) - 1 else groups
    return sorted(groups, key=lambda group: group & -group)
