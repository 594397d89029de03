"""What is taken out of packed weights: whole bytes give whole tensors."""

from __future__ import annotations

from xdit_ir.ir import ops
from xdit_ir.rules.base import OpCall, OpSharding, Rule, gather_all, rules_of


def _unpacked(call: OpCall) -> OpSharding:
    return gather_all(call, "weights are taken out of all bytes")


RULES = rules_of(Rule(_unpacked), ops.unpack)
