"""Where features and heads of a block may be cut in parts: seeds, each of which propagation follows to weights."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import bound_arguments, operands
from xdit_ir.ir.hoist import ancestors
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import FEATURES, Mesh
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TensorSpec, is_weight
from xdit_ir.passes.divide_conditions import is_condition
from xdit_ir.passes.find_tokens import JOINS, segments_of, units_of
from xdit_ir.rules.attentions import parts_of_heads
from xdit_ir.rules.contractions import NAMED, labels_of
from xdit_ir.rules.contractions import RULES as PRODUCTS
from xdit_ir.rules.convolutions import space_of
from xdit_ir.rules.views import RULES as VIEWS
from xdit_ir.sharding.layout_graph import LayoutGraph, Layouts

aten = torch.ops.aten
CARRIERS = {*VIEWS, *JOINS, aten.slice, aten.narrow, aten.split, aten.split_with_sizes, operator.getitem}

Seed = tuple[str, Layouts]
"""The name of a value, and the layouts to bring it into."""
Origins = Mapping[fx.Node, frozenset[fx.Node]]
Cut = tuple[Seed, ...]
"""Seeds that belong together."""


@dataclass(frozen=True)
class FeatureCuts:
    """The cuts that may be tried in the blocks of a program whose other layouts stand."""

    program: Program
    mesh: Mesh

    def first(self, body: fx.Graph, early: set[fx.Node], least: float = 0) -> Iterator[Cut]:
        """Heads of attentions, features that a product with more than the `least` bytes of weights sums up, and those
        that one makes, or a table has, and all need; but not of conditions that follow from `early` inputs, which are
        made before the blocks."""
        hoisted, weights = self._hoisted(body, early), _weights_behind(body)
        uses: dict[frozenset[fx.Node], list[_Mixing]] = {}

        def held(node: fx.Node) -> int:
            return sum(one.meta[SPEC].nbytes for source in operands(node) for one in weights.get(source, ()))

        for node in body.nodes:
            if node.target in ops.ATTENTIONS:
                exits = tuple(self._exits(node, weights))
                for heads in self._heads(node):
                    yield (heads,)
                    if exits:
                        yield (heads, *exits)
            elif node not in hoisted and (mixing := _mixing(node, weights)) is not None and held(node) > least:
                uses.setdefault(mixing.weights, []).append(mixing)
        for products in uses.values():  # a weight that is used twice must be cut in both places, or where one leads
            yield from zip(*map(self._summed, products), strict=False)
            if len(products) > 1:
                yield from ((seed,) for product in products for seed in self._summed(product))
        for products in uses.values():
            yield from zip(*map(self._made, products), strict=False)
        for node in filter(_is_table, body.nodes):
            if held(node) > least:
                table = _Mixing(node, weights[operands(node)[0]], (), (len(node.meta[SPEC].shape) - 1,))
                others = uses.get(table.weights, [])
                yield from zip(self._made(table), *map(self._summed, others), strict=False)

    def _hoisted(self, body: fx.Graph, early: set[fx.Node]) -> set[fx.Node]:
        """Projections of `early` conditions, but for those of which others are made, and these."""
        known, found = set(early), set[fx.Node]()
        for node in body.nodes:
            if node.op == "call_function" and all(one in known or is_weight(one) for one in operands(node)):
                known.add(node)
                found |= {node} if is_condition(node) or _is_table(node) else set()
        before = {node: ancestors(operands(node)) & found for node in found}
        return {node for node in found if not before[node]} - set[fx.Node]().union(*before.values())

    def stuck(self, draft: LayoutGraph) -> Iterator[Cut]:
        """Cuts that went no further against the data flow, as other users want more of the value: of what is computed,
        and of weights of which these may take statistics of parts."""
        for step in draft.steps:
            if step.relayout and step.target is ops.shard and self._cuts(step.layout):
                [source] = step.sources
                shared = source.node.op == "call_function" or (is_weight(source.node) and not source.common_shard())
                if shared and not source.relayout:
                    yield ((source.node.name, (step.layout,)),)

    def _cuts(self, layout: Layout) -> bool:
        return not layout.dividing_dims(self.mesh).isdisjoint(FEATURES)

    def _heads(self, node: fx.Node) -> Iterator[Seed]:
        queries, keys = (one.meta[SPEC].shape for one in operands(node)[:2])
        for dim in range(len(queries) - 3, -1, -1):
            if queries[dim] != node.meta[SPEC].shape[dim] or dim >= len(keys):
                continue
            found = parts_of_heads(self.mesh, FEATURES, queries[dim], keys[dim])
            if found is not None:
                yield from self._cut(node, dim, [found[0]])
            yield from self._cut(node, dim, self._inside(queries[dim]))

    def _exits(self, attention: fx.Node, weights: Origins) -> Iterator[Seed]:
        """Where the result of an attention, or a part of it, is used by something else than products with weights:
        there it is brought together, as what it is added to is whole."""
        carried = {attention}
        for node in attention.graph.nodes:
            if _carries(node) and not carried.isdisjoint(operands(node)):
                carried.add(node)
                ends = (user for user in node.users if not _carries(user))
                if isinstance(node.meta[SPEC], TensorSpec) and any(_mixing(user, weights) is None for user in ends):
                    yield node.name, (node.meta[LAYOUT].summed(),)

    def _inside(self, size: int) -> Iterator[Partition]:
        """A dim of which heads are the inner factor: those of each sample."""
        for unit in units_of(self.program, size):
            yield self.mesh.divide(size, FEATURES, segments=(unit,) * (size // unit))

    def _summed(self, product: _Mixing) -> Iterator[Seed]:
        """The features of what is multiplied with a weight; those of its parts, where it is joined."""
        for value, dim in product.summed:
            joined = getattr(value.target, "overloadpacket", None) in JOINS
            for part in operands(value) if joined else [value]:
                size = part.meta[SPEC].shape[dim]
                segments: Sequence[tuple[int, ...]] = ((), *segments_of(self.program, size))
                yield from self._cut(part, dim, (self.mesh.divide(size, FEATURES, segments=one) for one in segments))

    def _made(self, product: _Mixing) -> Iterator[Seed]:
        node = product.node
        for dim in product.made:
            size = node.meta[SPEC].shape[dim]
            for name, (cut,) in self._cut(node, dim, [self.mesh.divide(size, FEATURES)]):
                yield name, (cut, node.meta[LAYOUT].summed())

    def _cut(self, node: fx.Node, dim: int, partitions: Iterable[Partition]) -> Iterator[Seed]:
        have: Layout = node.meta[LAYOUT].summed()
        if node.meta[SPEC].shape[dim] >= self.mesh.size(FEATURES) and have.dims[dim] is None:
            for partition in dict.fromkeys(partitions):
                yield node.name, (have.with_dims({dim: partition}),)


def gathers(cut: Cut) -> bool:
    """Whether what is cut is brought together right behind."""
    return any(len(layouts) > 1 for _, layouts in cut)


def _carries(node: fx.Node) -> bool:
    """Whether an operator shows a value or a part of it in another shape, or joins it with others."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet in CARRIERS or ops.is_relayout(node.target)


def _weights_behind(body: fx.Graph) -> Origins:
    """Of values that are made of nothing but weights and constants (scaled, cast, unpacked): the weights, as of these
    themselves."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in body.nodes:
        sources = operands(node) if node.op == "call_function" else []
        if is_weight(node):
            found[node] = frozenset({node})
        elif node.op == "call_function" and all(source in found for source in sources):
            found[node] = frozenset().union(*(found[source] for source in sources))
    return found


def _is_table(node: fx.Node) -> bool:
    """Whether an operator looks up rows of a weight."""
    return node.target is aten.embedding.default and is_weight(operands(node)[0])


@dataclass(frozen=True)
class _Mixing:
    """A product or a convolution with weights: dims of its operands that it sums up with these, and those that it
    makes."""

    node: fx.Node
    weights: frozenset[fx.Node]
    summed: tuple[tuple[fx.Node, int], ...]
    made: tuple[int, ...]


def _mixing(node: fx.Node, weights: Origins) -> _Mixing | None:
    sources = operands(node)
    one = isinstance(node.meta.get(SPEC), TensorSpec) and node.meta[SPEC].shape
    if not one or len(sources) < 2 or all(source in weights for source in sources):
        return None
    packet, ndim = getattr(node.target, "overloadpacket", None), len(sources[0].meta[SPEC].shape)
    dim = None
    if sources[0] not in weights and sources[1] in weights:
        space = space_of(node.target, ndim, sources[1].meta[SPEC].shape)
        if packet in PRODUCTS and ndim == len(node.meta[SPEC].shape):
            dim = ndim - 1
        elif space and bound_arguments(node)["groups"] == 1:
            dim = space.start - 1
    if dim is not None and packet not in NAMED:
        return _Mixing(node, weights[sources[1]], ((sources[0], dim),), (dim,))
    return _named_mixing(node, weights)


def _named_mixing(node: fx.Node, weights: Origins) -> _Mixing | None:
    """The same of a product whose dims have names, wherever its weights stand."""
    labels = labels_of(node)
    if labels is None:
        return None
    pairs = list(zip(operands(node), labels.operands, strict=True))
    mixed = {name for source, names in pairs if source in weights for name in names}
    given = {name for source, names in pairs if source not in weights for name in names}
    [result] = labels.results
    summed = tuple(
        (source, dim)
        for source, names in pairs
        if source not in weights
        for dim, name in enumerate(names)
        if name in mixed and name not in result
    )
    made = tuple(dim for dim, name in enumerate(result) if name in mixed and name not in given)
    used = frozenset[fx.Node]().union(*(weights[source] for source, _ in pairs if source in weights))
    return _Mixing(node, used, summed, made) if used and (summed or made) else None
