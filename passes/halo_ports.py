"""Halos of a whole program: what graphs hand each other is as wide as those who take it want it, where that is had
without an exchange."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

from torch import fx

from xdit_ir.ir.graphs import OUTER, all_graphs, arguments_of, operands, results_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import LAYOUT, Program, called_block, is_block_call
from xdit_ir.passes.halo_segments import Option, Segment, SpacedGraph, Surroundings, cut, fewest, options
from xdit_ir.passes.widening import Widening, is_halo, union
from xdit_ir.passes.write_halos import write

# How often graphs may ask each other for wider values, and from when on what still changes is refused.
ROUNDS, PATIENCE = 12, 3
# Times what it takes, at which nothing is computed twice; and how often that is doubled for what graphs agree upon.
DEAREST, TRIES = 2.0**40, 4
# An argument of a block, or a result, by its place.
Port = tuple[str, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Ports:
    """The layouts of those arguments and results of blocks that are wider than they were."""

    arguments: Mapping[Port, Layout] = field(default_factory=dict)
    results: Mapping[Port, Layout] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cut:
    """A graph in segments, with the seconds of exchanges of halos and of what is computed beyond the parts, and the
    ticks of that."""

    region: SpacedGraph
    starts: list[int]
    seconds: float
    work: int

    @cached_property
    def segments(self) -> list[Segment]:
        """The segments that begin at `starts`."""
        return cut(self.region, self.starts)


@dataclass(frozen=True, eq=False)
class Merged:
    """A program in segments, with `seconds` and `work` of a forward as those of a graph."""

    program: Program
    ports: Ports
    graphs: Mapping[str, Cut]
    seconds: float
    work: int

    def write(self) -> Program:
        """The program with halos fetched ahead of the segments."""
        outer, blocks, ports = self.program.graph, dict(self.program.blocks), self.ports
        for name, one in self.graphs.items():
            region, found = one.region, one.segments
            if name == OUTER:
                outer = write(region, found, {call: self._results(call) for call in self.program.calls})
            else:
                arguments = enumerate(arguments_of(region.graph))
                given = {node: ports.arguments.get((name, place), node.meta[LAYOUT]) for place, node in arguments}
                blocks[name] = replace(blocks[name], graph=write(region, found, given))
        return self.program.replace(graph=outer, blocks=blocks)

    def _results(self, call: fx.Node) -> tuple[Layout, ...]:
        name, layouts = called_block(call), enumerate(call.meta[LAYOUT])
        return tuple(self.ports.results.get((name, place), layout) for place, layout in layouts)


class Merging:
    """The search for the segments of all graphs of a program; `most`: ticks of work that a rank may do beyond its
    parts."""

    def __init__(self, program: Program, widening: Widening, most: float) -> None:
        self.program, self.widening, self.most = program, widening, most
        self.times = {name: times for name, _, times in all_graphs(program)}
        self._regions: dict[Hashable, tuple[SpacedGraph, dict[int, list[Option]]]] = {}

    def best(self) -> Merged:
        """The least time with no more than `most` ticks beyond the parts: with what graphs hand each other as it is, or
        as they agree upon."""
        counts = {name: len(arguments_of(block.graph)) for name, block in self.program.blocks.items()}
        every = {(name, place) for name, count in counts.items() for place in range(count)}
        unasked = partial(self._merged, ports=Ports(), refused=every, alone=True)
        alone = unasked(self._price(unasked))
        price = self._price(partial(self._merged, ports=Ports(), refused=set()))
        for _ in range(TRIES):
            together = self._agreed(price)
            if together is None or together.seconds >= alone.seconds:
                break
            if together.work <= self.most:
                return together
            price *= 2
        return alone

    def _price(self, merged: Callable[[float], Merged]) -> float:
        """The least of 1, 2, 4, ... times the time of what is computed beyond the parts at which that is no more than
        it may be."""
        price = 1.0
        while price < DEAREST and merged(price).work > self.most:
            price *= 2
        return price

    def _agreed(self, price: float) -> Merged | None:
        """What graphs agree upon; None: they do not."""
        refused, ports, patience = set[Port](), Ports(), PATIENCE
        for _ in range(ROUNDS):
            found = self._merged(price, ports, refused)
            if found.ports == ports:
                return found
            refusing = {port for port, layout in found.ports.arguments.items() if not self._is_given(port, layout)}
            if not patience:
                changed = found.ports.arguments.items() - ports.arguments.items()
                refusing |= {port for port, _ in changed}
            refused |= refusing
            ports, patience = (Ports(), PATIENCE) if refusing else (found.ports, max(patience - 1, 0))
        return None

    def _merged(self, price: float, ports: Ports, refused: set[Port], *, alone: bool = False) -> Merged:
        """The segments if graphs hand each other values of these widths; the `ports` of the result are those that
        they would rather have, of arguments that are not `refused`."""
        graphs, arguments = dict[str, Cut](), dict[Port, Layout]()
        for name, block in self.program.blocks.items():
            places = {node: (name, place) for place, node in enumerate(arguments_of(block.graph))}
            results = enumerate(results_of(block.graph))
            asked = _asked((node, ports.results.get((name, place))) for place, node in results)
            given = frozenset(node for node, port in places.items() if port not in refused)
            graphs[name] = self._cut(name, block.graph, price, Surroundings(given, asked))
            arguments |= {places[node]: layout for node, layout in _begged(graphs[name].segments).items()}
        outer = self.program.graph
        given = frozenset([] if alone else parts_of_calls(outer))
        graphs[OUTER] = self._cut(OUTER, outer, price, Surroundings(given, {}, self._calls(arguments)))
        begged = _asked((port_of(part), layout) for part, layout in _begged(graphs[OUTER].segments).items())
        seconds = sum(self.times[name] * one.seconds for name, one in graphs.items())
        work = sum(self.times[name] * one.work for name, one in graphs.items())
        return Merged(self.program, Ports(arguments, begged), graphs, seconds, work)

    def _cut(self, name: str, graph: fx.Graph, price: float, around: Surroundings) -> Cut:
        key = (name, around.given, *(frozenset(one.items()) for one in (around.asked, around.calls)))
        if key not in self._regions:
            region = SpacedGraph(graph, self.widening, around)
            self._regions[key] = region, options(region, self.most / max(self.times[name], 1))
        region, found = self._regions[key]
        return Cut(region, *fewest(found, price))

    def _calls(self, arguments: Mapping[Port, Layout]) -> dict[fx.Node, tuple[Layout, ...]]:
        """What every block call takes."""
        return {
            call: tuple(
                arguments.get((called_block(call), place), value.meta[LAYOUT])
                for place, value in enumerate(operands(call))
            )
            for call in self.program.calls
        }

    def _is_given(self, port: Port, layout: Layout) -> bool:
        """Whether all calls of a block can give it an argument of this layout without an exchange of its own."""
        calls = (call for call in self.program.calls if called_block(call) == port[0])
        return all(self._is_there(operands(call)[port[1]], layout) for call in calls)

    def _is_there(self, node: fx.Node, want: Layout) -> bool:
        if self.widening.holds(node.meta[LAYOUT], want) or is_halo(node):
            return True
        if node.target is operator.getitem:
            return is_block_call(operands(node)[0])
        wide = union([node.meta[LAYOUT], want])
        step = None if wide is None else self.widening.step(node, wide)
        return step is not None and all(map(self._is_there, operands(node), step.taken))


def parts_of_calls(graph: fx.Graph) -> list[fx.Node]:
    """The results of block calls."""
    items = (node for node in graph.nodes if node.target is operator.getitem)
    return [node for node in items if is_block_call(operands(node)[0])]


def port_of(part: fx.Node) -> Port:
    """Of which block it is which result."""
    call, place = part.args
    return called_block(call), place  # type: ignore[arg-type, return-value]


def _begged(found: Iterable[Segment]) -> dict[fx.Node, Layout]:
    return _asked(one for segment in found for one in segment.begged.items())


def _asked(pairs: Iterable[tuple[T, Layout | None]]) -> dict[T, Layout]:
    """What is asked of each, by all that ask."""
    asked: dict[T, list[Layout]] = {}
    for key, layout in pairs:
        if layout is not None:
            asked.setdefault(key, []).append(layout)
    return {key: wide for key, layouts in asked.items() if (wide := union(layouts)) is not None}
