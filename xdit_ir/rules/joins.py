"""Joining and cutting along a dimension: cat, stack, split, slice, select and their inverses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, by_size, gather_all, rules_of, verified
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain

aten = torch.ops.aten


STACKS: dict[Any, int] = {
    aten.vstack.default: 0,
    aten.hstack.default: 1,
    aten.column_stack.default: 1,
    aten.dstack.default: 2,
}


def _dim(call: OpCall, ndim: int) -> int:
    """The dim along which an operator joins or cuts, not negative."""
    if "dim" not in call.arguments:
        return min(STACKS[call.node.target], ndim - 1)
    dim: int = call.arguments["dim"]
    return dim % ndim


def _cat(call: OpCall) -> OpSharding:
    """Every operand is divided along the joined dim over all mesh dims that divide any of them there."""
    if any(len(spec.shape) != len(call.out.shape) for spec in call.specs):
        return gather_all(call, "joins values of several ranks")
    dim = _dim(call, len(call.out.shape))
    shared, talk = _shared(call, dim)
    inputs = []
    for spec, layout in zip(call.specs, call.layouts, strict=True):
        mine = layout.dims[dim] if talk else None
        if talk:
            free = mine is not None and call.dividing_dims(mine) <= talk
            mine = call.mesh.refine(mine, talk) if mine and free else call.mesh.divide(spec.shape[dim], talk)
        dims = [mine if d == dim else shared.get(d) for d in range(len(spec.shape))]
        inputs.append(Layout(tuple(dims)))
    joined = concat_partitions([layout.dims[dim] for layout in inputs], [spec.shape[dim] for spec in call.specs])
    return OpSharding(tuple(inputs), inputs[0].with_dims({dim: joined}))


def _shared(call: OpCall, dim: int) -> tuple[dict[int, Partition], frozenset[str]]:
    """How the other dims are divided, and the mesh dims that divide `dim`: the largest operands decide."""
    shared: dict[int, Partition] = {}
    used: frozenset[str] = frozenset()
    talk: frozenset[str] = frozenset()
    for place in by_size(call):
        for at, partition in enumerate(call.layouts[place].dims):
            varies = call.dividing_dims(partition)
            if partition is None or varies & used:
                continue
            if at == dim:
                talk |= varies
            elif at not in shared and not varies & talk:
                shared[at] = partition
                used |= varies
    return shared, talk


def concat_partitions(parts: Sequence[Partition | None], sizes: Sequence[int]) -> Partition | None:
    """The partition of values joined along a dimension, of these sizes and divided like this."""
    world = next((len(p.parts) for p in parts if p is not None), None)
    if world is None:
        return None
    joined = [Indices(())] * world
    offset = 0
    for partition, size in zip(parts, sizes, strict=True):
        for rank in range(world):
            part = Indices.range(0, size) if partition is None else partition.parts[rank]
            joined[rank] = joined[rank].concat(part.shift(offset))
        offset += size
    return Partition(offset, tuple(joined))


def _cat_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    dim = _dim(call, len(call.out.shape))
    offset, result = 0, []
    for spec in call.specs:
        if len(spec.shape) != len(wanted.dims):
            return None
        size = spec.shape[dim]
        result.append(wanted.with_dims({dim: section(wanted.dims[dim], offset, size)}))
        offset += size
    return tuple(result)


@lru_cache(maxsize=1024)
def section(partition: Partition | None, start: int, size: int, step: int = 1) -> Partition | None:
    """The partition of the slice of `size` elements from `start`."""
    if partition is None:
        return None
    return partition.map(size, lambda part: part.select(start, start + (size - 1) * step + 1, step)[0])


def _stack(call: OpCall) -> Labels:
    dim = _dim(call, len(call.out.shape))
    names = tuple(range(len(call.out.shape) - 1))
    return by_argument(call, (*names[:dim], None, *names[dim:]), tensors=[names] * len(call.specs))


def _unbind(call: OpCall) -> Labels:
    dim = _dim(call, len(call.specs[0].shape))
    names = plain(call.specs[0], [dim])
    return by_argument(call, *((*names[:dim], *names[dim + 1 :]) for _ in call.results), self=names)


def _sections(call: OpCall, dim: int) -> list[tuple[int, int]]:
    """The `(start, size)` of every result of a split along `dim`, read off the results' shapes."""
    sizes = [spec.shape[dim] for spec in call.results]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _split(call: OpCall) -> OpSharding:
    if len(call.specs) > 1:
        return gather_all(call, "split at places that a tensor names")
    dim, layout = _dim(call, len(call.specs[0].shape)), call.layouts[0].summed()
    partition, sections = layout.dims[dim], _sections(call, dim)
    if partition is None:
        return OpSharding((layout,), (layout,) * len(sections))
    outputs = tuple(layout.with_dims({dim: section(partition, *place)}) for place in sections)

    def local(rank: int) -> LocalCall:
        part = partition.parts[rank]
        runs = tuple(part.select(start, start + size)[1].runs for start, size in sections)
        return ops.take_each, (call.arguments["self"], dim, runs), {}

    return OpSharding((layout,), outputs, local)


def _split_demand(call: OpCall, wanted: tuple[Layout, ...]) -> tuple[Layout, ...] | None:
    if len(call.specs) > 1:
        return None
    dim = _dim(call, len(call.specs[0].shape))
    sizes = [size for _, size in _sections(call, dim)]
    joined = concat_partitions([layout.dims[dim] for layout in wanted], sizes)
    return (wanted[0].with_dims({dim: joined}),)


def _slice(call: OpCall) -> OpSharding:
    if len(call.specs) > 1:
        return gather_all(call, "starts where a tensor says")
    dim, layout = _dim(call, len(call.out.shape)), call.layouts[0].summed()
    partition = layout.dims[dim]
    if partition is None:
        return OpSharding((layout,), layout)
    size, step = call.out.shape[dim], call.arguments.get("step", 1)
    start = slice_start(call, dim)
    output = layout.with_dims({dim: section(partition, start, size, step)})

    def local(rank: int) -> LocalCall:
        keep = partition.parts[rank].select(start, start + (size - 1) * step + 1, step)[1]
        return ops.take, (call.arguments["self"], dim, keep.runs), {}

    return OpSharding((layout,), output, local)


def slice_start(call: OpCall, dim: int) -> int:
    """Where a slice of (or into) the first operand begins."""
    start, size = call.arguments["start"] or 0, call.specs[0].shape[dim]
    return min(max(start + size if start < 0 else start, 0), size)


def _slice_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    """What is cut off is divided like what is kept."""
    dim = _dim(call, len(call.out.shape))
    partition = wanted.dims[dim]
    if partition is None or len(call.specs) > 1:
        return (wanted,) if len(call.specs) == 1 else None
    if call.arguments.get("step", 1) != 1:
        return None
    start, kept, size = slice_start(call, dim), partition.size, call.specs[0].shape[dim]
    sizes = [start, kept, size - start - kept]
    talk = call.dividing_dims(partition)
    parts = [partition if i == 1 else call.mesh.divide(n, talk) for i, n in enumerate(sizes)]
    return (wanted.with_dims({dim: concat_partitions(parts, sizes)}),)


def _select(call: OpCall) -> OpSharding:
    """Ranks that lack the selected index get it from one that has it."""
    shape, layout = call.specs[0].shape, call.layouts[0].summed()
    dim = _dim(call, len(shape))
    rest = (*layout.dims[:dim], *layout.dims[dim + 1 :])
    partition = layout.dims[dim]
    if partition is None:
        return OpSharding((layout,), Layout(rest))
    wanted = Indices.range(call.arguments["index"] % shape[dim], call.arguments["index"] % shape[dim] + 1)
    held = partition.map(partition.size, lambda part: part.concat(wanted.without(part)))

    def local(rank: int) -> LocalCall:
        ((place, _),) = held.parts[rank].positions(wanted).runs
        return aten.select.int, (call.arguments["self"], dim, place), {}

    needs = layout.with_dims({dim: held})
    return OpSharding((needs,), Layout(rest), local if needs.dims[dim] is not None else None)


def _select_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    dim = _dim(call, len(call.specs[0].shape))
    return (Layout((*wanted.dims[:dim], None, *wanted.dims[dim:])),)


CAT = verified(Rule(_cat, _cat_demand))
RULES = {
    **rules_of(CAT, aten.cat, aten.concat, aten.concatenate),
    **rules_of(CAT, aten.vstack, aten.hstack, aten.column_stack, aten.dstack),
    **rules_of(labelled(_stack), aten.stack),
    **rules_of(labelled(_unbind), aten.unbind),
    **rules_of(
        verified(Rule(_split, _split_demand)),
        aten.split,
        aten.split_with_sizes,
        aten.unsafe_split,
        aten.unsafe_split_with_sizes,
        aten.chunk,
        aten.unsafe_chunk,
        aten.tensor_split,
    ),
    **rules_of(verified(Rule(_slice, _slice_demand)), aten.slice, aten.narrow),
    **rules_of(verified(Rule(_select, _select_demand)), aten.select),
}
