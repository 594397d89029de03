"""Floating-point operations of the operators: one formula each, over the shapes of operands and result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.declared import declaration_of
from xdit_ir.ir.graphs import bound_arguments, operands
from xdit_ir.ir.leaf import Leaf
from xdit_ir.ir.partial_attention import partial_attention
from xdit_ir.ir.program import SPEC

aten = torch.ops.aten
Shape = tuple[int, ...]
Formula = Callable[[fx.Node, Sequence[Shape], Shape], int]


def _product(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    """Matrix products of two operands, the contracted size being the last of the first."""
    return 2 * math.prod(out) * shapes[0][-1]


def _linear(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    return 2 * math.prod(shapes[0]) * out[-1]


def _added(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    return 2 * math.prod(out) * shapes[1][-1]


def _conv(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    return 2 * math.prod(out) * math.prod(shapes[1][1:])


def _transposed(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])


def _convolution(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    return (_transposed if bound_arguments(node)["transposed"] else _conv)(node, shapes, out)


def _attention(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    q, k = shapes[0], shapes[1]
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + out[-1])


def _partial(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    q, k, v = shapes[:3]
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    sizes = {c: size for term, shape in zip(terms, shapes, strict=False) for c, size in zip(term, shape, strict=False)}
    return 2 * math.prod(sizes.values()) if len(terms) > 1 else 0


def _recurrent(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> int:
    """Every token goes through all matrices of all layers."""
    return 2 * math.prod(shapes[0][:-1]) * sum(math.prod(shape) for shape in shapes[1:] if len(shape) == 2)


FORMULAS: dict[Any, Formula] = {
    **dict.fromkeys((aten.gru, aten.lstm, aten.rnn_tanh, aten.rnn_relu), _recurrent),
    aten.linear: _linear,
    aten.matmul: _product,
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten._scaled_mm: _product,
    aten._grouped_mm: _product,
    aten.addmm: _added,
    aten.baddbmm: _added,
    aten.conv1d: _conv,
    aten.conv2d: _conv,
    aten.conv3d: _conv,
    aten.convolution: _convolution,
    aten.conv_transpose1d: _transposed,
    aten.conv_transpose2d: _transposed,
    aten.conv_transpose3d: _transposed,
    aten.einsum: _einsum,
    ops.attention: _attention,
    ops.ring_attention: _attention,
    partial_attention: _partial,
    aten.scaled_dot_product_attention: _attention,
}


def flops_as(node: fx.Node, target: Any, shapes: Sequence[Shape], out: Shape) -> int:
    """Multiplications and additions of a node, if its operator were `target`, for these operand and result shapes."""
    if isinstance(target, Leaf):
        return target.flops * math.prod(out) // max(math.prod(target.outputs[0].shape), 1)
    declaration = declaration_of(target)
    if declaration is not None:
        return declaration.work(shapes, out)
    formula = FORMULAS.get(getattr(target, "overloadpacket", target))
    return 0 if formula is None else formula(node, shapes, out)


def counts(target: Any) -> bool:
    """Whether FLOPs of this operator are counted."""
    if isinstance(target, Leaf):
        return bool(target.outputs)
    if declaration_of(target) is not None:
        return True
    return getattr(target, "overloadpacket", target) in FORMULAS


def is_counted(node: fx.Node) -> bool:
    """Whether a node's FLOPs are counted."""
    return node.op == "call_function" and counts(node.target)


def node_flops(node: fx.Node) -> int:
    """FLOPs of a node that is no block call, on one device."""
    if not is_counted(node):
        return 0
    shapes = [source.meta[SPEC].shape for source in operands(node)]
    return flops_as(node, node.target, shapes, first_of(node.meta[SPEC]).shape)


def first_of(results: Any) -> Any:
    """The first of several results (specs or layouts), or the only one; FLOPs are counted by its shape."""
    return results[0] if isinstance(results, tuple) else results
