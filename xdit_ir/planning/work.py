"""What an operator is to a GPU, and the bytes that it moves where a compiler fuses what only reads and writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.flops import counts, first_of
from xdit_ir.ir.graphs import operands, takers
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partial_attention import partial_attention
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec, is_block_call
from xdit_ir.passes.fuse_gelu import projection

aten = torch.ops.aten
# These leave memory as it is.
_EMPTY = {aten.empty, aten.empty_like, aten.new_empty}


class WorkKind(Enum):
    """How an operator spends its time."""

    PRODUCT = "products"
    ATTENTION = "attention"
    MEMORY = "rest"
    VIEW = "view"
    EXCHANGE = "exchange"
    CALL = "call"


def kind_of(node: fx.Node) -> WorkKind:
    """Of an operator of a program."""
    if node.op != "call_function":
        return WorkKind.VIEW
    if is_block_call(node):
        return WorkKind.CALL
    if ops.communicates(node.target) or node.target is ops.upload:
        return WorkKind.EXCHANGE
    if node.target in (*ops.ATTENTIONS, partial_attention) or node.target is aten.scaled_dot_product_attention.default:
        return WorkKind.ATTENTION
    if counts(node.target):
        return WorkKind.PRODUCT
    if ops.is_view(node.target) or getattr(node.target, "overloadpacket", None) in _EMPTY:
        return WorkKind.VIEW
    if projection(node) is not None:  # the product's kernel does it on the way
        return WorkKind.VIEW
    return WorkKind.MEMORY


@dataclass(frozen=True)
class Moved:
    """What an operator reads that nothing fused with it has read before, and whether its result is written."""

    reads: tuple[fx.Node, ...]
    writes: bool


class Fusion:
    """Of one graph: operators that only read and write, and hang together without a kernel of another kind between
    them, are one kernel, which reads what comes from outside once and writes what is used outside."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes: list[fx.Node] = list(graph.nodes)
        self._depth = _depths(nodes)
        self._leader = {node: node for node in nodes if kind_of(node) is WorkKind.MEMORY}
        for node in self._leader:
            for source in map(behind_views, node.all_input_nodes):
                if self._fuses(source, node):
                    self._leader[self._find(source)] = self._find(node)
        seen: set[tuple[fx.Node, fx.Node]] = set()
        self.moved = {node: self._moved(node, seen) for node in self._leader}

    def _fuses(self, source: fx.Node, node: fx.Node) -> bool:
        return kind_of(source) is WorkKind.MEMORY and self._depth[source] == self._depth[node]

    def _find(self, node: fx.Node) -> fx.Node:
        while self._leader[node] is not node:
            node = self._leader[node]
        return node

    def _moved(self, node: fx.Node, seen: set[tuple[fx.Node, fx.Node]]) -> Moved:
        kernel, reads = self._find(node), []
        for source in node.all_input_nodes:
            made = behind_views(source)
            inside = made in self._leader and self._find(made) is kernel
            if not inside and (kernel, source) not in seen:
                seen.add((kernel, source))
                reads.append(source)
        outside = (user not in self._leader or self._find(user) is not kernel for user in takers(node, _is_view))
        return Moved(tuple(reads), any(outside))


def _depths(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """How many kernels of other kinds are before each node on any way; what only moves bytes is as late as it can be,
    beside those who use it."""
    depth: dict[fx.Node, int] = {}
    late = (WorkKind.MEMORY, WorkKind.VIEW)
    for node in nodes:
        behind = (depth[source] + (kind_of(source) not in late) for source in node.all_input_nodes)
        depth[node] = max(behind, default=0)
    for node in reversed(nodes):
        users = [depth[user] for user in node.users if user.op == "call_function"]
        if node.op == "call_function" and kind_of(node) in late and users:
            depth[node] = min(users)
    return depth


def behind_views(node: fx.Node) -> fx.Node:
    """Where the elements of a view are from."""
    while _is_view(node):
        sources = node.all_input_nodes
        if not sources:
            break
        node = sources[0]
    return node


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and kind_of(node) is WorkKind.VIEW


def local_bytes(node: fx.Node, rank: int) -> int:
    """Bytes of a value on a rank; a view that repeats elements has no more than it was made from."""
    own = _size(node, rank)
    if _is_view(node) and node.all_input_nodes:
        return min(own, local_bytes(node.all_input_nodes[0], rank))
    return own


def _size(node: fx.Node, rank: int) -> int:
    spec, layout = first_of(node.meta[SPEC]), first_of(node.meta[LAYOUT])
    if not isinstance(spec, TensorSpec) or not isinstance(layout, Layout):
        return 0
    return spec.on(layout, rank).nbytes


def results(node: fx.Node, mesh: Mesh) -> list[int]:
    """Elements of the result on every rank."""
    spec, layout = first_of(node.meta[SPEC]), first_of(node.meta[LAYOUT])
    return [math.prod(layout.local_shape(spec.shape, rank)) for rank in range(mesh.world_size)]


def product_bytes(node: fx.Node, rank: int) -> int:
    """What a product reads and writes."""
    return sum(local_bytes(source, rank) for source in operands(node)) + local_bytes(node, rank)
