"""The operators of a program in their order, block calls expanded: work, weights, and bytes alive between any two."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from xdit_ir.ir.dataflow import Expanded, ProgramValue
from xdit_ir.ir.partition import IntArray
from xdit_ir.ir.program import SPEC, Program, TensorSpec
from xdit_ir.sharding.machine import H100, Machine


@dataclass
class Liveness:
    """What a division of the operators into stages is judged by.

    `followed`: the values that depend on the sources. `place`: which operator makes a value. `work[i]` (ticks of a
    machine) and `weights[i]` (bytes): what operator i needs; what is not followed counts where a followed operator
    first needs it. `uses`: the operators that use a followed value. `alive[i]`: bytes of followed values that are made
    before operator i and used from there on.
    """

    entries: list[ProgramValue] = field(default_factory=list)
    place: dict[ProgramValue, int] = field(default_factory=dict)
    followed: set[ProgramValue] = field(default_factory=set)
    uses: dict[ProgramValue, list[int]] = field(default_factory=dict)
    work: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    weights: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    alive: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def crossing(self) -> Iterator[tuple[int, list[int], int]]:
        """Followed tensors that are used: the operator that makes one, those that use it, and its bytes."""
        for value, uses in self.uses.items():
            spec: Any = value.node.meta.get(SPEC)
            if isinstance(spec, TensorSpec) and value in self.followed:
                yield self.place[value], uses, spec.nbytes


def liveness(program: Program, sources: Sequence[str], machine: Machine = H100) -> Liveness:
    """Profile a program before any division; what depends on the outer values `sources` is followed."""
    return _Walk(program, frozenset(sources), machine).run()


class _Walk:
    def __init__(self, program: Program, sources: frozenset[str], machine: Machine) -> None:
        self.machine = machine
        self.program, self.expanded, self.sources = program, Expanded(program), sources
        self.result = Liveness()

    def run(self) -> Liveness:
        for value in self.expanded:
            self._visit(value)
        self._due()
        self._liveness()
        return self.result

    def _visit(self, value: ProgramValue) -> None:
        here, node, inputs = len(self.result.entries), value.node, self.expanded.sources(value)
        picks = node.target is operator.getitem
        self.result.entries.append(value)
        self.result.place[value] = self.result.place[inputs[0]] if picks else here
        outer = value.call is None and node.name in self.sources
        if outer or any(source in self.result.followed for source in inputs):
            self.result.followed.add(value)
        for source in inputs:
            self.result.uses.setdefault(source, []).append(here)

    def _due(self) -> None:
        """Sum up work and weights where they are first needed."""
        work, weights = (np.zeros(len(self.result.entries), dtype=np.int64) for _ in range(2))
        due: dict[ProgramValue, int] = {}
        first: dict[str, int] = {}
        for place, value in reversed(list(enumerate(self.result.entries))):
            at = place if value in self.result.followed else due.get(value, place)
            for source in self.expanded.sources(value):
                due[source] = min(at, due.get(source, at))
            work[at] += self.machine.node_work(value.node, None)[0]
            if value.node.op == "get_attr":
                name = str(value.node.target)
                first[name] = min(at, first.get(name, at))
        for name, at in first.items():
            weights[at] += self.program.state[name].nbytes if name in self.program.state else 0
        self.result.work, self.result.weights = work, weights

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
