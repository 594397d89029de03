"""Batched matrix products in their many spellings, by labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments, nodes_in
from xdit_ir.ir.program import SPEC
from xdit_ir.rules.contractions import einsum_labels
from xdit_ir.rules.labels import Names

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """`alpha * sum(left * right) + beta * added`: a label for every dim of both operands and of the result."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    names: tuple[Names, Names]
    out: Names
    added: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0

    def turned(self) -> Product:
        """The same with its operands swapped."""
        names = (self.names[1], self.names[0])
        return Product(self.node, self.right, self.left, names, self.out, self.added, self.alpha, self.beta)


def product_of(node: fx.Node) -> Product | None:
    """The product that a node computes, if it is one of two operands with at least two dims each."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.matmul, aten.bmm, aten.linalg_matmul):
        return _matrices(node, *nodes_in(node.args))
    if packet is aten.baddbmm:
        given = bound_arguments(node)
        added = given["self"] if given["beta"] else None
        found = _matrices(node, given["batch1"], given["batch2"])
        if found is None:
            return None
        names, out = found.names, found.out
        return Product(node, found.left, found.right, names, out, added, float(given["alpha"]), float(given["beta"]))
    if packet is aten.einsum:
        return _einsum(node)
    return None


def _matrices(node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    ndims = [len(side.meta[SPEC].shape) for side in (left, right)]
    if min(ndims) < 2:
        return None
    batch = [tuple(range(-ndim, -2)) for ndim in ndims]
    names = ((*batch[0], "rows", "inner"), (*batch[1], "inner", "columns"))
    return Product(node, left, right, names, (*max(batch, key=len), "rows", "columns"))


def _einsum(node: fx.Node) -> Product | None:
    sides = nodes_in(node.args[1])
    if len(sides) != 2 or (len(node.args) > 2 and node.args[2]):
        return None
    labels = einsum_labels(str(node.args[0]), [len(side.meta[SPEC].shape) for side in sides])
    if labels is None:
        return None
    names = (labels.operands[0], labels.operands[1])
    return Product(node, sides[0], sides[1], names, labels.results[0])
