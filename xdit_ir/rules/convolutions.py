"""Convolutions, also transposed ones: batch as it is, divided spatial dims with a halo, channels whole unless mesh dims
of features divide them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from xdit_ir.ir import window_ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import FEATURES
from xdit_ir.ir.partition import Partition
from xdit_ir.rules.base import (
    LocalCall,
    Localize,
    OpCall,
    OpSharding,
    Rule,
    as_layouts,
    rules_of,
    same_call,
    verified,
)
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.padding import added_before
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
    found = enumerate((Window.sliding(*column) for column in columns), start=ndim - count)
    return {dim: replace(window, shift=added_before(call.node, dim)) for dim, window in found}


def _local(call: OpCall, held: list[Held]) -> LocalCall:
    given, (stride, dilation, _) = call.arguments, _steps(call)
    padding = [one.border for one in held]
    return window_ops.padded_conv, (*_operands(call), stride, padding, dilation, given["groups"]), {}


def _operands(call: OpCall) -> tuple[object, ...]:
    given = call.arguments
    return given["input"], given["weight"], given["bias"]


def _transposed_windows(call: OpCall) -> Windows:
    stride, _, reach = _steps(call)
    padding, count = per_dim(call.arguments["padding"], len(reach)), len(reach)
    sizes, outs = call.specs[0].shape[-count:], call.out.shape[-count:]
    columns = zip(sizes, outs, stride, padding, reach, strict=True)
    found = enumerate((Window.transposed(*c) for c in columns), start=len(call.out.shape) - count)
    return {dim: replace(window, shift=_cut_before(call.node, dim)) for dim, window in found}


def _cut_before(node: fx.Node, dim: int) -> int | None:
    """What is cut off in front of a result along a dim, negative; None where it is not all that is taken of it."""
    starts = {user.args[2] for user in node.users if user.target is aten.slice.Tensor and user.args[1] == dim}
    only = len(starts) == 1 and all(user.target is aten.slice.Tensor and user.args[1] == dim for user in node.users)
    [start] = starts if only else [None]
    return -start if isinstance(start, int) and start >= 0 else None


def _transposed_local(call: OpCall, held: list[Held]) -> LocalCall:
    """All that a rank's part adds to, and of that what it makes."""
    given, (stride, dilation, reach) = call.arguments, _steps(call)
    padding = per_dim(given["padding"], len(stride))
    extra = per_dim(given["output_padding"], len(stride))
    extra = [max(own, by - r) for own, by, r in zip(extra, stride, reach, strict=True)]
    kept = [one.kept(by, pad) for one, by, pad in zip(held, stride, padding, strict=True)]
    return window_ops.cut_conv_transpose, (*_operands(call), stride, kept, extra, dilation, given["groups"]), {}


def channels_of(call: OpCall) -> int:
    """The dim of channels of operand and result."""
    return len(call.out.shape) - len(call.specs[1].shape) + 1


def _parts(call: OpCall, partition: Partition | None) -> Partition | None:
    """Channels divided by mesh dims of features only, each on one rank; None for any others."""
    dims = call.dividing_dims(partition)
    return partition if dims and dims <= {*FEATURES} and partition and call.mesh.tiles(partition) else None


def _per_group(call: OpCall) -> tuple[int, int]:
    """How many channels of operand and result belong to a group."""
    groups, dim = call.arguments["groups"], channels_of(call)
    return call.specs[0].shape[dim] // groups, call.out.shape[dim] // groups


def _in_groups(partition: Partition | None, size: int) -> Partition | None:
    """The partition of groups of so many channels each; None where it cuts one."""
    return partition and partition.shorter(size)


def _conv(call: OpCall) -> OpSharding:
    """Of one group: summands of parts of what it takes, or parts of what it makes; of several: some of these."""
    sharding, dim = SPACE.forward(call), channels_of(call)
    output = as_layouts(sharding.outputs)[0]
    if any(0 in one.sizes for one in output.dims if one is not None):
        return sharding
    (taken, weight, *bias), one, (size, made_of) = sharding.inputs, call.arguments["groups"] == 1, _per_group(call)
    rows = _parts(call, call.layouts[0].dims[dim]) or (_parts(call, call.layouts[1].dims[1]) if one else None)
    made = _parts(call, call.layouts[1].dims[0])
    if one and rows is not None:
        inputs = (taken.with_dims({dim: rows}), weight.with_dims({1: rows}), *bias)
        summed = replace(output, partial=output.partial | call.dividing_dims(rows))
        return OpSharding(inputs, summed, _adjusted(call, sharding, summed))
    if not one:
        groups = _in_groups(rows, size) or _in_groups(made, made_of)
        made = groups and groups.longer(made_of)
        taken = taken.with_dims({dim: groups and groups.longer(size)})
    if made is None or 0 in made.sizes:
        return sharding
    output = output.with_dims({dim: made})
    inputs = (taken, *(weight.with_dims({0: made}) for weight in (weight, *bias)))
    return OpSharding(inputs, output, _adjusted(call, sharding, output))


def _adjusted(call: OpCall, sharding: OpSharding, output: Layout) -> Localize:
    """A rank's own groups; and what is no part of a sum is added once."""
    groups, dim, (_, size) = call.arguments["groups"], channels_of(call), _per_group(call)

    def local(rank: int) -> LocalCall:
        first = not output.partial or call.mesh.index(rank, output.partial) == 0
        bias = call.arguments["bias"] if first else None
        own = groups if groups == 1 else output.local_shape(call.out.shape, rank)[dim] // size
        if sharding.local is None:
            return same_call(call, bias=bias, groups=own)
        target, (x, weight, _, *options), kwargs = sharding.local(rank)
        return target, (x, weight, bias, *options[:-1], own), kwargs

    return local


def _conv_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    dim, one, (size, made_of) = channels_of(call), call.arguments["groups"] == 1, _per_group(call)
    made = wanted.dims[dim]
    groups = None if one else _in_groups(made, made_of)
    needs = SPACE.demand(call, wanted.with_dims({dim: None}))
    if needs is None or made is None or (groups is None and not one):
        return needs if made is None else None
    taken, *weights = needs
    return (
        taken if groups is None else taken.with_dims({dim: groups.longer(size)}),
        *(weight.with_dims({0: made}) for weight in weights),
    )


SPACE = windowed(_windows, _local, mixes=True)
CONV = verified(Rule(_conv, _conv_demand))
TRANSPOSED = windowed(_transposed_windows, _transposed_local, mixes=True)

RULES = {
    **rules_of(
        Rule.by(lambda call: TRANSPOSED if call.arguments.get("transposed") else CONV),
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.convolution,
    ),
    **rules_of(TRANSPOSED, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
}
