"""Pointwise operators with broadcasting: a whole operand is cut like the divided ones."""

from __future__ import annotations

import torch

from xdit_ir.ir import ops
from xdit_ir.ir.draws import is_random
from xdit_ir.rules.base import OpCall, rules_of
from xdit_ir.rules.labels import Labels, aligned, by_argument, labelled, plain

aten = torch.ops.aten


def pointwise(call: OpCall) -> Labels | str:
    """Every dim of the result goes with the dims of the operands that align with it from the right."""
    if call.node.target is aten.where.default or any(len(spec.shape) > len(call.out.shape) for spec in call.specs):
        return "not pointwise in this form"
    ndim = len(call.out.shape)
    return Labels(
        tuple(aligned(spec, ndim) for spec in call.specs),
        tuple(aligned(spec, ndim) for spec in call.results),
    )


def _prelu(call: OpCall) -> Labels:
    """One slope, or one per channel (dim 1)."""
    slopes = (1,) if len(call.out.shape) > 1 else (None,)
    weight = slopes if len(call.specs[1].shape) == 1 else (None,) * len(call.specs[1].shape)
    return by_argument(call, plain(call.out), self=plain(call.out), weight=weight)


def _first(call: OpCall) -> Labels:
    """Pointwise in the first operand; of the other something else matters than its elements one by one."""
    names = plain(call.out)
    return by_argument(call, names, self=names, elements=names)


POINTWISE = labelled(pointwise)
# Elementwise operators that do not carry torch.Tag.pointwise.
RULES = {
    **rules_of(
        POINTWISE,
        aten.clone,
        aten._to_copy,
        aten.alias,
        aten.detach,
        aten.lift,
        aten.lift_fresh,
        aten.lift_fresh_copy,
        aten.copy,
        aten.contiguous,
        aten.resolve_conj,
        aten.resolve_neg,
        aten.complex,
        aten.polar,
        aten.real,
        aten.imag,
        aten._conj,
        aten._neg_view,
        aten.ones_like,
        aten.zeros_like,
        aten.full_like,
        aten.empty_like,
        aten.fill,
        aten._prelu_kernel,
        aten.where,
        aten.masked_fill,
        aten.dropout,
        aten.native_dropout,
        aten.alpha_dropout,
        aten.feature_dropout,
        aten.feature_alpha_dropout,
        aten.log_sigmoid,
        aten.log_sigmoid_forward,
        aten.hardswish,
        aten.isclose,
        aten.isreal,
        aten.floor_divide,
        aten.multiply,
        aten.divide,
        aten.true_divide,
        aten.subtract,
        aten.rsub,
        aten.negative,
        aten.absolute,
        aten.square,
        aten.fix,
        aten.arctan2,
        aten.greater,
        aten.greater_equal,
        aten.less,
        aten.less_equal,
        aten.not_equal,
        aten.expand_as,
        aten.__and__,
        aten.__or__,
    ),
    **rules_of(POINTWISE, ops.watch, ops.reuse),
    **rules_of(labelled(_prelu), aten.prelu),
    **rules_of(labelled(_first), aten.bucketize, aten.isin, aten.type_as),
}


def is_pointwise(target: object) -> bool:
    """Whether PyTorch tags an operator as pointwise, and it draws no random numbers and returns a tensor."""
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and not is_random(target) and target is not aten.equal.default
