"""Weights on their way: what lies with the host is uploaded as it is; whole bytes give whole tensors."""

from __future__ import annotations

from xdit_ir.ir import ops
from xdit_ir.rules.base import OpCall, OpSharding, Rule, gather_all, rules_of


def _unpacked(call: OpCall) -> OpSharding:
    return gather_all(call, "weights are taken out of all bytes")


def _uploaded(call: OpCall) -> OpSharding:
    layout = call.layouts[0].summed()
    return OpSharding((layout,), layout)


RULES = {**rules_of(Rule(_unpacked), ops.unpack), **rules_of(Rule(_uploaded), ops.upload)}
