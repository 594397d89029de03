"""Where halos are best fetched in a graph: stretches of operators in front of which ranks exchange once, and in which
each rank computes for itself what it needs of its neighbours' rows."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec, is_weight
from xdit_ir.passes.widening import Layouts, Widened, Widening, is_halo, union

aten = torch.ops.aten
Wide = Mapping[fx.Node, Layout]


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a graph and those around it hand each other: `given` are values that it gets as wide as it wants, `asked`
    results that it gives wider than they are, `calls` what its block calls take."""

    given: frozenset[fx.Node] = frozenset()
    asked: Wide = field(default_factory=dict)
    calls: Mapping[fx.Node, Layouts] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SpacedGraph:
    """A graph to be cut into segments; positions are places in `nodes`."""

    graph: fx.Graph
    widening: Widening
    around: Surroundings

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """All but the output. Copies that only results are made of stand behind the last other use of what they are
        copies of, so in the segment of that: caches become as wide as windows need what they keep."""
        every = [node for node in self.graph.nodes if node.op != "output"]
        kept, output, last = set[fx.Node](), self.graph.output_node(), dict[fx.Node, int]()
        for node in reversed(every):
            if _copies(node.target) and all(user is output or user in kept for user in node.users):
                kept.add(node)
        for place, node in enumerate(every):
            last[node] = place
            if node not in kept:
                last.update(dict.fromkeys(node.all_input_nodes, place))
        order = {node: place for place, node in enumerate(every)}
        for node in filter(kept.__contains__, every):
            order[node] = last[node] = max((last[source] for source in node.all_input_nodes), default=order[node])
        return sorted(every, key=lambda node: (order[node], node in kept))

    @cached_property
    def place(self) -> dict[fx.Node, int]:
        """Where each node stands."""
        return {node: place for place, node in enumerate(self.nodes)}

    @cached_property
    def until(self) -> dict[fx.Node, int]:
        """The place of each value's last use; the output is behind all else."""
        last = dict.fromkeys(self.nodes, -1)
        for place, node in enumerate([*self.nodes, self.graph.output_node()]):
            last.update(dict.fromkeys(node.all_input_nodes, place))
        return last

    @cached_property
    def cuts(self) -> list[int]:
        """Positions where halos may be fetched: the begin, before each exchange of one, and between two of them the
        last position at which the fewest bytes are under way."""
        found, lightest, under_way = {0, len(self.nodes)}, 0, self._under_way()
        for place, node in enumerate(self.nodes):
            lightest = place if under_way[place] <= under_way[lightest] else lightest
            if node in self.halos:
                found |= {lightest, place}
                lightest = place + 1 if place + 1 < len(self.nodes) else place
        return sorted(found)

    @cached_property
    def sources(self) -> dict[fx.Node, list[fx.Node | None]]:
        """What each node takes; None for weights, which all ranks have."""
        return {node: [None if is_weight(one) else one for one in operands(node)] for node in self.nodes}

    @cached_property
    def halos(self) -> dict[fx.Node, float]:
        """The exchanges of halos that stand there now, with their seconds."""
        found = filter(is_halo, self.nodes)
        return {node: self.widening.fetching(operands(node)[0], node.meta[LAYOUT]) for node in found}

    def usual(self, node: fx.Node) -> Layouts:
        """What an operator takes as it stands there; what its block takes, of a block call."""
        return self.around.calls.get(node) or tuple(source.meta[LAYOUT] for source in operands(node))

    def step(self, node: fx.Node, made: Any) -> Widened | None:
        """What it takes to make these layouts; a block call makes what its block does."""
        return None if node in self.around.calls else self.widening.step(node, made)

    def _under_way(self) -> list[int]:
        """Bytes of divided values that operators have made and others will take, at every position."""
        change = [0] * (len(self.nodes) + 1)
        for place, node in enumerate(self.nodes):
            takers = [self.place[user] for user in node.users if user in self.place]
            spec, layout = node.meta[SPEC], node.meta[LAYOUT]
            if node.op == "call_function" and takers and isinstance(spec, TensorSpec) and not layout.is_whole:
                change[place + 1] += spec.nbytes
                change[max(takers) + 1] -= spec.nbytes
        return list(itertools.accumulate(change))


class Segment:
    """Operators of a region up to a position, met one by one against the data flow.

    `made` is the layout in which each makes its result and `taken` those in which it takes its operands. `fetched` are
    values of which ranks exchange what they lack, `begged` those that whoever gives them must give wider. `exchanged`:
    seconds of exchanges inside; `computed` and `work`: seconds and ticks of what is computed beyond the parts;
    `spared`: seconds of the exchanges of halos that stand there now.
    """

    def __init__(self, region: SpacedGraph, stop: int) -> None:
        self.region, self.start, self.stop = region, stop, stop
        self.made: dict[fx.Node, Any] = {}
        self.taken: dict[fx.Node, Layouts] = {}
        self.fetched: dict[fx.Node, Layout] = {}
        self.begged: dict[fx.Node, Layout] = {}
        self.exchanged = self.computed = self.spared = 0.0
        self.work = 0
        self._wanted: dict[fx.Node, dict[Layout, None]] = {}
        self._parts: dict[fx.Node, list[fx.Node]] = {}

    def back(self) -> None:
        """Take in the operator before."""
        self.start -= 1
        node = self.region.nodes[self.start]
        if node.target is operator.getitem and node not in self.region.around.given:
            self._parts.setdefault(operands(node)[0], []).append(node)  # what it wants is asked of the operator
            return
        wanted = self._wanted.pop(node, {})
        if (asked := self.region.around.asked.get(node)) is not None:
            wanted[asked] = None
        if node in self.region.around.given:
            self._beg(node, wanted)
        elif node.op != "call_function":
            self._fetch(node, wanted)
        elif isinstance(node.meta[SPEC], TensorSpec):
            self._one(node, wanted)
        else:
            self._several(node, self._parts.pop(node, []))

    def exchanges(self) -> float:
        """Seconds of all exchanges of the segment, if it begins here."""
        return self.exchanged + sum(self.region.widening.fetching(*one) for one in self._ahead())

    def close(self) -> Segment:
        """Note what is fetched ahead of it; nothing is taken in any more."""
        self.fetched.update(self._ahead())
        for node in self._wanted.keys() & self.region.around.given:
            self._beg(node, self._wanted[node])
        return self

    def _ahead(self) -> Iterator[tuple[fx.Node, Layout]]:
        """Of values from before the segment what it lacks."""
        for node, wanted in self._wanted.items():
            if node not in self.region.around.given:
                yield from ((node, layout) for layout in self._missing(node, wanted))

    def _missing(self, node: fx.Node, wanted: Iterable[Layout]) -> list[Layout]:
        """What ranks want of a value and do not have, as one layout where that is possible."""
        found = [one for one in wanted if not self.region.widening.holds(node.meta[LAYOUT], one)]
        joined = union(found) if found else None
        return found if joined is None else [joined]

    def _fetch(self, node: fx.Node, wanted: Iterable[Layout]) -> None:
        for layout in self._missing(node, wanted):
            self.fetched[node] = layout
            self.exchanged += self.region.widening.fetching(node, layout)

    def _beg(self, node: fx.Node, wanted: Iterable[Layout]) -> None:
        missing = self._missing(node, wanted)
        wide = union([node.meta[LAYOUT], *missing])
        if wide is None:
            self._fetch(node, missing)
        elif missing:
            self.begged[node] = wide

    def _take(self, node: fx.Node, step: Widened | None) -> None:
        taken = self.region.usual(node) if step is None else step.taken
        self.taken[node] = taken
        if step is not None:
            self.computed, self.work = self.computed + step.seconds, self.work + step.work
        for source, layout in zip(self.region.sources[node], taken, strict=True):
            if source is not None:
                self._wanted.setdefault(source, {})[layout] = None

    def _width(self, node: fx.Node, wanted: Collection[Layout]) -> Layout | None:
        """The layout with all that is wanted of a value, here and behind; None: there is none."""
        behind = [node.meta[LAYOUT]] if not wanted or self.region.until[node] >= self.stop else []
        return union([*behind, *wanted])

    def _one(self, node: fx.Node, wanted: Collection[Layout]) -> None:
        usual, wide = node.meta[LAYOUT], self._width(node, wanted)
        step = None if wide is None else self.region.step(node, wide)
        self.made[node] = usual if step is None else wide
        if step is None:
            self._fetch(node, wanted)
            step = self.region.step(node, usual)
        self.spared += self.region.halos.get(node, 0.0)
        self._take(node, step)

    def _several(self, node: fx.Node, parts: Sequence[fx.Node]) -> None:
        """An operator with several results, of which each may be wanted wider."""
        wanted = {part: self._wanted.pop(part, {}) for part in parts}
        wide: list[Any] = list(node.meta[LAYOUT])
        for part in parts:
            place = part.args[1]
            wide[place] = union([wide[place], *wanted[part]]) if wide[place] is not None else None  # type: ignore[index]
        step = None if None in wide else self.region.step(node, tuple(wide))
        self.made[node] = node.meta[LAYOUT] if step is None else tuple(wide)
        for part in parts:
            self.made[part] = self.made[node][part.args[1]]
            if step is None:
                self._fetch(part, wanted[part])
        self._take(node, step)


def _copies(target: object) -> bool:
    return ops.is_view(target) or target in (aten.clone.default, aten.cat.default, aten.stack.default)


@dataclass(frozen=True)
class Option:
    """A segment that may be: where it begins, seconds of its exchanges, and seconds and ticks of what it computes
    beyond the parts."""

    start: int
    exchanged: float
    computed: float
    work: int


def options(region: SpacedGraph, most: float) -> dict[int, list[Option]]:
    """By where they end all segments that may be worth it, with at most so many ticks of work beyond the parts, and in
    any case one: one that takes longer than a shorter one and the exchanges that are there before that is not."""
    cuts, found = {*region.cuts}, dict[int, list[Option]]()
    for stop in region.cuts[1:]:
        segment, those, bound = Segment(region, stop), found.setdefault(stop, []), math.inf
        while segment.start and segment.exchanged + segment.computed <= bound + segment.spared:
            segment.back()
            if segment.start in cuts:
                if those and segment.work > most:
                    break
                those.append(one := Option(segment.start, segment.exchanges(), segment.computed, segment.work))
                bound = min(bound, one.exchanged + one.computed - segment.spared)
    return found


def fewest(found: Mapping[int, Sequence[Option]], price: float) -> tuple[list[int], float, int]:
    """Where the segments of the least time begin, if what is computed beyond the parts counts so many times its time;
    their time, and the ticks of work beyond."""
    least, before = {0: 0.0}, dict[int, Option]()
    for stop, those in found.items():
        seconds = [least[one.start] + one.exchanged + price * one.computed for one in those]
        least[stop] = min(seconds)
        before[stop] = those[seconds.index(least[stop])]
    chosen, stop = list[Option](), max(least)
    while stop:
        chosen.append(before[stop])
        stop = chosen[-1].start
    time = sum(one.exchanged + one.computed for one in chosen)
    return [one.start for one in reversed(chosen)], time, sum(one.work for one in chosen)


def cut(region: SpacedGraph, starts: Sequence[int]) -> list[Segment]:
    """The segments that begin there."""
    found = []
    for start, stop in itertools.pairwise([*starts, len(region.nodes)]):
        segment = Segment(region, stop)
        while segment.start > start:
            segment.back()
        found.append(segment.close())
    return found
