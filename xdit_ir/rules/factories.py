"""Operators whose result does not depend on the contents of their operands: whole on every rank."""

from __future__ import annotations

import torch

from xdit_ir.rules.base import OpCall, OpSharding, Rule, as_outputs, rules_of, whole

aten = torch.ops.aten


def _made(call: OpCall) -> OpSharding:
    """Operands are taken as they come."""
    inputs = tuple(layout.summed() for layout in call.layouts)
    return OpSharding(inputs, as_outputs(call, whole(call.results)))


RULES = rules_of(
    Rule(_made),
    aten.arange,
    aten.linspace,
    aten.logspace,
    aten.full,
    aten.zeros,
    aten.ones,
    aten.empty,
    aten.empty_strided,
    aten.eye,
    aten.scalar_tensor,
    aten.tril_indices,
    aten.triu_indices,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.new_empty_strided,
)
