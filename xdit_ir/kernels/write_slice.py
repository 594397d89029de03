"""A write into a part of a tensor, without a copy of the rest."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
WRITE = aten.slice_scatter.default
# What these give, and a write into a copy, nothing else refers to.
FRESH = (WRITE, aten.empty_like.default, aten.zeros_like.default, aten.empty.memory_format, aten.zeros.default)


def write_slice(
    x: torch.Tensor, source: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    """`slice_scatter` into `x` itself, which it returns."""
    aten.slice.Tensor(x, dim, start, end, step).copy_(source)
    return x


def writes_into_fresh(node: fx.Node) -> bool:
    """Whether `write_slice` may stand for a `slice_scatter`: what it writes into has just been made, and nothing else
    reads it."""
    target = node.args[0] if node.target is WRITE else None
    return isinstance(target, fx.Node) and target.target in FRESH and len(target.users) == 1
