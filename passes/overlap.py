"""`overlap`: order operators so that exchanges start as soon as they can and something else is done meanwhile."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program
from xdit_ir.sharding.cost import partners, relayout_bytes
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.memory import most_at_once

Seconds = dict[fx.Node, float]
HARDLY = 0.02  # of the time that operators take
LESS = 0.9  # of the memory


@dataclass(frozen=True)
class Overlap:
    """List scheduling on two resources, the processor and the links: of the operators whose operands are there, the one
    with the longest exchanges still ahead of it goes first (as Jackson's rule does for jobs with tails), and all that
    one exchange needs before what only the next one needs. Work with none ahead is left to fill the time in which the
    others wait. An exchange starts where it stands in the graph and is awaited by the first operator that needs it.

    Where all exchanges together take hardly any time, as halos do, a graph keeps its order if that needs a tenth less
    memory.
    """

    name: ClassVar[str] = "overlap"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program with every graph in its new order; the same on all ranks."""
        return map_graphs(program, self._order)

    def _order(self, graph: fx.Graph) -> None:
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        if not any(ops.communicates(node.target) for node in nodes):
            return
        seconds = {node: self._seconds(node) for node in nodes}
        order = [*_views_late(_schedule(nodes, seconds))]
        if _exchanges(seconds) <= HARDLY * sum(seconds.values()):
            kept = [*_views_late(nodes)]
            order = kept if self._most(graph, kept) < LESS * self._most(graph, order) else order
        anchor = next(iter(reversed(graph.nodes)))
        for node in order:
            anchor.prepend(node)

    def _most(self, graph: fx.Graph, order: list[fx.Node]) -> int:
        first = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        return most_at_once([*first, *order, *graph.find_nodes(op="output")], self.mesh)

    def _seconds(self, node: fx.Node) -> float:
        if ops.communicates(node.target):
            return self.machine.among(partners(node, self.mesh), relayout_bytes(node, self.mesh))
        return max(self.machine.work_seconds(node, self.mesh))


def _exchanges(seconds: Seconds) -> float:
    return sum(time for node, time in seconds.items() if ops.communicates(node.target))


def _schedule(nodes: list[fx.Node], seconds: Seconds) -> Iterator[fx.Node]:
    """The nodes in the order in which a rank would best issue them."""
    place = {node: index for index, node in enumerate(nodes)}
    ahead, nearest = _ahead(nodes, seconds), _nearest(nodes, place)
    missing = {node: sum(source in place for source in node.all_input_nodes) for node in nodes}
    arrival: Seconds = {}
    ready = [(_kind(node, seconds), -ahead[node], nearest[node], place[node]) for node in nodes if not missing[node]]
    heapq.heapify(ready)
    waiting: list[tuple[float, float, int, int]] = []
    now = link = 0.0
    while ready or waiting:
        while waiting and (not ready or waiting[0][0] <= now):
            time, priority, near, index = heapq.heappop(waiting)
            now = max(now, time)
            heapq.heappush(ready, (_kind(nodes[index], seconds), priority, near, index))
        *_, index = heapq.heappop(ready)
        node = nodes[index]
        yield node
        if ops.communicates(node.target):
            link = arrival[node] = max(now, link) + seconds[node]
        else:
            now = arrival[node] = now + seconds[node]
        for user in node.users:
            if user in missing:
                missing[user] -= 1
                if not missing[user]:
                    when = max(arrival[source] for source in user.all_input_nodes if source in place)
                    heapq.heappush(waiting, (when, -ahead[user], nearest[user], place[user]))


def _views_late(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """Put off views until something computes with them: to see an exchange's result is to wait for it."""
    put_off: set[fx.Node] = set()

    def needed(node: fx.Node) -> Iterator[fx.Node]:
        for source in node.all_input_nodes:
            if source in put_off:
                put_off.remove(source)
                yield from needed(source)
                yield source

    order = list(nodes)
    for node in order:
        if ops.is_view(node.target) and not ops.communicates(node.target):
            put_off.add(node)
            continue
        yield from needed(node)
        yield node
    yield from (node for node in order if node in put_off)


def _kind(node: fx.Node, seconds: Seconds) -> float:
    """Exchanges are issued first, then what costs nothing, then work."""
    return -1.0 if ops.communicates(node.target) else float(seconds[node] > 0)


def _ahead(nodes: list[fx.Node], seconds: Seconds) -> Seconds:
    """The most time that exchanges take on a way from each node to the end of the graph."""
    ahead: Seconds = {}
    for node in reversed(nodes):
        rest = max((ahead[user] for user in node.users if user in ahead), default=0.0)
        ahead[node] = rest + (seconds[node] if ops.communicates(node.target) else 0.0)
    return ahead


def _nearest(nodes: list[fx.Node], place: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """The place of the first exchange that each node leads to; behind all places if there is none."""
    nearest: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        found = (
            place[user] if ops.communicates(user.target) else nearest[user] for user in node.users if user in place
        )
        nearest[node] = min(found, default=len(nodes))
    return nearest
