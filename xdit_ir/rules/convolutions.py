"""Convolutions, also transposed ones: channels whole, batch as it is, divided spatial dims with a halo."""

from __future__ import annotations

import torch

from xdit_ir.ir import ops
from xdit_ir.rules.base import LocalCall, OpCall, Rule, rules_of
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain
from xdit_ir.rules.sliding import Held, Windows, per_dim, windowed

aten = torch.ops.aten


def space_of(target: object, ndim: int, weight: tuple[int, ...]) -> range:
    """The dims of the operand, of `ndim` dims, along which a convolution with a weight of this shape moves its windows;
    none for any other operator."""
    return range(ndim - len(weight) + 2, ndim) if getattr(target, "overloadpacket", None) in RULES else range(0)


def _steps(call: OpCall) -> tuple[list[int], list[int], list[int]]:
    """Stride, dilation and reach along each spatial dim."""
    kernel = call.specs[1].shape[2:]
    stride, dilation = (per_dim(call.arguments[name], len(kernel)) for name in ("stride", "dilation"))
    return stride, dilation, [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]


def _windows(call: OpCall) -> Windows:
    """How windows move along each spatial dim."""
    (stride, _, reach), padding = _steps(call), call.arguments["padding"]
    if padding in ("valid", "same"):
        padding = [0] if padding == "valid" else [(r - 1) // 2 for r in reach]
    count, ndim = len(reach), len(call.out.shape)
    sizes, outs = call.specs[0].shape[-count:], call.out.shape[-count:]
    columns = zip(sizes, outs, stride, per_dim(padding, count), reach, strict=True)
    return dict(enumerate((Window.sliding(*column) for column in columns), start=ndim - count))


def _local(call: OpCall, held: list[Held]) -> LocalCall:
    given, (stride, dilation, _) = call.arguments, _steps(call)
    padding = [one.border for one in held]
    return ops.padded_conv, (*_operands(call), stride, padding, dilation, given["groups"]), {}


def _operands(call: OpCall) -> tuple[object, ...]:
    given = call.arguments
    return given["input"], given["weight"], given["bias"]


def _transposed_windows(call: OpCall) -> Windows:
    stride, _, reach = _steps(call)
    padding, count = per_dim(call.arguments["padding"], len(reach)), len(reach)
    sizes, outs = call.specs[0].shape[-count:], call.out.shape[-count:]
    columns = zip(sizes, outs, stride, padding, reach, strict=True)
    return dict(enumerate((Window.transposed(*c) for c in columns), start=len(call.out.shape) - count))


def _transposed_local(call: OpCall, held: list[Held]) -> LocalCall:
    """All that a rank's part adds to, and of that what it makes."""
    given, (stride, dilation, _) = call.arguments, _steps(call)
    padding = per_dim(given["padding"], len(stride))
    extra = per_dim(given["output_padding"], len(stride))
    kept = [_kept(one, by, pad) for one, by, pad in zip(held, stride, padding, strict=True)]
    return ops.cut_conv_transpose, (*_operands(call), stride, kept, extra, dilation, given["groups"]), {}


def _kept(one: Held, stride: int, padding: int) -> tuple[int, int]:
    if len(one.held.runs) != 1:  # every element makes results of its own
        return 0, one.made.size
    (start, _), (first, length) = one.held.runs[0], one.made.runs[0]
    return first - (start * stride - padding), length


def _batch(call: OpCall) -> Labels:
    """Whole but for the batch."""
    batch = plain(call.out, range(1 - len(call.specs[1].shape), 0))
    return by_argument(call, batch, input=batch)


CONV = windowed(_windows, _local, mixes=True)
TRANSPOSED, SPARSE = windowed(_transposed_windows, _transposed_local, mixes=True), labelled(_batch)


def _transposed(call: OpCall) -> Rule:
    """Where results lie between those that any element adds to, everything is whole."""
    stride, _, reach = _steps(call)
    return TRANSPOSED if all(r >= by for r, by in zip(reach, stride, strict=True)) else SPARSE


RULES = {
    **rules_of(
        Rule.by(lambda call: _transposed(call) if call.arguments.get("transposed") else CONV),
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.convolution,
    ),
    **rules_of(Rule.by(_transposed), aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
}
