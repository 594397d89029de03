"""Convolutions: channels whole, batch as it is, divided spatial dims extended by a halo where windows reach over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, dims_whole, rules_of, verified, whole
from xdit_ir.rules.labels import Labels, by_argument, handle_empty_parts, labelled, plain

aten = torch.ops.aten
Interval = tuple[int, int]


@dataclass(frozen=True)
class _Window:
    """Geometry of a convolution along one spatial dim, of length `size` before and `out` after it."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    size: int
    out: int

    @property
    def reach(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    @property
    def tiles(self) -> bool:
        """Whether windows are adjacent blocks that cover everything."""
        tight = self.dilation == 1 and self.padding == 0
        return tight and self.kernel == self.stride and self.kernel * self.out == self.size

    def read(self, first: int, stop: int) -> Interval:
        """The input interval that the outputs `first..stop-1` read, padding included."""
        return first * self.stride - self.padding, (stop - 1) * self.stride - self.padding + self.reach

    def needed(self, part: Indices) -> Indices:
        """What a rank needs that makes one run of outputs, and the gap up to what the next one reads."""
        if not part.runs:
            return part
        first, stop = _interval(part)
        start, end = self.read(first, stop)
        end = self.size if stop == self.out else end + max(self.stride - self.reach, 0)
        return Indices.range(max(start, 0), min(end, self.size))

    def makes(self, part: Indices) -> Indices:
        """All outputs that one run of inputs determines."""
        if not part.runs:
            return part
        start, end = _interval(part)
        first = 0 if start == 0 else -(-(start + self.padding) // self.stride)
        stop = self.out if end == self.size else (end - self.reach + self.padding) // self.stride + 1
        return Indices.range(max(first, 0), min(stop, self.out))

    def centred(self, part: Indices) -> Indices:
        """The outputs whose window has its centre (or, with a stride, its first element) in one run of inputs."""
        if not part.runs:
            return part
        start, end = _interval(part)
        shift = (self.reach - 1) // 2 - self.padding if self.stride == 1 else 0
        first, stop = (min(max(-((shift - edge) // self.stride), 0), self.out) for edge in (start, end))
        return Indices.range(0 if start == 0 else first, self.out if end == self.size else stop)

    def border(self, held: Indices, made: Indices) -> Interval:
        """Zeros to add before and after what a rank holds (negative: elements to drop) to make these outputs."""
        start, end = _interval(held)
        first, last = self.read(*_interval(made))
        return start - first, last - end


def _interval(part: Indices) -> Interval:
    ((start, length),) = part.runs
    return start, start + length


def _per_dim(value: Sequence[int], count: int) -> list[int]:
    return list(value) * count if len(value) == 1 else list(value)


def _windows(call: OpCall) -> list[_Window]:
    arguments, kernel = call.arguments, call.specs[1].shape[2:]
    count = len(kernel)
    stride, dilation = (_per_dim(arguments[name], count) for name in ("stride", "dilation"))
    padding = arguments["padding"]
    if padding == "valid":
        padding = [0]
    elif padding == "same":
        padding = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
    sizes, outs = call.specs[0].shape[-count:], call.out.shape[-count:]
    columns = zip(kernel, stride, _per_dim(padding, count), dilation, sizes, outs, strict=True)
    return [_Window(*column) for column in columns]


def _made(mesh: Mesh, window: _Window, partition: Partition) -> tuple[Partition, Partition] | None:
    """What the ranks need of one dim and what they make: without talking if possible; None: it must be whole."""
    if window.tiles:
        pairs = {part: part.factor(window.kernel) for part in set(partition.parts)}
        if all(pair is not None and pair[1].is_whole(window.kernel) for pair in pairs.values()):
            outer = tuple(pair[0] for part in partition.parts if (pair := pairs[part]) is not None)
            return partition, Partition(window.out, outer)
    if any(len(part.runs) > 1 for part in partition.parts):
        return None
    groups = {mesh.group(rank, mesh.dividing_dims(partition)) for rank in range(mesh.world_size)}
    made = partition.map(window.out, window.makes)
    if all(made.covers(group) for group in groups):
        return partition, made
    needs = partition.map(window.out, window.centred).map(window.size, window.needed)
    made = needs.map(window.out, window.makes)  # at the border a halo is enough for more than was asked for
    spared = not any(part.is_whole(window.size) for part in needs.parts)
    return (needs, made) if spared and all(made.covers(group) for group in groups) else None


def _conv(call: OpCall) -> OpSharding:
    windows = _windows(call)
    ndim, count = len(call.out.shape), len(windows)
    layout = dims_whole(call, 0, [ndim - count - 1])
    needs, gives = list(layout.dims), list(layout.dims)
    for dim, window in enumerate(windows, start=ndim - count):
        partition = layout.dims[dim]
        if partition is not None:
            pair = _made(call.mesh, window, partition)
            needs[dim], gives[dim] = (None, None) if pair is None else pair
    taken, output = Layout(tuple(needs)), Layout(tuple(gives))
    inputs = (taken, *whole(call.specs[1:]))
    if output.is_whole:
        return OpSharding(inputs, output)
    return handle_empty_parts(call, OpSharding(inputs, output, lambda rank: _local(call, windows, taken, output, rank)))


def _local(call: OpCall, windows: list[_Window], taken: Layout, output: Layout, rank: int) -> LocalCall:
    arguments = call.arguments
    padding = []
    for dim, window in enumerate(windows, start=len(output.dims) - len(windows)):
        held, made = taken.dims[dim], output.dims[dim]
        part = Indices.range(0, window.size) if held is None else held.parts[rank]
        out = Indices.range(0, window.out) if made is None else made.parts[rank]
        padding.append(window.border(part, out) if len(part.runs) == 1 else (0, 0))
    lists = [window.stride for window in windows], padding, [window.dilation for window in windows]
    args = (arguments["input"], arguments["weight"], arguments["bias"], *lists, arguments["groups"])
    return ops.padded_conv, args, {}


def _conv_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    windows = _windows(call)
    start = len(wanted.dims) - len(windows)
    if wanted.dims[start - 1] is not None:
        return None
    changes: dict[int, Partition | None] = {}
    for dim, window in enumerate(windows, start=start):
        partition = wanted.dims[dim]
        if partition is None:
            continue
        if window.tiles:
            block, size = Indices.range(0, window.kernel), window.kernel
            changes[dim] = partition.map(
                window.size,
                lambda part, b=block, k=size: part.outer(b, k),  # type: ignore[misc]
            )
        elif any(len(part.runs) > 1 for part in partition.parts):
            return None
        else:
            changes[dim] = partition.map(window.size, window.needed)
    return (wanted.with_dims(changes), *whole(call.specs[1:]))


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
