"""What a program costs: floating-point operations and bytes sent, per rank, from layouts alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.collective_ops import Assembly
from xdit_ir.ir.flops import counts, first_of, flops_as, is_counted, node_flops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout, key_gather_dims
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TensorSpec, called_block
from xdit_ir.ir.relayout import kind, plan, scatter_plan
from xdit_ir.sharding.shared_out import ranks_needing

Placed = tuple[TensorSpec, Layout]
Results = tuple[Any, Any]


def step_flops(node: fx.Node, target: Any, sources: Sequence[Placed], out: Results, mesh: Mesh) -> list[int]:
    """FLOPs per rank of an operator on values of these types and layouts; nothing where none are counted.

    An attention meets all keys, whoever has them before it is lowered.
    """
    if not counts(target):
        return []
    total = []
    spec, layout = map(first_of, out)
    for rank in range(mesh.world_size):
        shapes = [where.local_shape(one.shape, rank) for one, where in sources]
        if target in ops.ATTENTIONS:
            shapes[1] = sources[1][0].shape
        total.append(flops_as(node, target, shapes, layout.local_shape(spec.shape, rank)))
    return total


def graph_flops(graph: fx.Graph, mesh: Mesh | None) -> list[int]:
    """FLOPs per rank of a graph with layouts, block calls aside; without a mesh: of one device, as a single entry."""
    total = [0] * (mesh.world_size if mesh else 1)
    for node in graph.nodes:
        if is_counted(node):
            total = [a + b for a, b in zip(total, local_flops(node, mesh), strict=True)]
    return total


def local_flops(node: fx.Node, mesh: Mesh | None) -> list[int]:
    """FLOPs per rank of one node that is no block call."""
    if mesh is None:
        return [node_flops(node)]
    if not is_counted(node):
        return [0] * mesh.world_size
    placed = [(source.meta[SPEC], source.meta[LAYOUT]) for source in operands(node)]
    return step_flops(node, node.target, placed, (node.meta[SPEC], node.meta[LAYOUT]), mesh)


def outer_flops(program: Program, mesh: Mesh | None) -> dict[fx.Node, list[int]]:
    """FLOPs per rank (one entry without a mesh) of every block call, and of all else in the outer graph that counts."""
    bodies = {name: graph_flops(block.graph, mesh) for name, block in program.blocks.items()}
    others = {node: local_flops(node, mesh) for node in program.graph.nodes if is_counted(node)}
    found = {call: bodies[called_block(call)] for call in program.calls} | others
    needing = {} if mesh is None else ranks_needing(program, mesh)
    for node in found.keys() & needing.keys():
        found[node] = [flops if needed else 0 for flops, needed in zip(found[node], needing[node], strict=True)]
    return found


def program_flops(program: Program, mesh: Mesh | None) -> list[int]:
    """FLOPs per rank of a whole program (one entry without a mesh)."""
    none = [0] * (mesh.world_size if mesh else 1)
    return list(map(sum, zip(none, *outer_flops(program, mesh).values(), strict=True)))


def relayout_bytes(node: fx.Node, mesh: Mesh) -> tuple[int, ...]:
    """Bytes that each rank sends in one change of layout."""
    return relayout_sent(node.target, node.meta[SPEC], operands(node)[0].meta[LAYOUT], node.meta[LAYOUT], mesh)


def talking_dims(node: fx.Node, mesh: Mesh) -> tuple[str, ...]:
    """The mesh dims along which ranks talk in one change of layout."""
    return relayout_dims(node.target, operands(node)[0].meta[LAYOUT], node.meta[LAYOUT], mesh)


def relayout_dims(target: Any, have: Layout, want: Layout, mesh: Mesh) -> tuple[str, ...]:
    """The same by layouts."""
    return mesh.ordered(have.partial - want.partial) if target in ops.SUMS else kind(mesh, have, want)[1]


def relayout_sent(target: Any, spec: TensorSpec, have: Layout, want: Layout, mesh: Mesh) -> tuple[int, ...]:
    """The same by type and layouts; an all-reduce as a ring reduce-scatter and all-gather."""
    if target is ops.all_reduce:
        count = mesh.size(have.partial - want.partial)
        shapes = (want.local_shape(spec.shape, rank) for rank in range(mesh.world_size))
        return tuple(2 * math.prod(s) * spec.dtype.itemsize * (count - 1) // count for s in shapes)
    found = scatter_plan if target is ops.reduce_scatter else plan
    return found(mesh, spec.shape, have, want).sent(spec.dtype.itemsize)


@lru_cache(maxsize=8192)
def relayout_pieces(mesh: Mesh, shape: tuple[int, ...], have: Layout, want: Layout) -> int:
    """Pieces of other ranks that the busiest rank puts in their places one by one, as they lie beside each other along
    several dims; none where they follow each other along one."""
    if sum(a != b for a, b in zip(have.dims, want.dims, strict=True)) < 2:
        return 0
    apart = (one for one in plan(mesh, shape, have, want).ranks if len(Assembly.of(one).varied) > 1)
    return max((sum(map(bool, map(math.prod, one.shapes))) - 1 for one in apart), default=0)


def partners(node: fx.Node, mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """Of every rank those that it sends something to in a change of layout, and itself; all that talk, in a sum."""
    if node.target in ops.SUMS:
        return tuple(mesh.group(rank, talking_dims(node, mesh)) for rank in range(mesh.world_size))
    exchanges = plan(mesh, node.meta[SPEC].shape, operands(node)[0].meta[LAYOUT], node.meta[LAYOUT]).ranks
    return tuple(
        tuple(peer for peer, piece in zip(one.group, one.sends, strict=True) if peer == rank or piece.numel)
        for rank, one in enumerate(exchanges)
    )


def ring_dims(node: fx.Node, mesh: Mesh) -> tuple[str, ...]:
    """The mesh dims around which a ring attention passes its keys and values, outer to inner."""
    return mesh.ordered(key_gather_dims(mesh, *(source.meta[LAYOUT] for source in operands(node)[:2])))


def ring_bytes(node: fx.Node, mesh: Mesh) -> tuple[int, ...]:
    """Bytes of keys and values that each rank passes on around the ring."""
    total = [0] * mesh.world_size
    dims = ring_dims(node, mesh)
    for source in operands(node)[1:3]:
        spec, layout = source.meta[SPEC], source.meta[LAYOUT]
        for rank in range(mesh.world_size):
            group = mesh.group(rank, dims)
            at = group.index(rank)
            hops = (group[(at - hop) % len(group)] for hop in range(len(group) - 1))
            total[rank] += sum(spec.on(layout, peer).nbytes for peer in hops)
    return tuple(total)


def written_bytes(node: fx.Node, mesh: Mesh) -> list[int]:
    """Bytes of the result on every rank; nothing for a view."""
    spec = node.meta[SPEC]
    if not isinstance(spec, TensorSpec) or ops.is_view(node.target):
        return [0] * mesh.world_size
    return [spec.on(node.meta[LAYOUT], rank).nbytes for rank in range(mesh.world_size)]
