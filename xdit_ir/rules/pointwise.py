"""Pointwise operators with broadcasting: a whole operand is cut like the divided ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from xdit_ir.layout import Layout
from xdit_ir.partition import Partition
from xdit_ir.rules.base import Call, Rule, Ruling, by_size, choose, rules_of


def _candidates(call: Call) -> Iterator[tuple[int, Partition]]:
    ndim = len(call.out.shape)
    for place in by_size(call):
        layout = call.layouts[place]
        for dim, partition in enumerate(layout.dims):
            at = dim + ndim - len(layout.dims)
            if partition is not None and partition.size == call.out.shape[at]:
                yield at, partition


def _aligned(call: Call, dims: tuple[Partition | None, ...]) -> tuple[Layout, ...]:
    """Operands cut like the result, except where they broadcast."""
    result = []
    for spec in call.specs:
        offset = len(dims) - len(spec.shape)
        result.append(
            Layout(
                tuple(
                    dims[dim + offset] if size == call.out.shape[dim + offset] else None
                    for dim, size in enumerate(spec.shape)
                )
            )
        )
    return tuple(result)


def forward(call: Call) -> Ruling:
    """Divide the result like the largest divided operand, dimension by dimension."""
    chosen = choose(call.mesh, _candidates(call))
    dims = tuple(chosen.get(dim) for dim in range(len(call.out.shape)))
    return Ruling(_aligned(call, dims), Layout(dims))


def demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    """Cut every operand like the result."""
    return _aligned(call, wanted.dims)


POINTWISE = Rule(forward, demand)
aten = torch.ops.aten
# Elementwise operators that do not carry torch.Tag.pointwise.
RULES = rules_of(
    POINTWISE,
    aten.clone,
    aten._to_copy,
    aten.alias,
    aten.detach,
    aten.lift_fresh_copy,
    aten.copy,
    aten.contiguous,
    aten.complex,
    aten.polar,
    aten.glu_jvp,
    aten.ones_like,
    aten.zeros_like,
    aten.full_like,
    aten.empty_like,
    aten.where,
    aten.masked_fill,
    aten.dropout,
    aten.real,
    aten.imag,
    aten._conj,
    aten._conj_physical,
    aten.conj_physical,
    aten.prelu,
    aten.rrelu,
    aten.leaky_relu,
    aten.to,
    aten.nan_to_num,
)


def is_pointwise(target: object) -> bool:
    """Whether PyTorch tags an operator as pointwise."""
    return torch.Tag.pointwise in getattr(target, "tags", ())
