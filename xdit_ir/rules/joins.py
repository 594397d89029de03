"""Joining and cutting along a dimension: cat, stack, split, slice, select, scatter of slices, lookups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from xdit_ir import ops
from xdit_ir.layout import Layout
from xdit_ir.partition import Indices, Partition
from xdit_ir.program import SPEC
from xdit_ir.rules.base import (
    Call,
    LocalCall,
    Rule,
    Ruling,
    by_size,
    choose,
    dims_whole,
    rules_of,
)

aten = torch.ops.aten


def _shared_dims(call: Call, without: int) -> dict[int, Partition]:
    """The partitions of all dims but one, where all operands have equal sizes there."""

    def candidates() -> Iterator[tuple[int, Partition]]:
        for place in by_size(call):
            for dim, partition in enumerate(call.layouts[place].dims):
                if partition is not None and dim != without:
                    yield dim, partition

    return choose(call.mesh, candidates())


def _cat(call: Call) -> Ruling:
    dim = call.arguments["dim"] % len(call.out.shape)
    shared = _shared_dims(call, dim)
    taken = frozenset().union(*(call.varies(p) for p in shared.values()))
    parts = [layout.dims[dim] for layout in call.layouts]
    talk = frozenset().union(*(call.varies(p) for p in parts)) - taken
    inputs = []
    for spec, partition in zip(call.specs, parts, strict=True):
        mine: Partition | None = None
        if talk:
            keep = partition is not None and not call.varies(partition) & taken
            mine = partition if keep else call.mesh.divide(spec.shape[dim], talk)
        inputs.append(Layout(tuple(mine if d == dim else shared.get(d) for d in range(len(spec.shape)))))
    joined = _concat([layout.dims[dim] for layout in inputs], [s.shape[dim] for s in call.specs]) if talk else None
    return Ruling(tuple(inputs), inputs[0].with_dims({dim: joined}))


def _concat(parts: Sequence[Partition | None], sizes: Sequence[int]) -> Partition | None:
    world = next(len(p.parts) for p in parts if p is not None)
    joined = [Indices(())] * world
    offset = 0
    for partition, size in zip(parts, sizes, strict=True):
        for rank in range(world):
            part = Indices.range(0, size) if partition is None else partition.parts[rank]
            joined[rank] = joined[rank].concat(part.shift(offset))
        offset += size
    result = Partition(offset, tuple(joined))
    return None if result.is_whole else result


def _cat_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    dim = call.arguments["dim"] % len(call.out.shape)
    partition = wanted.dims[dim]
    offset, result = 0, []
    for spec in call.specs:
        size = spec.shape[dim]
        result.append(wanted.with_dims({dim: _section(partition, offset, size)}))
        offset += size
    return tuple(result)


def _section(partition: Partition | None, start: int, size: int, step: int = 1) -> Partition | None:
    """The partition of the slice of `size` elements from `start`."""
    if partition is None:
        return None
    result = partition.map(size, lambda part: part.select(start, start + (size - 1) * step + 1, step)[0])
    return None if result.is_whole else result


def _stack(call: Call) -> Ruling:
    ndim = len(call.out.shape)
    dim = call.arguments["dim"] % ndim
    shared = _shared_dims(call, -1)
    layout = Layout(tuple(shared.get(d) for d in range(ndim - 1)))
    return Ruling((layout,) * len(call.specs), Layout((*layout.dims[:dim], None, *layout.dims[dim:])))


def _stack_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    dim = call.arguments["dim"] % len(wanted.dims)
    if wanted.dims[dim] is not None:
        return None
    return (Layout(wanted.dims[:dim] + wanted.dims[dim + 1 :]),) * len(call.specs)


def _sections(call: Call) -> list[tuple[int, int]]:
    """The `(start, size)` of every result of a split along `dim`, read off the results' shapes."""
    dim = call.arguments["dim"]
    sizes = [spec.shape[dim] for spec in call.node.meta[SPEC]]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _split(call: Call) -> Ruling:
    dim = call.arguments["dim"] % len(call.specs[0].shape)
    layout = call.layouts[0].summed()
    partition = layout.dims[dim]
    sections = _sections(call)
    if partition is None:
        return Ruling((layout,), (layout,) * len(sections))
    outputs = tuple(layout.with_dims({dim: _section(partition, *section)}) for section in sections)

    def local(rank: int) -> LocalCall:
        part = partition.parts[rank]
        runs = tuple(part.select(start, start + size)[1].runs for start, size in sections)
        return ops.take_each, (call.arguments["self"], dim, runs), {}

    return Ruling((layout,), outputs, local)


def _split_demand(call: Call, wanted: tuple[Layout, ...]) -> tuple[Layout, ...] | None:
    dim = call.arguments["dim"] % len(call.specs[0].shape)
    if all(layout.dims[dim] is None for layout in wanted):
        return (wanted[0],)
    joined = _concat([layout.dims[dim] for layout in wanted], [size for _, size in _sections(call)])
    return (wanted[0].with_dims({dim: joined}),)


def _unbind_demand(call: Call, wanted: tuple[Layout, ...]) -> tuple[Layout, ...] | None:
    dim = call.arguments["dim"] % len(call.specs[0].shape)
    return (Layout((*wanted[0].dims[:dim], None, *wanted[0].dims[dim:])),)


def _unbind(call: Call) -> Ruling:
    dim = call.arguments["dim"] % len(call.specs[0].shape)
    layout = dims_whole(call, 0, [dim])
    kept = Layout(layout.dims[:dim] + layout.dims[dim + 1 :])
    return Ruling((layout,), (kept,) * len(call.node.meta[SPEC]))


def _slice(call: Call) -> Ruling:
    arguments = call.arguments
    dim, step = arguments["dim"] % len(call.out.shape), arguments["step"]
    layout = call.layouts[0].summed()
    partition = layout.dims[dim]
    if partition is None:
        return Ruling((layout,), layout)
    size = call.out.shape[dim]
    start = _start(arguments["start"], call.specs[0].shape[dim])
    output = layout.with_dims({dim: _section(partition, start, size, step)})

    def local(rank: int) -> LocalCall:
        keep = partition.parts[rank].select(start, start + (size - 1) * step + 1, step)[1]
        return ops.take, (arguments["self"], dim, keep.runs), {}

    return Ruling((layout,), output, local)


def _start(start: int | None, size: int) -> int:
    start = start or 0
    return min(max(start + size if start < 0 else start, 0), size)


def _slice_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    return (wanted,) if wanted.dims[call.arguments["dim"]] is None else None


def _select(call: Call) -> Ruling:
    dim = call.arguments["dim"] % len(call.specs[0].shape)
    layout = dims_whole(call, 0, [dim])
    return Ruling((layout,), Layout(layout.dims[:dim] + layout.dims[dim + 1 :]))


def _select_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    dim = call.arguments["dim"] % len(call.specs[0].shape)
    return (Layout((*wanted.dims[:dim], None, *wanted.dims[dim:])),)


def _slice_scatter(call: Call) -> Ruling:
    arguments = call.arguments
    dim, step = arguments["dim"] % len(call.out.shape), arguments["step"]
    chosen = choose(call.mesh, ((d, p) for i in by_size(call) for d, p in enumerate(call.layouts[i].dims) if p and d != dim))
    own = call.layouts[0].dims[dim]
    if own is not None and any(call.varies(own) & call.varies(p) for p in chosen.values()):
        own = None
    layout = Layout(tuple(own if d == dim else chosen.get(d) for d in range(len(call.out.shape))))
    if own is None:
        return Ruling((layout, layout), layout)
    start, size = _start(arguments["start"], call.out.shape[dim]), call.specs[1].shape[dim]
    source = layout.with_dims({dim: _section(own, start, size, step)})

    def local(rank: int) -> LocalCall:
        runs = own.parts[rank].select(start, start + (size - 1) * step + 1, step)[1].runs
        return ops.put, (arguments["self"], arguments["src"], dim, runs), {}

    return Ruling((layout, source), layout, local)


def _select_scatter(call: Call) -> Ruling:
    dim = call.arguments["dim"] % len(call.out.shape)
    layout = dims_whole(call, 0, [dim])
    return Ruling((layout, Layout(layout.dims[:dim] + layout.dims[dim + 1 :])), layout)


def _embedding(call: Call) -> Ruling:
    table, ids = Layout.whole(2), call.layouts[1].summed()
    return Ruling((table, ids), Layout((*ids.dims, None)))


def _embedding_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    return None if wanted.dims[-1] else (Layout.whole(2), Layout(wanted.dims[:-1]))


def _index(call: Call) -> Ruling:
    """`x[:, i, j]` with index tensors in adjacent places: other dims stay as they are, a single index may be divided."""
    indices = call.arguments["indices"]
    places = [d for d, index in enumerate(indices) if isinstance(index, fx.Node)]
    adjacent = places == list(range(places[0], places[-1] + 1))
    plain = all(call.specs[1 + i].dtype != torch.bool for i in range(len(places)))
    whole = Layout.whole(len(call.out.shape))
    if not (adjacent and plain):
        return Ruling(tuple(Layout.whole(len(s.shape)) for s in call.specs), whole, fallback="scattered index")
    layout = dims_whole(call, 0, places)
    index = call.layouts[1].summed() if len(places) == 1 else Layout.whole(len(call.specs[1].shape))
    taken = frozenset().union(*(call.varies(p) for p in layout.dims))
    if taken & index.varies(call.mesh):
        index = Layout.whole(len(index.dims))
    rest = tuple(Layout.whole(len(s.shape)) for s in call.specs[2:])
    shape_dims = index.dims if len(places) == 1 else (None,) * _broadcast_ndim(call)
    output = Layout((*layout.dims[: places[0]], *shape_dims, *layout.dims[places[-1] + 1 :]))
    return Ruling((layout, index, *rest), output)


def _broadcast_ndim(call: Call) -> int:
    return max(len(spec.shape) for spec in call.specs[1:])


def _index_select(call: Call) -> Ruling:
    dim = call.arguments["dim"] % len(call.out.shape)
    layout = dims_whole(call, 0, [dim])
    index = call.layouts[1].summed()
    if index.varies(call.mesh) & layout.varies(call.mesh):
        index = Layout.whole(1)
    return Ruling((layout, index), layout.with_dims({dim: index.dims[0] if index.dims else None}))


def _pad(call: Call) -> Ruling:
    amounts = call.arguments["pad"]
    ndim = len(call.out.shape)
    padded = [ndim - 1 - i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    layout = dims_whole(call, 0, padded)
    return Ruling((layout,), layout)


def _pad_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    amounts = call.arguments["pad"]
    ndim = len(call.out.shape)
    padded = [ndim - 1 - i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    return None if any(wanted.dims[d] for d in padded) else (wanted,)


RULES = {
    **rules_of(Rule(_cat, _cat_demand), aten.cat),
    **rules_of(Rule(_stack, _stack_demand), aten.stack),
    **rules_of(Rule(_split, _split_demand), aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split),
    **rules_of(Rule(_unbind, _unbind_demand), aten.unbind),
    **rules_of(Rule(_slice, _slice_demand), aten.slice, aten.narrow),
    **rules_of(Rule(_select, _select_demand), aten.select),
    **rules_of(Rule(_slice_scatter), aten.slice_scatter),
    **rules_of(Rule(_select_scatter), aten.select_scatter),
    **rules_of(Rule(_embedding, _embedding_demand), aten.embedding),
    **rules_of(Rule(_index), aten.index),
    **rules_of(Rule(_index_select), aten.index_select),
    **rules_of(Rule(_pad, _pad_demand), aten.constant_pad_nd, aten.pad),
}
