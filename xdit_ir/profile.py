"""The operators of a program in their order, block calls expanded: FLOPs, and bytes alive between any two of them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from xdit_ir.cost import is_counted, local_flops
from xdit_ir.partition import IntArray
from xdit_ir.program import SPEC, Program, TensorSpec, call_parts, is_block_call
from xdit_ir.rules.base import operands


@dataclass(frozen=True)
class Value:
    """A value of the expanded program: a node of the outer graph, or of the body of a call."""

    call: fx.Node | None
    node: fx.Node


@dataclass
class Profile:
    """`flops[i]` of operator i; `alive[i]`: bytes of followed values that exist before operator i and are used from
    there on; `place`: which operator makes a value; `followed`: the values that depend on the sources."""

    entries: list[Value] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    alive: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    place: dict[Value, int] = field(default_factory=dict)
    followed: set[Value] = field(default_factory=set)


def profile(program: Program, sources: Sequence[str]) -> Profile:
    """Profile a program before any division; what depends on the outer values `sources` is followed."""
    return _Walk(program, frozenset(sources)).run()


class _Walk:
    def __init__(self, program: Program, sources: frozenset[str]) -> None:
        self.program, self.sources = program, sources
        self.result = Profile()
        self.alias: dict[Value, Value] = {}
        self.results: dict[fx.Node, list[Value]] = {}
        self.last: dict[Value, int] = {}

    def run(self) -> Profile:
        for node in self.program.graph.nodes:
            if is_block_call(node):
                self._call(node)
            elif node.target is operator.getitem and node.args[0] in self.results:
                self.alias[Value(None, node)] = self.results[node.args[0]][node.args[1]]
            else:
                self._visit(Value(None, node))
        self._liveness()
        return self.result

    def _call(self, call: fx.Node) -> None:
        name, _, values = call_parts(call)
        given = iter(values)
        for node in self.program.blocks[name].graph.nodes:
            if node.op == "placeholder":
                self.alias[Value(call, node)] = self._source(Value(None, next(given)))
            elif node.op == "output":
                self.results[call] = [self._source(Value(call, value)) for value in operands(node)]
            else:
                self._visit(Value(call, node))

    def _source(self, value: Value) -> Value:
        return self.alias.get(value, value)

    def _visit(self, value: Value) -> None:
        here, node = len(self.result.entries), value.node
        inputs = [self._source(Value(value.call, source)) for source in operands(node)]
        picks = node.target is operator.getitem
        self.result.entries.append(value)
        self.result.place[value] = self.result.place[inputs[0]] if picks else here
        self.result.flops.append(_flops(node))
        outer = value.call is None and node.name in self.sources
        if outer or any(source in self.result.followed for source in inputs):
            self.result.followed.add(value)
        for source in inputs:
            self.last[source] = here

    def _liveness(self) -> None:
        change = np.zeros(len(self.result.entries) + 1, dtype=np.int64)
        for value in self.result.followed:
            spec: Any = value.node.meta.get(SPEC)
            if isinstance(spec, TensorSpec) and value in self.last:
                change[self.result.place[value] + 1] += spec.nbytes
                change[self.last[value] + 1] -= spec.nbytes
        self.result.alive = np.cumsum(change)


def _flops(node: fx.Node) -> int:
    return local_flops(node, None)[0] if is_counted(node) else 0


def boundaries(profile: Profile) -> Iterator[tuple[int, fx.Node]]:
    """Where the block calls that do followed work begin, and the calls."""
    seen: set[fx.Node] = set()
    for place, value in enumerate(profile.entries):
        if value.call is not None and value.call not in seen and value in profile.followed:
            first = next(i for i in range(place, -1, -1) if i == 0 or profile.entries[i - 1].call is not value.call)
            seen.add(value.call)
            yield first, value.call
