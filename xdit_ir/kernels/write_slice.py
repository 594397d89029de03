"""A write into a part of a tensor, without a copy of the rest."""

from __future__ import annotations

import torch

aten = torch.ops.aten


def write_slice(
    x: torch.Tensor, source: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    """`slice_scatter` into `x` itself, which it returns."""
    aten.slice.Tensor(x, dim, start, end, step).copy_(source)
    return x
