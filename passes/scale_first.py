"""`scale-first`: the scales of a product with integers are its multiplier's first operand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.flops import counts
from xdit_ir.ir.graphs import map_graphs, operands
from xdit_ir.ir.program import SPEC, Program, TensorSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleFirst:
    """`(x @ weight.to(x.dtype)) * scales`, of integers, is written as `scales * (x @ weight.to(x.dtype))`, which has
    the same bits. PyTorch's compiler takes the first form for `_weight_int8pack_mm`, whose kernel on GPUs has no matrix
    units: it takes hundreds of times as long.
    """

    name: ClassVar[str] = "scale-first"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    def apply(self, program: Program) -> Program:
        """The program with such scales first."""
        return map_graphs(program, _rewrite)


def _rewrite(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        product, scales = node.args
        if isinstance(scales, fx.Node) and _of_integers(_behind(product, casts=False)):
            node.args = (scales, product)


def _of_integers(node: fx.Node) -> bool:
    """Whether a node is a product one of whose operands was integers."""
    if node.op != "call_function" or not counts(node.target):
        return False
    return any(not _behind(x, casts=True).meta[SPEC].dtype.is_floating_point for x in operands(node))


def _behind(value: Any, *, casts: bool) -> fx.Node:
    """What a value is a view of, or was cast from; of several results that one operator gives, the one that it is."""
    found: fx.Node = value
    while found.op == "call_function" and (_is_view(found) or (casts and found.target is aten._to_copy.default)):
        found = found.all_input_nodes[0]
    return found


def _is_view(node: fx.Node) -> bool:
    return ops.is_view(node.target) and isinstance(node.all_input_nodes[0].meta[SPEC], TensorSpec)
