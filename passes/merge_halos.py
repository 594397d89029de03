"""`merge-halos`: one wider halo ahead of several windows, whose ranks compute the rows at their edges themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.halo_ports import Merging
from xdit_ir.passes.widening import Widening, is_halo
from xdit_ir.sharding.machine import Machine


@dataclass(frozen=True)
class MergeHalos:
    """Fetch one wider halo ahead of several windows (convolutions, pooling) and of what lies between them row by row,
    and let each rank compute the rows at the edges of its part that the next window needs, where that takes less time
    on the machine than their exchanges; what others take of such values is cut out of them. Statistics over all rows
    are taken of a rank's own; what cannot be computed wider (attention, most reshapes) is fetched. Caches that blocks
    hand from call to call become as wide as they are used. No rank's work grows by more than the part `growth`.
    """

    name: ClassVar[str] = "merge-halos"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    machine: Machine = field(default_factory=Machine)
    growth: float = 0.02

    def apply(self, program: Program) -> Program:
        """The program with fewer exchanges; as it is where none are to be saved."""
        mesh, graphs = program.mesh, [graph for _, graph, _ in all_graphs(program)]
        if mesh is None or not any(is_halo(node) for graph in graphs for node in graph.nodes):
            return program
        most = self.growth * self._work(program, mesh)
        return Merging(program, Widening(mesh, self.machine), most).best().write()

    def _work(self, program: Program, mesh: Mesh) -> int:
        """Ticks of work of the slowest rank."""
        total = [0] * mesh.world_size
        for _, graph, times in all_graphs(program):
            for node in graph.nodes:
                total = [a + times * b for a, b in zip(total, self.machine.node_work(node, mesh), strict=True)]
        return max(total)
