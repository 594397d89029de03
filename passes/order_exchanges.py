"""`order-exchanges`: exchanges around attention move tensors in the order in which projections write and read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from xdit_ir import ops
from xdit_ir.layout import Layout
from xdit_ir.passes.base import map_graphs, remove_dead
from xdit_ir.passes.views import PERMUTES, order_of
from xdit_ir.program import LAYOUT, SPEC, WHERE, Program, TensorSpec

aten = torch.ops.aten
ATTENTIONS = (ops.attention, ops.ring_attention)


@dataclass(frozen=True)
class OrderExchanges:
    """Exchange queries, keys, values and results of attention as `[..., tokens, heads, dim]` instead of `[..., heads,
    tokens, dim]`: projections write and read them so, hence nothing is transposed in memory on either side, and what
    comes from one rank is one contiguous run of tokens. Numerics: exact.
    """

    name: str = "order-exchanges"

    def apply(self, program: Program) -> Program:
        """The program with its exchanges turned."""
        return map_graphs(program, _turn)


def _turn(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is ops.all_to_all and _meets_attention(node) and _moves_heads(node):
            _tokens_first(graph, node)
    remove_dead(graph)


def _meets_attention(node: fx.Node) -> bool:
    return any(other.target in ATTENTIONS for other in (_source(node), *node.users))


def _moves_heads(node: fx.Node) -> bool:
    have, want = _source(node).meta[LAYOUT].dims, node.meta[LAYOUT].dims
    return {dim - len(have) for dim in range(len(have)) if have[dim] != want[dim]} == {-3, -2}


def _tokens_first(graph: fx.Graph, node: fx.Node) -> None:
    count = len(node.meta[SPEC].shape)
    swap = [*range(count - 3), count - 2, count - 3, count - 1]
    with graph.inserting_before(node):
        turned = _permuted(graph, _source(node), swap)
        exchanged = graph.create_node("call_function", ops.all_to_all, (turned,), name=f"{node.name}_turned")
        exchanged.meta = _permuted_meta(node, swap)
        back = _permuted(graph, exchanged, swap)
    node.replace_all_uses_with(back)
    for user in list(back.users):
        if user.target in PERMUTES:
            with graph.inserting_before(user):
                user.replace_all_uses_with(_permuted(graph, back, order_of(user, count)))


def _permuted(graph: fx.Graph, source: fx.Node, order: list[int]) -> fx.Node:
    """`permute(source, order)`, joined with a permutation that made `source`; nothing if the two cancel."""
    if source.target in PERMUTES:
        before = order_of(source, len(order))
        source, order = _source(source), [before[dim] for dim in order]
    if order == sorted(order):
        return source
    new = graph.call_function(aten.permute.default, (source, order))
    new.meta = _permuted_meta(source, order)
    return new


def _permuted_meta(node: fx.Node, order: list[int]) -> dict[str, object]:
    spec, layout = node.meta[SPEC], node.meta[LAYOUT]
    turned = {
        SPEC: TensorSpec(tuple(spec.shape[dim] for dim in order), spec.dtype),
        LAYOUT: Layout(tuple(layout.dims[dim] for dim in order), layout.partial),
    }
    return turned | ({WHERE: node.meta[WHERE]} if WHERE in node.meta else {})


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
