"""Values that ranks share out: a stack of which each rank keeps its own computes nothing that only others keep."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import nodes_in, operands
from xdit_ir.ir.layout import part_of
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, called_block, is_block_call

STACK = torch.ops.aten.stack.default


def is_shared_out(node: fx.Node, mesh: Mesh) -> bool:
    """Whether a node keeps each rank's own of the values that are stacked for it, and of nothing else."""
    if node.target is not ops.shard:
        return False
    [stack] = operands(node)
    have, want = stack.meta[LAYOUT], node.meta[LAYOUT]
    if stack.target is not STACK or _dim(stack) != 0 or want.with_dims({0: have.dims[0]}) != have:
        return False
    return TIME not in mesh.dividing_dims(want.dims[0])


def kept(node: fx.Node, rank: int) -> list[fx.Node]:
    """The values that a rank keeps of those that are shared out."""
    [stack] = operands(node)
    values = nodes_in(stack.args[0])
    return [values[at] for at in part_of(node.meta[LAYOUT].dims[0], len(values), rank).array]


def ranks_needing(program: Program, mesh: Mesh) -> dict[fx.Node, list[bool]]:
    """Whether each rank computes a node, of the nodes of the outer graph that not all of them do.

    Inputs, outputs and what ranks do together all of them need.
    """
    shared = {node for node in program.graph.nodes if is_shared_out(node, mesh)}
    if not shared:
        return {}
    meeting = {name for name, block in program.blocks.items() if any(map(_is_common, block.graph.nodes))}
    everyone, ranks = (1 << mesh.world_size) - 1, range(mesh.world_size)
    needs: dict[fx.Node, int] = {}
    for node in reversed(program.graph.nodes):
        if node in shared:
            needs[node] = everyone
            for rank in ranks:
                _note(needs, kept(node, rank), 1 << rank)
        elif node.target is STACK and node.users.keys() <= shared:
            needs[node] = 0  # of which each rank makes its own
        else:
            together = node.op in ("placeholder", "output") or _is_common(node)
            common = together or (is_block_call(node) and called_block(node) in meeting)
            needs[node] = everyone if common else needs.get(node, 0)
            _note(needs, node.all_input_nodes, needs[node])
    return {node: [bool(bits >> rank & 1) for rank in ranks] for node, bits in needs.items() if bits != everyone}


def _is_common(node: fx.Node) -> bool:
    """Whether ranks do it together."""
    return ops.communicates(node.target) or node.target is ops.ring_attention


def _note(needs: dict[fx.Node, int], nodes: Iterable[fx.Node], ranks: int) -> None:
    for node in nodes:
        needs[node] = needs.get(node, 0) | ranks


def _dim(stack: fx.Node) -> int:
    dim = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(stack.meta[SPEC].shape)
