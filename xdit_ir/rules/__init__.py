"""The rule table: what every operator does when a dimension of an operand is divided over ranks."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import Any

from xdit_ir.ir.leaf import Leaf
from xdit_ir.rules import (
    attentions,
    contractions,
    convolutions,
    factories,
    joins,
    leaves,
    lookups,
    norms,
    packs,
    padding,
    partials,
    pointwise,
    pooling,
    recurrent,
    reductions,
    repeats,
    resizing,
    running,
    scatters,
    spectral,
    views,
    windows,
)
from xdit_ir.rules.base import OpCall, OpSharding, Rule, gather_all
from xdit_ir.rules.declared import declared_rule

RULES: MappingProxyType[Any, Rule] = MappingProxyType(
    {
        **pointwise.RULES,
        **views.RULES,
        **repeats.RULES,
        **joins.RULES,
        **lookups.RULES,
        **scatters.RULES,
        **contractions.RULES,
        **reductions.RULES,
        **running.RULES,
        **recurrent.RULES,
        **norms.RULES,
        **convolutions.RULES,
        **padding.RULES,
        **pooling.RULES,
        **resizing.RULES,
        **windows.RULES,
        **spectral.RULES,
        **factories.RULES,
        **attentions.RULES,
        **partials.RULES,
        **packs.RULES,
    }
)


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator (an ATen overload, one of `xdit_ir.ir.ops`, or what a user declares), or None."""
    return declared_rule(target) or _built_in(target)


@lru_cache(maxsize=4096)
def _built_in(target: Any) -> Rule | None:
    if isinstance(target, Leaf):
        return leaves.LEAF
    packet = getattr(target, "overloadpacket", target)
    if packet in RULES:
        return RULES[packet]
    return pointwise.POINTWISE if pointwise.is_pointwise(target) else None


def infer(call: OpCall) -> OpSharding:
    """Apply the rule of the call's operator; without one, gather, run whole and say so."""
    declared = declared_rule(call.node.target)
    if declared is None and call.layouts and all(layout.is_whole for layout in call.layouts):
        return gather_all(call, "")  # of many values of a trial, and no rule divides what is whole
    rule = declared or _built_in(call.node.target)
    if rule is None:
        return gather_all(call, f"no rule for {call.node.target}")
    return rule.forward(call)
