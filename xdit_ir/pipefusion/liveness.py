"""The operators of a program in their order, block calls expanded: FLOPs, weights, and bytes alive between any two."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.partition import IntArray
from xdit_ir.ir.program import SPEC, Program, TensorSpec, call_parts, is_block_call, qualified
from xdit_ir.sharding.cost import is_counted, local_flops


@dataclass(frozen=True)
class ProgramValue:
    """A value of the expanded program: a node of the outer graph, or of the body of a call."""

    call: fx.Node | None
    node: fx.Node


@dataclass
class Liveness:
    """What a division of the operators into stages is judged by.

    `followed`: the values that depend on the sources. `place`: which operator makes a value. `flops[i]` and
    `weights[i]` (bytes): what operator i needs; what is not followed counts where a followed operator first needs it.
    `uses`: the operators that use a followed value. `alive[i]`: bytes of followed values that are made before operator
    i and used from there on.
    """

    entries: list[ProgramValue] = field(default_factory=list)
    place: dict[ProgramValue, int] = field(default_factory=dict)
    followed: set[ProgramValue] = field(default_factory=set)
    uses: dict[ProgramValue, list[int]] = field(default_factory=dict)
    flops: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    weights: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    alive: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def crossing(self) -> Iterator[tuple[int, list[int], int]]:
        """Followed tensors that are used: the operator that makes one, those that use it, and its bytes."""
        for value, uses in self.uses.items():
            spec: Any = value.node.meta.get(SPEC)
            if isinstance(spec, TensorSpec) and value in self.followed:
                yield self.place[value], uses, spec.nbytes


def liveness(program: Program, sources: Sequence[str]) -> Liveness:
    """Profile a program before any division; what depends on the outer values `sources` is followed."""
    return _Walk(program, frozenset(sources)).run()


class _Walk:
    def __init__(self, program: Program, sources: frozenset[str]) -> None:
        self.program, self.sources = program, sources
        self.result = Liveness()
        self.alias: dict[ProgramValue, ProgramValue] = {}
        self.results: dict[fx.Node, list[ProgramValue]] = {}

    def run(self) -> Liveness:
        for node in self.program.graph.nodes:
            if is_block_call(node):
                self._call(node)
            elif node.target is operator.getitem and node.args[0] in self.results:
                self.alias[ProgramValue(None, node)] = self.results[node.args[0]][node.args[1]]
            else:
                self._visit(ProgramValue(None, node))
        self._due()
        self._liveness()
        return self.result

    def _call(self, call: fx.Node) -> None:
        name, _, values = call_parts(call)
        given = iter(values)
        for node in self.program.blocks[name].graph.nodes:
            if node.op == "placeholder":
                self.alias[ProgramValue(call, node)] = self._source(ProgramValue(None, next(given)))
            elif node.op == "output":
                self.results[call] = [self._source(ProgramValue(call, value)) for value in operands(node)]
            else:
                self._visit(ProgramValue(call, node))

    def _source(self, value: ProgramValue) -> ProgramValue:
        return self.alias.get(value, value)

    def _inputs(self, value: ProgramValue) -> list[ProgramValue]:
        return [self._source(ProgramValue(value.call, source)) for source in operands(value.node)]

    def _visit(self, value: ProgramValue) -> None:
        here, node, inputs = len(self.result.entries), value.node, self._inputs(value)
        picks = node.target is operator.getitem
        self.result.entries.append(value)
        self.result.place[value] = self.result.place[inputs[0]] if picks else here
        outer = value.call is None and node.name in self.sources
        if outer or any(source in self.result.followed for source in inputs):
            self.result.followed.add(value)
        for source in inputs:
            self.result.uses.setdefault(source, []).append(here)

    def _due(self) -> None:
        """Sum up FLOPs and weights where they are first needed."""
        flops, weights = (np.zeros(len(self.result.entries), dtype=np.int64) for _ in range(2))
        due: dict[ProgramValue, int] = {}
        first: dict[str, int] = {}
        for place, value in reversed(list(enumerate(self.result.entries))):
            at = place if value in self.result.followed else due.get(value, place)
            for source in self._inputs(value):
                due[source] = min(at, due.get(source, at))
            if is_counted(value.node):
                flops[at] += local_flops(value.node, None)[0]
            elif value.node.op == "get_attr":
                name = self._weight(value)
                first[name] = min(at, first.get(name, at))
        for name, at in first.items():
            weights[at] += self.program.state[name].nbytes if name in self.program.state else 0
        self.result.flops, self.result.weights = flops, weights

    def _weight(self, value: ProgramValue) -> str:
        prefix = "" if value.call is None else call_parts(value.call)[1]
        return qualified(prefix, str(value.node.target))

    def _liveness(self) -> None:
        change = np.zeros(len(self.result.entries) + 1, dtype=np.int64)
        for made, uses, nbytes in self.result.crossing():
            change[made + 1] += nbytes
            change[uses[-1] + 1] -= nbytes
        self.result.alive = np.cumsum(change)


def boundaries(liveness: Liveness) -> Iterator[tuple[int, fx.Node]]:
    """Where the block calls that do followed work begin, and the calls."""
    seen: set[fx.Node] = set()
    for place, value in enumerate(liveness.entries):
        if value.call is not None and value.call not in seen and value in liveness.followed:
            first = next(i for i in range(place, -1, -1) if i == 0 or liveness.entries[i - 1].call is not value.call)
            seen.add(value.call)
            yield first, value.call
