"""A program as a picture: boxes, edges, bodies, every value with its layout, origin and cost."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import fx

from xdit_ir.inspection.boxes import Group, module_of, owners, runs
from xdit_ir.inspection.model import BodyView, Box, Edge, ExchangeView, GraphView, ValueLine
from xdit_ir.ir.graphs import arguments_of, operands, results_of, weights_of
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.printer import arguments_text, node_type, target_name
from xdit_ir.ir.program import SPEC, Program, call_parts, is_block_call, where_of
from xdit_ir.rules.base import dividing_dims_of
from xdit_ir.sharding.buffer_access import over_time
from xdit_ir.sharding.cost import graph_flops, local_flops
from xdit_ir.sharding.layout_graph import FALLBACK
from xdit_ir.sharding.report import traffic

BUFFER = "buffer"


def view(program: Program, stages: Mapping[str, int] | None = None) -> GraphView:
    """The picture of a program; `stages` are those of outer nodes, by name, in a pipeline."""
    return _Viewer(program, stages).view()


def line(node: fx.Node, mesh: Mesh | None, *, in_time: bool) -> ValueLine:
    """One value. `in_time`: what changes a layout over `pipefusion` goes through a buffer."""
    where = where_of(node)
    op = "input" if node.op == "placeholder" else target_name(node.target)
    return ValueLine(
        name=node.name,
        op="result" if node.target is operator.getitem else op,
        args="" if node.op == "placeholder" else arguments_text(node),
        type=node_type(node, mesh),
        dims=dims_of(node, mesh),
        module=where.module,
        source=where.source,
        flops=max(local_flops(node, mesh)),
        exchange=exchange(node, mesh, in_time=in_time) if mesh is not None else None,
        fallback=node.meta.get(FALLBACK, ""),
    )


def exchange(node: fx.Node, mesh: Mesh, *, in_time: bool) -> ExchangeView | None:
    """What a node sends, or that it meets other patches in a buffer; None for what is local."""
    if in_time and node.op == "call_function" and over_time(node, mesh):
        return ExchangeView(BUFFER, TIME, 0)
    found = traffic(node, mesh)
    return None if found is None else ExchangeView(*found[0], max(found[1]))


def dims_of(node: fx.Node, mesh: Mesh | None) -> tuple[str, ...]:
    """The mesh dims along which ranks hold different parts of a value."""
    return () if mesh is None else mesh.ordered(dividing_dims_of(node, mesh))


class _Viewer:
    def __init__(self, program: Program, stages: Mapping[str, int] | None) -> None:
        self.program, self.stages, self.mesh = program, stages or {}, program.mesh
        self.in_time = stages is not None
        self.owner = owners(program, self.stages)
        self.ids = {group: group[0].name for group in self.owner.values()}
        self.bodies = {name: self._body(name) for name in program.blocks}

    def _line(self, node: fx.Node) -> ValueLine:
        return line(node, self.mesh, in_time=self.in_time)

    def _dims(self, several: Iterable[Sequence[str]]) -> tuple[str, ...]:
        return () if self.mesh is None else self.mesh.ordered(set().union(*several))

    def view(self) -> GraphView:
        edges = self._edges()
        boxes = [self._box(group) for group in dict.fromkeys(self.owner.values())]
        kinds = {box.id: kind for box in boxes if (kind := _kind(box)) is not None}
        joined = runs(kinds, [(edge.source, edge.target) for edge in edges])
        return GraphView([replace(box, run=joined.get(box.id, -1)) for box in boxes], edges, self.bodies)

    def _body(self, name: str) -> BodyView:
        graph = self.program.blocks[name].graph
        calls = [node for node in self.program.calls if node.args[0] == name]
        weights = [node.meta[SPEC].nbytes for node in weights_of(graph).values()]
        return BodyView(
            name,
            len(calls),
            [self._line(node) for node in arguments_of(graph)],
            [self._line(node) for node in graph.nodes if node.op == "call_function"],
            [node.name for node in results_of(graph)],
            max(graph_flops(graph, self.mesh)),
            sum(weights),
        )

    def _box(self, group: Group) -> Box:
        first = group[0]
        stage = self.stages.get(first.name, -1)
        if is_block_call(first):
            name, prefix, *_ = call_parts(first)
            body = self.bodies[name]
            sent = sum(one.exchange.bytes for one in body.lines if one.exchange)
            results = [self._line(node) for node in group[1:]]
            dims = self._dims(one.dims for one in results)
            return Box(first.name, "call", prefix, name, -1, stage, dims, body.flops, sent, results)
        if first.op == "output":
            results = [self._line(node) for node in operands(first)]
            return Box("output", "output", "output", stage=stage, lines=results)
        lines = [self._line(node) for node in group]
        dims = self._dims(one.dims for one in lines)
        if first.op == "placeholder":
            return Box(first.name, "input", first.name, stage=-1, dims=dims, lines=lines)
        flops = sum(one.flops for one in lines)
        sent = sum(one.exchange.bytes for one in lines if one.exchange)
        title = _title(lines)
        return Box(first.name, "operators", title, stage=stage, dims=dims, flops=flops, sent=sent, lines=lines)

    def _edges(self) -> list[Edge]:
        found: dict[tuple[Group, Group], dict[str, fx.Node]] = {}
        for node, group in self.owner.items():
            for source in node.all_input_nodes:
                if source in self.owner and self.owner[source] is not group:
                    found.setdefault((self.owner[source], group), {})[source.name] = source
        return [
            Edge(
                "output" if source[0].op == "output" else self.ids[source],
                "output" if target[0].op == "output" else self.ids[target],
                [f"%{name}: {node_type(node, self.mesh)}" for name, node in nodes.items()],
                self._dims(dims_of(node, self.mesh) for node in nodes.values()),
            )
            for (source, target), nodes in found.items()
        ]


def _kind(box: Box) -> Hashable | None:
    """What boxes have in common that may be shown as one: calls of a block, or the same operators of several layers."""
    if box.kind == "call":
        return box.block, box.stage
    layers, _, number = box.title.rpartition(".")
    if box.kind != "operators" or not number.isdigit():
        return None
    return layers, tuple(line.op for line in box.lines), box.stage


def _title(lines: Sequence[ValueLine]) -> str:
    """The modules of some operators; where they are the model's own, what they are."""
    modules = list(dict.fromkeys(module_of(one.module) for one in lines if one.module))
    if modules:
        return ", ".join(modules[:2]) + (", ..." if len(modules) > 2 else "")
    ops = list(dict.fromkeys(one.op.partition(".")[0] for one in lines))
    return ", ".join(ops[:2]) + (", ..." if len(ops) > 2 else "")
