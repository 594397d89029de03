"""Convolutions: channels whole, batch as it is, divided spatial dims extended by a halo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xdit_ir import ops
from xdit_ir.layout import Layout
from xdit_ir.partition import Indices, Partition
from xdit_ir.rules.base import Call, LocalCall, Rule, Ruling, dims_whole, rules_of

aten = torch.ops.aten


@dataclass(frozen=True)
class _Window:
    """Geometry of a convolution along one spatial dim."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def reach(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    def needed(self, out: Indices, size: int) -> Indices:
        """Input indices that a run of output indices reads."""
        if not out.runs:
            return out
        start, length = out.runs[0]
        first = start * self.stride - self.padding
        last = (start + length - 1) * self.stride - self.padding + self.reach
        return Indices.range(max(first, 0), min(last, size))

    def border(self, out: Indices, size: int) -> tuple[int, int]:
        """Zeros to add before and after the input indices that `out` reads."""
        if not out.runs:
            return (0, 0)
        start, length = out.runs[0]
        first = start * self.stride - self.padding
        last = (start + length - 1) * self.stride - self.padding + self.reach
        return max(-first, 0), max(last - size, 0)


def _per_dim(value: Sequence[int], count: int) -> list[int]:
    return list(value) * count if len(value) == 1 else list(value)


def _windows(call: Call) -> list[_Window] | None:
    arguments, kernel = call.arguments, call.specs[1].shape[2:]
    padding = arguments["padding"]
    if isinstance(padding, str):
        if padding == "same" and any((k - 1) % 2 for k in kernel):
            return None
        padding = [0 if padding == "valid" else (k - 1) // 2 * d for k, d in zip(kernel, arguments["dilation"] * 3, strict=False)]
    count = len(kernel)
    columns = zip(
        kernel,
        _per_dim(arguments["stride"], count),
        _per_dim(padding, count),
        _per_dim(arguments["dilation"], count),
        strict=True,
    )
    return [_Window(*column) for column in columns]


def _output_partition(window: _Window, size: int, out_size: int, partition: Partition) -> Partition | None:
    """Which outputs each rank makes: those whose first centre it holds; None where a part is no single run."""
    if any(len(part.runs) > 1 for part in partition.parts):
        return None
    shift = (window.reach - 1) // 2 - window.padding if window.stride == 1 else 0
    cuts = []
    for part in partition.parts:
        start, length = part.runs[0] if part.runs else (0, 0)
        first, last = (-((shift - edge) // window.stride) for edge in (start, start + length))
        first = 0 if start == 0 else min(max(first, 0), out_size)
        last = out_size if start + length == size else min(max(last, 0), out_size)
        cuts.append(Indices.range(first, last) if length else Indices(()))
    return Partition(out_size, tuple(cuts))


def _conv(call: Call) -> Ruling:
    windows = _windows(call)
    ndim = len(call.out.shape)
    if windows is None or call.arguments.get("transposed"):
        layout = dims_whole(call, 0, range(1, ndim))
        return Ruling((layout, *_weights(call)), layout, fallback=_reason(call, layout))
    layout = dims_whole(call, 0, [1])
    needs, gives = list(layout.dims), list(layout.dims)
    for dim, window in enumerate(windows, start=2):
        partition, size = layout.dims[dim], call.specs[0].shape[dim]
        if partition is None:
            continue
        made = _output_partition(window, size, call.out.shape[dim], partition)
        needs[dim] = gives[dim] = None
        if made is not None:
            gives[dim] = made
            wanted = made.map(size, lambda out, w=window, s=size: w.needed(out, s))  # type: ignore[misc]
            needs[dim] = wanted
    output = Layout(tuple(gives))
    if all(dim is None for dim in gives[2:]):
        return Ruling((Layout(tuple(needs)), *_weights(call)), output)

    def local(rank: int) -> LocalCall:
        padding = []
        for dim, window in enumerate(windows, start=2):
            out = gives[dim]
            whole = Indices.range(0, call.out.shape[dim])
            padding.append(window.border(whole if out is None else out.parts[rank], call.specs[0].shape[dim]))
        return _padded(call, windows, padding)

    return Ruling((Layout(tuple(needs)), *_weights(call)), output, local)


def _padded(call: Call, windows: list[_Window], padding: list[tuple[int, int]]) -> LocalCall:
    arguments = call.arguments
    args = (
        arguments["input"],
        arguments["weight"],
        arguments["bias"],
        [window.stride for window in windows],
        padding,
        [window.dilation for window in windows],
        arguments["groups"],
    )
    return ops.padded_conv, args, {}


def _weights(call: Call) -> tuple[Layout, ...]:
    return tuple(Layout.whole(len(spec.shape)) for spec in call.specs[1:])


def _reason(call: Call, layout: Layout) -> str:
    return "transposed or even-kernel 'same' convolution" if layout != call.layouts[0] else ""


def _conv_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    """Push a batch cut, or a cut of spatial dims where windows do not overlap."""
    windows = _windows(call)
    if windows is None or wanted.dims[1] is not None:
        return None
    dims = list(wanted.dims)
    for dim, window in enumerate(windows, start=2):
        partition = wanted.dims[dim]
        if partition is None:
            continue
        if window.kernel != window.stride or window.padding or window.dilation != 1:
            return None
        if partition.size * window.stride != call.specs[0].shape[dim]:
            return None
        patch = Indices.range(0, window.kernel)
        dims[dim] = partition.map(
            call.specs[0].shape[dim], lambda part, p=patch, k=window.kernel: part.outer(p, k)  # type: ignore[misc]
        )
    return (Layout(tuple(dims)), *_weights(call))


RULES = rules_of(Rule(_conv, _conv_demand), aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
