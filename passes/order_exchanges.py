"""`order-exchanges`: exchanges around attention move tensors in the order in which projections write and read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs, remove_dead
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.views import PERMUTES, order_of


@dataclass(frozen=True)
class OrderExchanges:
    """Exchange queries, keys, values and results of attention as `[..., tokens, heads, dim]` instead of `[..., heads,
    tokens, dim]`: projections write and read them so, hence nothing is transposed in memory on either side, and what
    comes from one rank is one contiguous run of tokens.
    """

    name: ClassVar[str] = "order-exchanges"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    def apply(self, program: Program) -> Program:
        """The program with its exchanges turned."""
        return map_graphs(program, lambda graph: _turn(graph, program.mesh))


def _turn(graph: fx.Graph, mesh: Mesh | None) -> None:
    for node in list(graph.nodes):
        if node.target is ops.all_to_all and _meets_attention(node) and _moves_heads(node):
            _tokens_first(Emitter(graph, node, mesh))
    remove_dead(graph)


def _meets_attention(node: fx.Node) -> bool:
    return any(other.target in ops.ATTENTIONS for other in (_source(node), *node.users))


def _moves_heads(node: fx.Node) -> bool:
    have, want = _source(node).meta[LAYOUT].dims, node.meta[LAYOUT].dims
    return {dim - len(have) for dim in range(len(have)) if have[dim] != want[dim]} == {-3, -2}


def _tokens_first(emitter: Emitter) -> None:
    node, count = emitter.node, len(emitter.node.meta[SPEC].shape)
    swap = [*range(count - 3), count - 2, count - 3, count - 1]
    turned = emitter.permute(_source(node), swap)
    exchanged = emitter.relayout(turned, node.meta[LAYOUT].permuted(swap), f"{node.name}_turned")
    back = emitter.permute(exchanged, swap)
    node.replace_all_uses_with(back)
    for user in list(back.users):
        if user.target in PERMUTES:
            user.replace_all_uses_with(replace(emitter, node=user).permute(back, order_of(user, count)))


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
