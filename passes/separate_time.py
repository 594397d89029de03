"""`separate-time`: what ranks exchange, what patches leave for each other, and what is computed once a step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.dataflow import reach
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.flops import counts
from xdit_ir.ir.graphs import OUTER, all_graphs, map_graphs, operands, placeholders
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import LAYOUT, SCOPE, SPEC, ComputeScope, Program, is_block_call, is_weight
from xdit_ir.ir.relayout import kind
from xdit_ir.passes.emit import Emitter
from xdit_ir.pipefusion.latents import latents
from xdit_ir.sharding.buffer_access import before_time, is_divided_over_time


@dataclass(frozen=True)
class SeparateTime:
    """Split every change of layout that talks over ranks and over time in two, and note what is computed once a step:
    what neither depends on the latents, nor is divided over time, nor made from what is. Weights that were quantised
    are made larger again for each patch.
    """

    name: ClassVar[str] = "separate-time"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    mesh: Mesh

    def apply(self, program: Program) -> Program:
        """The program in which a change of layout talks either over ranks or over time."""
        if self.mesh.size((TIME,)) == 1:
            return program
        program = map_graphs(program, self._split)
        return _noted(program, self.mesh, latents(program, self.mesh))

    def _split(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if not ops.is_relayout(node.target) or node.target in ops.SUMS:
                continue
            source = operands(node)[0]
            have, want = source.meta[LAYOUT], node.meta[LAYOUT]
            talk = kind(self.mesh, have, want)[1]
            if TIME not in talk or len(talk) == 1:
                continue
            between = before_time(self.mesh, have, want)
            (_, over_ranks), (then, over_time) = kind(self.mesh, have, between), kind(self.mesh, between, want)
            if TIME in over_ranks or over_time not in ((TIME,), ()):
                raise ParallelizeError(f"{node.name} cannot be exchanged over ranks first and over patches then")
            node.args = (Emitter(graph, node, self.mesh).relayout(source, between),)
            node.target = ops.RELAYOUTS[then]


def _noted(program: Program, mesh: Mesh, inputs: Collection[str]) -> Program:
    """What neither the latents nor a division over time reach is computed once a step, unless it is made again."""
    graphs = {name: graph for name, graph, _ in all_graphs(program)}
    seeds = {name: {node for node in graph.nodes if is_divided_over_time(node, mesh)} for name, graph in graphs.items()}
    seeds[OUTER] |= {node for node in placeholders(program.graph) if node.name in inputs}
    varying = reach(program, seeds)
    for name, graph in graphs.items():
        again = _made_again(graph)
        once = {n for n in graph.nodes if n.op != "output" and not is_weight(n) and n not in varying[name] | again}
        for node in once:
            shared = any(user not in once for user in node.users)
            node.meta[SCOPE] = ComputeScope.SHARED if shared else ComputeScope.FIRST_PATCH
    return program


def _made_again(graph: fx.Graph) -> set[fx.Node]:
    """What follows from weights alone, without a product, and is a view of them or larger, as those are that were
    quantised: to keep it for other patches would take the memory that the weights do not."""
    weights: dict[fx.Node, set[fx.Node]] = {}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if is_weight(node):
            weights[node] = {node}
        elif sources and node.op == "call_function" and not _is_work(node) and all(x in weights for x in sources):
            weights[node] = {weight for source in sources for weight in weights[source]}
            view = ops.is_view(node.target) and all(is_weight(x) or x in found for x in sources)
            if view or _nbytes(node) > sum(map(_nbytes, weights[node])):
                found.add(node)
    for node in reversed(weights):
        if not is_weight(node) and any(user in found for user in node.users):
            found.add(node)
    return found


def _is_work(node: fx.Node) -> bool:
    return counts(node.target) or ops.communicates(node.target) or ops.is_relayout(node.target) or is_block_call(node)


def _nbytes(node: fx.Node) -> int:
    specs = node.meta[SPEC]
    return sum(spec.nbytes for spec in (specs if isinstance(specs, tuple) else (specs,)))
