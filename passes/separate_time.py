"""`separate-time`: what ranks exchange, what patches leave for each other, and what is computed once a step."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import map_graphs, operands, results_of
from xdit_ir.ir.layout import kind
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import LAYOUT, ONCE, Program, call_parts, is_block_call
from xdit_ir.pipefusion.patch_plan import is_divided_over_time, latents
from xdit_ir.sharding.buffer_access import before_time


@dataclass(frozen=True)
class SeparateTime:
    """Split every change of layout that talks over ranks and over time in two, and note what is computed once a step:
    what neither depends on the latents, nor is divided over time, nor made from what is. Numerics: exact.
    """

    mesh: Mesh
    name: str = "separate-time"

    def apply(self, program: Program) -> Program:
        """The program in which a change of layout talks either over ranks or over time."""
        if self.mesh.size((TIME,)) == 1:
            return program
        program = map_graphs(program, self._split)
        return _noted(program, self.mesh, latents(program, self.mesh))

    def _split(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if not ops.is_relayout(node.target) or node.target is ops.all_reduce:
                continue
            source = operands(node)[0]
            have, want = source.meta[LAYOUT], node.meta[LAYOUT]
            talk = kind(self.mesh, have, want)[1]
            if TIME not in talk or len(talk) == 1:
                continue
            between = before_time(self.mesh, have, want)
            (first, over_ranks), (then, over_time) = kind(self.mesh, have, between), kind(self.mesh, between, want)
            if TIME in over_ranks or over_time not in ((TIME,), ()):
                raise ParallelizeError(f"{node.name} cannot be exchanged over ranks first and over patches then")
            with graph.inserting_before(node):
                exchanged = graph.create_node(
                    "call_function", ops.RELAYOUTS[first], (source,), name=f"{source.name}_{first}"
                )
            exchanged.meta = node.meta | {LAYOUT: between}
            node.args = (exchanged,)
            node.target = ops.RELAYOUTS[then]


def _noted(program: Program, mesh: Mesh, inputs: frozenset[str]) -> Program:
    """A greatest fixed point: arguments of blocks count as known once unless some call says otherwise."""
    varying: dict[str, set[int]] = {name: set() for name in program.blocks}
    while True:
        before = sum(map(len, varying.values()))
        results = {name: _once(block.graph, mesh, varying[name], {}) for name, block in program.blocks.items()}
        outputs = {name: _outputs(program.blocks[name].graph, once) for name, once in results.items()}
        places = {i for i, node in enumerate(_placeholders(program.graph)) if node.name in inputs}
        outer = _once(program.graph, mesh, places, outputs)
        for node in program.calls:
            name, _, values = call_parts(node)
            varying[name] |= {i for i, value in enumerate(values) if value not in outer and value.op != "get_attr"}
        if sum(map(len, varying.values())) == before:
            break
    for once in (outer, *results.values()):
        for node in once:
            node.meta[ONCE] = any(user not in once for user in node.users)
    return program


def _placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder")


def _outputs(graph: fx.Graph, once: set[fx.Node]) -> list[bool]:
    return [value in once for value in results_of(graph)]


def _once(graph: fx.Graph, mesh: Mesh, varying: set[int], outputs: dict[str, list[bool]]) -> set[fx.Node]:
    inputs = enumerate(_placeholders(graph))
    found = {node for place, node in inputs if place not in varying and not is_divided_over_time(node, mesh)}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        if is_block_call(node):
            once = all(outputs[str(node.args[0])])
        elif node.target is operator.getitem and isinstance(source, fx.Node) and is_block_call(source):
            once = outputs[str(source.args[0])][node.args[1]]
        else:
            once = all(value in found or value.op == "get_attr" for value in operands(node))
        if once and not is_divided_over_time(node, mesh):
            found.add(node)
    return found
