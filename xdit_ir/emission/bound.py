"""Operators of code that is run as it is, by the functions that Python has for them: `torch.add` reads its arguments in
half of the time that `torch.ops.aten.add.Tensor` takes, and calls the same operator with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.program import SPEC, TensorSpec

aten = torch.ops.aten
BOUND: Mapping[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.neg.default: torch.neg,
    aten.exp.default: torch.exp,
    aten.sin.default: torch.sin,
    aten.cos.default: torch.cos,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.rsqrt.default: torch.rsqrt,
    aten.bmm.default: torch.bmm,
    aten.matmul.default: torch.matmul,
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.reshape.default: torch.reshape,
    aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.unbind.int: torch.unbind,
    aten.layer_norm.default: torch.layer_norm,
    aten.group_norm.default: torch.group_norm,
    aten.rms_norm.default: torch.rms_norm,
    aten.linear.default: torch._C._nn.linear,
    aten.silu.default: torch._C._nn.silu,
    aten.gelu.default: torch._C._nn.gelu,
}
"""None makes tensors of numbers only: modes of the caller's, as of `torch.set_default_device`, would see that call."""


def bind(node: fx.Node) -> None:
    """Let a node, which is new, call the function that Python has for its operator, if there is one."""
    if node.target in BOUND and not {"self", "input"} & set(node.kwargs):
        node.target = BOUND[node.target]
    elif node.target is aten._to_copy.default and _casts(node):
        node.target, node.args, node.kwargs = torch.Tensor.to, (node.args[0], node.kwargs["dtype"]), {}


def _casts(node: fx.Node) -> bool:
    """Whether all that a copy does is to give another type, so that it never is the tensor that it was made of."""
    specs = [one.meta.get(SPEC) for one in (*operands(node), node)]
    known = [one.dtype for one in specs if isinstance(one, TensorSpec)]
    return list(node.kwargs) == ["dtype"] and len(node.args) == 1 and len(known) == 2 and known[0] != known[1]
