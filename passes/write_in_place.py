"""`write-in-place`: a tensor that is made to be filled is filled where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs
from xdit_ir.ir.program import Program
from xdit_ir.kernels.write_slice import write_slice, writes_into_fresh


@dataclass(frozen=True)
class WriteInPlace:
    """A write into a part of a value that has just been made, and that nothing else reads, needs no copy of it. It is
    the one operator of a rank's program that changes its operand.
    """

    name: ClassVar[str] = "write-in-place"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    def apply(self, program: Program) -> Program:
        """The program with such writes in place."""
        return map_graphs(program, _rewrite)


def _rewrite(graph: fx.Graph) -> None:
    for node in [node for node in graph.nodes if writes_into_fresh(node)]:
        node.target = write_slice
