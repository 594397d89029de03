"""One rank's program: static local sizes, local operators, communication with named peers."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.collective_ops import AllGather, Reduce, ReduceScatter, Reshuffle, Ring
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import add_node, copy_node, drop_unused_weights, fit_calls, operands, with_operands
from xdit_ir.ir.layout import Layout, part_of
from xdit_ir.ir.mesh import FEATURES, TIME, Mesh
from xdit_ir.ir.partition import Indices
from xdit_ir.ir.program import CONSTANT, SCOPE, SPEC, WEIGHT, WHERE, Program, TensorSpec, is_block_call
from xdit_ir.ir.program import LAYOUT as LAYOUT
from xdit_ir.ir.relayout import kind, plan, scatter_plan
from xdit_ir.ir.stored import held_by, source_of
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall
from xdit_ir.sharding.buffer_access import buffer_layout, read_of, write_of
from xdit_ir.sharding.cost import ring_dims
from xdit_ir.sharding.shared_out import STACK, is_shared_out, kept, ranks_needing

aten = torch.ops.aten
# Fewer are copied one by one.
MOST_RUNS = 64


@dataclass(frozen=True)
class Specialize:
    """Make the program of one rank of a program with layouts: sizes become local, changes of layout become exchanges
    with named peers, and operators are told which part they work on."""

    name: ClassVar[str] = "specialize"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.LAYOUTS, Fact.ATTENTION, Fact.RUNNABLE})

    rank: int

    def apply(self, program: Program) -> Program:
        """The rank's program; a node keeps the name of the node that it was made from."""
        assert program.mesh is not None
        others = {node for node, ranks in ranks_needing(program, program.mesh).items() if not ranks[self.rank]}
        graph = _localize(program.graph, program.mesh, self.rank, others)
        blocks = {
            name: replace(block, graph=_localize(block.graph, program.mesh, self.rank))
            for name, block in program.blocks.items()
        }
        if program.mesh.size(FEATURES) > 1:  # what is added to a sum once, another rank adds
            for block in blocks.values():
                drop_unused_weights(block.graph)
            fit_calls(graph, blocks)
        constants = dict(program.constants)
        for one in (graph, *(block.graph for block in blocks.values())):
            _index_scattered(one, constants, program.device)
        facts = program.facts - self.invalidates | self.provides
        stored = dict(program.stored)
        for node in program.graph.find_nodes(op="get_attr"):
            if (name := str(node.target)) in stored:
                stored[name] = held_by(stored[name], node.meta[LAYOUT], self.rank)
        made = program.replace(graph=graph, blocks=blocks, facts=facts, constants=constants, stored=stored)
        return made.with_graph(graph) if others else made


def _index_scattered(graph: fx.Graph, constants: dict[str, torch.Tensor], device: torch.device) -> None:
    """Places in very many runs are read and written by one kernel, which has them as a constant."""
    for node in list(graph.nodes):
        runs = node.args[-1] if node.target in (ops.take, ops.put) else ()
        if len(runs) > MOST_RUNS:
            index = torch.from_numpy(Indices(tuple(runs)).array)
            index = index if device.type == "meta" else index.to(device)
            name = next((name for name, known in constants.items() if _same(known, index)), f"places_{len(constants)}")
            constants[name] = index
            with graph.inserting_before(node):
                held = graph.get_attr(f"{CONSTANT}.{name}")
            held.meta = {SPEC: TensorSpec(tuple(index.shape), index.dtype), WHERE: node.meta[WHERE]}
            *values, dim, _ = node.args
            target = aten.index_select.default if node.target is ops.take else aten.index_copy.default
            node.target, node.args = target, (values[0], dim, held, *values[1:])


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)


def _localize(graph: fx.Graph, mesh: Mesh, rank: int, others: Collection[fx.Node] = ()) -> fx.Graph:
    """What a rank does of a graph, in which `others` are what other ranks do."""
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in others:
            continue
        env[node] = new = _node(node, env, result, mesh, rank)
        new.meta.clear()
        new.meta.update((key, node.meta[key]) for key in (WHERE, WEIGHT, SCOPE) if key in node.meta)
        if LAYOUT in node.meta:
            new.meta[SPEC] = local_spec(node, rank)
    return result


def local_spec(node: fx.Node, rank: int) -> Any:
    """Shape and dtype on one rank."""

    def one(spec: TensorSpec, layout: Layout) -> TensorSpec:
        return spec.on(layout, rank)

    spec, layout = node.meta[SPEC], node.meta[LAYOUT]
    if isinstance(spec, TensorSpec):
        return one(spec, layout)
    return tuple(one(s, where) for s, where in zip(spec, layout, strict=True))


def _node(node: fx.Node, env: dict[fx.Node, fx.Node], graph: fx.Graph, mesh: Mesh, rank: int) -> fx.Node:
    if node.op != "call_function" or node.target is operator.getitem or is_block_call(node):
        return copy_node(graph, node, env.__getitem__)
    if is_shared_out(node, mesh):
        return _stacked(node, [env[value] for value in kept(node, rank)], graph, rank)
    if ops.is_relayout(node.target):
        return _relayout(node, env[operands(node)[0]], graph, mesh, rank)
    if node.target is ops.ring_attention:
        return _ring(node, env, graph, mesh, rank)
    layouts = tuple(source.meta[LAYOUT] for source in operands(node))
    sharding = infer(OpCall(node, mesh, layouts))
    target, args, kwargs = node.target, node.args, node.kwargs
    if sharding.local is not None:
        target, args, kwargs = sharding.local(rank)
    args, kwargs = fx.map_arg((args, kwargs), env.__getitem__)
    return add_node(graph, "call_function", target, args, kwargs, node.name)


def _stacked(node: fx.Node, values: list[fx.Node], graph: fx.Graph, rank: int) -> fx.Node:
    """What a rank keeps of the values that are shared out; it may be none of them."""
    if values:
        return add_node(graph, "call_function", STACK, (values, 0), {}, node.name)
    spec, some = local_spec(node, rank), next(iter(graph.find_nodes(op="placeholder")))
    made = (some, list(spec.shape)), {"dtype": spec.dtype}
    return add_node(graph, "call_function", aten.new_empty.default, *made, node.name)


def _relayout(node: fx.Node, value: fx.Node, graph: fx.Graph, mesh: Mesh, rank: int) -> fx.Node:
    source = operands(node)[0]
    have, want, shape = source.meta[LAYOUT], node.meta[LAYOUT], node.meta[SPEC].shape
    if node.target is ops.all_reduce:
        return _reduce(node, value, graph, mesh, rank)
    if node.target is ops.reduce_scatter:
        found = scatter_plan(mesh, shape, have, want)
        summed = ReduceScatter(found.kind, found.mesh_dims, found.ranks[rank].group, found.ranks[rank])
        return graph.create_node("call_function", summed, (value,), name=node.name)
    if kind(mesh, have, want)[1] == (TIME,):
        layout = buffer_layout(mesh, have)
        wrote = _wrote(source, value, graph, write_of(source, layout, mesh, rank))
        return graph.create_node("call_function", read_of(node, layout, mesh, rank), (wrote,), name=node.name)
    steps = plan(mesh, shape, have, want)
    if node.target is ops.shard:
        return _shard(node, value, graph, have, want, rank)
    group = mesh.group(rank, steps.mesh_dims)
    equal = source_of(source).op == "get_attr" and _is_equal(mesh, have, want)
    change = AllGather if equal else Reshuffle
    target = change(steps.kind, steps.mesh_dims, group, steps.ranks[rank])
    return graph.create_node("call_function", target, (value,), name=node.name)


def _is_equal(mesh: Mesh, have: Layout, want: Layout) -> bool:
    """Whether every rank gathers equal parts of the first dimension, in the order of ranks."""
    first = have.dims[0] if have.dims else None
    if first is None or want != have.with_dims({0: None}) or not first.sizes[0]:
        return False
    even = mesh.divide(first.size, mesh.dividing_dims(first))
    return first == even and len(set(first.sizes)) == 1


def _reduce(node: fx.Node, value: fx.Node, graph: fx.Graph, mesh: Mesh, rank: int) -> fx.Node:
    """Sum over ranks, then over patches."""
    source = operands(node)[0]
    pending: frozenset[str] = source.meta[LAYOUT].partial
    dims = mesh.ordered(pending - {TIME})
    if dims:
        target: Any = Reduce("all_reduce", dims, mesh.group(rank, dims))
        name = in_space(node) if TIME in pending else node.name
        value = graph.create_node("call_function", target, (value,), name=name)
        value.meta[SPEC] = local_spec(source, rank)
    if TIME in pending:
        wrote = _wrote(source, value, graph, write_of(source, None, mesh, rank))
        value = graph.create_node("call_function", read_of(node, None, mesh, rank), (wrote,), name=node.name)
    return value


def in_space(node: fx.Node) -> str:
    """The name of a sum over ranks, before that over patches."""
    return f"{node.name}_space"


def _wrote(source: fx.Node, value: fx.Node, graph: fx.Graph, target: Any) -> fx.Node:
    """The node that writes a value to its buffer; all readers share it."""
    for user in value.users:
        if user.target == target:
            return user
    wrote = graph.create_node("call_function", target, (value,), name=f"{source.name}_write")
    wrote.meta[SPEC] = value.meta[SPEC]
    return wrote


def _shard(node: fx.Node, value: fx.Node, graph: fx.Graph, have: Layout, want: Layout, rank: int) -> fx.Node:
    shape = node.meta[SPEC].shape
    moved = [dim for dim in range(len(shape)) if have.dims[dim] != want.dims[dim]]
    for place, dim in enumerate(moved):
        held, wanted = (part_of(layout.dims[dim], shape[dim], rank) for layout in (have, want))
        name = node.name if place == len(moved) - 1 else f"{node.name}_along{dim}"
        dims = [want.dims[d] if d <= dim else have.dims[d] for d in range(len(shape))]
        value = graph.create_node("call_function", ops.take, (value, dim, held.positions(wanted).runs), name=name)
        value.meta[SPEC] = TensorSpec(Layout(tuple(dims)).local_shape(shape, rank), node.meta[SPEC].dtype)
    return value


def _ring(node: fx.Node, env: dict[fx.Node, fx.Node], graph: fx.Graph, mesh: Mesh, rank: int) -> fx.Node:
    keys, dims = operands(node)[1].meta[LAYOUT].dims[-2], ring_dims(node, mesh)
    group = mesh.group(rank, dims)
    target: Any = Ring("ring_attention", dims, group, tuple(keys.sizes[member] for member in group))
    args, kwargs = with_operands(node, [env[source] for source in operands(node)])
    return graph.create_node("call_function", target, args, kwargs, name=node.name)
