"""Operators of a rank's program that one kernel does, or without a copy: a choice by operators, device and dtype."""

from __future__ import annotations

import torch
from torch import fx

from xdit_ir.ir.program import SPEC

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
WRITE = aten.slice_scatter.default
# What these give, and a write into a copy, nothing else refers to.
FRESH = (WRITE, aten.empty_like.default, aten.zeros_like.default, aten.empty.memory_format, aten.zeros.default)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`gelu(linear(x, weight, bias), approximate="tanh")` by the matrix product's epilogue, rounded once.

    `x [..., in]`, `weight [out, in]`, `bias [out]` -> `[..., out]`.
    """
    flat = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return flat.view(*x.shape[:-1], weight.shape[0])


def fused(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """For a gelu that a projection's kernel can do on the way: that projection (used nowhere else) and the gelu."""
    source = node.args[0] if node.args else None
    if node.target is not aten.gelu.default or node.kwargs.get("approximate") != "tanh":
        return None
    if not isinstance(source, fx.Node) or source.target is not aten.linear.default or len(source.users) != 1:
        return None
    fits = len(source.args) == 3 and source.args[2] is not None and source.meta[SPEC].dtype in HALF
    return (source, node) if fits and 0 not in source.meta[SPEC].shape else None


def write_slice(
    x: torch.Tensor, source: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    """`slice_scatter` into `x` itself."""
    aten.slice.Tensor(x, dim, start, end, step).copy_(source)
    return x


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node writes a part of a value that has just been made, and that nothing else reads."""
    target = node.args[0] if node.target is WRITE else None
    return isinstance(target, fx.Node) and target.target in FRESH and len(target.users) == 1
