"""Convolutions: channels whole, batch as it is, divided spatial dims extended by a halo where windows reach over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, dims_whole, rules_of, verified, whole
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.labels import Labels, by_argument, handle_empty_parts, labelled, plain

aten = torch.ops.aten


def _per_dim(value: Sequence[int], count: int) -> list[int]:
    return list(value) * count if len(value) == 1 else list(value)


def _steps(call: OpCall) -> tuple[list[int], list[int]]:
    """Stride and dilation along each spatial dim."""
    count = len(call.specs[1].shape) - 2
    return _per_dim(call.arguments["stride"], count), _per_dim(call.arguments["dilation"], count)


def _windows(call: OpCall) -> dict[int, Window]:
    """How windows move along each spatial dim."""
    (stride, dilation), padding, kernel = _steps(call), call.arguments["padding"], call.specs[1].shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padding in ("valid", "same"):
        padding = [0] if padding == "valid" else [(r - 1) // 2 for r in reach]
    count, ndim = len(kernel), len(call.out.shape)
    sizes, outs = call.specs[0].shape[-count:], call.out.shape[-count:]
    columns = zip(sizes, outs, stride, _per_dim(padding, count), reach, strict=True)
    return dict(enumerate((Window(*column) for column in columns), start=ndim - count))


def _conv(call: OpCall) -> OpSharding:
    windows = _windows(call)
    taken = output = dims_whole(call, 0, [min(windows) - 1])
    for dim, window in windows.items():
        partition = taken.dims[dim]
        if partition is not None:
            needs, gives = window.divide(call.mesh, partition) or (None, None)
            taken, output = taken.with_dims({dim: needs}), output.with_dims({dim: gives})
    inputs = (taken, *whole(call.specs[1:]))
    if output.is_whole:
        return OpSharding(inputs, output)
    return handle_empty_parts(call, OpSharding(inputs, output, lambda rank: _local(call, windows, taken, output, rank)))


def _local(call: OpCall, windows: dict[int, Window], taken: Layout, output: Layout, rank: int) -> LocalCall:
    arguments, (stride, dilation) = call.arguments, _steps(call)
    padding = []
    for dim, window in windows.items():
        held, made = taken.dims[dim], output.dims[dim]
        part = Indices.range(0, window.size) if held is None else held.parts[rank]
        out = Indices.range(0, window.out) if made is None else made.parts[rank]
        padding.append(window.border(part, out) if len(part.runs) == 1 else (0, 0))
    args = (arguments["input"], arguments["weight"], arguments["bias"], stride, padding, dilation, arguments["groups"])
    return ops.padded_conv, args, {}


def _conv_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    windows = _windows(call)
    if wanted.dims[min(windows) - 1] is not None:
        return None
    divided = {dim: partition for dim in windows if (partition := wanted.dims[dim]) is not None}
    changes = {dim: windows[dim].demand(partition) for dim, partition in divided.items()}
    return None if None in changes.values() else (wanted.with_dims(changes), *whole(call.specs[1:]))


def _transposed(call: OpCall) -> Labels:
    """Whole but for the batch."""
    batch = plain(call.out, range(1 - len(call.specs[1].shape), 0))
    return by_argument(call, batch, input=batch)


CONV, TRANSPOSED = verified(Rule(_conv, _conv_demand)), labelled(_transposed)


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
