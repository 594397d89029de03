"""Operators that repeat a dimension or reorder it within itself: expand, repeat, repeat_interleave, flip, roll."""

from __future__ import annotations

import torch

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import (
    LocalCall,
    Localize,
    OpCall,
    OpSharding,
    Rule,
    as_layouts,
    gather_all,
    rules_of,
    same_call,
    verified,
)
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain

aten = torch.ops.aten


def _expand(call: OpCall) -> Labels:
    """A dim keeps its label unless it is expanded."""
    shape, out = call.specs[0].shape, call.out.shape
    offset = len(out) - len(shape)
    names = tuple(d + offset if size == out[d + offset] else None for d, size in enumerate(shape))
    return by_argument(call, (None,) * offset + names, self=names)


def _local_size(call: OpCall, sharding: OpSharding) -> Localize:
    output = as_layouts(sharding.outputs)[0]
    return lambda rank: same_call(call, size=list(output.local_shape(call.out.shape, rank)))


def _repeated(call: OpCall) -> int | None:
    """The (not negative) dim that `repeat_interleave` repeats; None where it flattens or the counts are a tensor."""
    dim, repeats = call.arguments.get("dim"), call.arguments["repeats"]
    return dim % len(call.specs[0].shape) if dim is not None and isinstance(repeats, int) else None


def _interleave(call: OpCall) -> OpSharding:
    dim, count = _repeated(call), call.arguments["repeats"]
    assert dim is not None
    layout = call.layouts[0].summed()
    partition = layout.dims[dim]
    if partition is None:
        return OpSharding((layout,), layout)
    return OpSharding(
        (layout,), layout.with_dims({dim: partition.longer(count)}), lambda rank: same_call(call, output_size=None)
    )


def _interleave_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    dim, count = _repeated(call), call.arguments["repeats"]
    assert dim is not None
    partition = wanted.dims[dim]
    if partition is None:
        return (wanted,)
    merged = partition.shorter(count)
    return None if merged is None else (wanted.with_dims({dim: merged}),)


def _by_tensor(call: OpCall) -> Labels | str:
    """`repeat_interleave` with a tensor of counts: the repeated dim must be whole."""
    dim = call.arguments.get("dim")
    if dim is None:
        return "repeats of the flattened value"
    names = plain(call.specs[0], [dim])
    return by_argument(call, names, self=names)


INTERLEAVE, BY_TENSOR = verified(Rule(_interleave, _interleave_demand)), labelled(_by_tensor)


def _interleaved(call: OpCall) -> Rule:
    return BY_TENSOR if _repeated(call) is None or 0 in call.out.shape else INTERLEAVE


def _counts(call: OpCall) -> list[int]:
    """How often each dim of the result repeats the operand's."""
    name = "repeats" if "repeats" in call.arguments else "dims"
    counts = list(call.arguments[name])
    return [1] * (len(call.out.shape) - len(counts)) + counts


def _repeat(call: OpCall) -> OpSharding:
    if 0 in call.out.shape:
        return gather_all(call, "nothing is left")
    counts, layout = _counts(call), call.layouts[0].summed()
    dims: list[Partition | None] = [None] * (len(counts) - len(layout.dims))
    for partition, count in zip(layout.dims, counts[len(dims) :], strict=True):
        dims.append(partition if partition is None or count == 1 else _tiled(partition, count))
    return OpSharding((layout,), Layout(tuple(dims)))


def _tiled(partition: Partition, count: int) -> Partition:
    every, size = Indices.range(0, count), partition.size
    return partition.map(size * count, lambda part: every.outer(part, size))


def _repeat_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    counts = _counts(call)
    if any(dim is not None and count != 1 for dim, count in zip(wanted.dims, counts, strict=True)):
        return None
    return (Layout(wanted.dims[len(counts) - len(call.specs[0].shape) :]),)


def _mirrored(partition: Partition) -> Partition:
    last = partition.size - 1
    return partition.map(partition.size, lambda part: Indices.of_array(last - part.array[::-1]))


def _flipped(call: OpCall) -> list[int]:
    dims: list[int] = call.arguments.get("dims", [1 if call.node.target is aten.fliplr.default else 0])
    return dims


def _flip(call: OpCall) -> OpSharding:
    """A rank flips what it has; that is then the mirrored part."""
    layout = call.layouts[0].summed()
    changes = {d: p for d in _flipped(call) if (p := layout.dims[d]) is not None}
    return OpSharding((layout,), layout.with_dims({d: _mirrored(p) for d, p in changes.items()}))


def _flip_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    changes = {d: p for d in _flipped(call) if (p := wanted.dims[d]) is not None}
    return (wanted.with_dims({d: _mirrored(p) for d, p in changes.items()}),)


def _shifts(call: OpCall) -> dict[int, int]:
    """By how much each dim is rolled."""
    dims, shifts, ndim = call.arguments["dims"], call.arguments["shifts"], len(call.out.shape)
    dims, shifts = ([value] if isinstance(value, int) else value for value in (dims, shifts))
    total: dict[int, int] = {}
    for dim, shift in zip(dims, shifts, strict=True):
        total[dim % ndim] = total.get(dim % ndim, 0) + shift
    return total


def _rolled(layout: Layout, shifts: dict[int, int]) -> Layout:
    changes: dict[int, Partition | None] = {}
    for dim, shift in shifts.items():
        partition = layout.dims[dim]
        if partition is not None:
            size = partition.size
            changes[dim] = partition.map(
                size,
                lambda part, n=size, by=shift: part.map(lambda a: (a + by) % n),  # type: ignore[misc]
            )
    return layout.with_dims(changes)


def _roll(call: OpCall) -> OpSharding:
    """Along a divided dim a rank keeps what it has, and only the names of the indices change."""
    if not call.arguments["dims"]:
        return gather_all(call, "roll of the flattened value")
    layout, shifts = call.layouts[0].summed(), _shifts(call)
    own = {dim: shift for dim, shift in shifts.items() if layout.dims[dim] is None}

    def local(rank: int) -> LocalCall:
        return same_call(call, shifts=list(own.values()), dims=list(own))

    def same(rank: int) -> LocalCall:
        return aten.alias.default, (call.arguments["self"],), {}

    return OpSharding((layout,), _rolled(layout, shifts), local if own else same)


def _roll_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    if not call.arguments["dims"]:
        return None
    return (_rolled(wanted, {dim: -shift for dim, shift in _shifts(call).items()}),)


def _rot90(call: OpCall) -> Labels:
    """Rotation of two dims, which must be whole."""
    names = plain(call.out, call.arguments["dims"])
    return by_argument(call, names, self=names)


RULES = {
    **rules_of(labelled(_expand, _local_size), aten.expand),
    **rules_of(verified(Rule(_repeat, _repeat_demand)), aten.repeat, aten.tile),
    **rules_of(Rule.by(_interleaved), aten.repeat_interleave),
    **rules_of(verified(Rule(_flip, _flip_demand)), aten.flip, aten.fliplr, aten.flipud),
    **rules_of(verified(Rule(_roll, _roll_demand)), aten.roll),
    **rules_of(labelled(_rot90), aten.rot90),
}
