"""Rules from labels: most operators are described by which dimensions of operands and results belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xdit_ir.ir.graphs import nodes_in
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import SPEC, TensorSpec
from xdit_ir.rules.base import (
    LocalCall,
    Localize,
    OpCall,
    OpSharding,
    Rule,
    as_layouts,
    as_outputs,
    by_size,
    choose,
    gather_all,
)

aten = torch.ops.aten
Names = tuple[Any, ...]


@dataclass(frozen=True)
class Labels:
    """A label for every dimension of every operand and result; None: the dimension must be whole.

    Dimensions of one label are divided alike, except that an operand which is shorter there broadcasts and is whole.
    A label that a result lacks is reduced.
    """

    operands: tuple[Names, ...]
    results: tuple[Names, ...]


def by_argument(call: OpCall, *results: Names, **arguments: Names | Sequence[Names]) -> Labels:
    """Labels of the operands by the names of the arguments (a list of them for a list), whole where not named."""
    seen: dict[str, int] = {}
    named = []
    for slot, spec in zip(call.slots, call.specs, strict=True):
        names = arguments.get(slot)
        if isinstance(names, list):
            names = names[seen.get(slot, 0)]
            seen[slot] = seen.get(slot, 0) + 1
        named.append((None,) * len(spec.shape) if names is None else tuple(names))
    return Labels(tuple(named), results)


def plain(spec: TensorSpec, whole: Sequence[int] = ()) -> Names:
    """The dims of a value as labels, counted from 0; those in `whole` (negative ones from the end) have none."""
    ndim = len(spec.shape)
    without = {dim % ndim for dim in whole} if ndim else set()
    return tuple(None if dim in without else dim for dim in range(ndim))


def aligned(spec: TensorSpec, ndim: int) -> Names:
    """The dims of a value that broadcasts to `ndim` dims as the labels of those."""
    return tuple(range(ndim - len(spec.shape), ndim))


def unary(call: OpCall, whole: Sequence[int]) -> Labels:
    """Results of the shape of the operand, some dims of which must be whole; all else about it is whole."""
    return by_argument(call, *(plain(spec, whole) for spec in call.results), self=plain(call.out, whole))


def labelled(
    describe: Callable[[OpCall], Labels | str],
    local: Callable[[OpCall, OpSharding], Localize | None] | None = None,
    *,
    sums: bool = False,
) -> Rule:
    """The rule of an operator that `describe` describes; a string is the reason why it needs everything whole.

    `sums`: the operator is linear in every operand that has a reduced label, so that dividing it leaves a partial sum.
    """

    def forward(call: OpCall) -> OpSharding:
        labels = describe(call)
        if isinstance(labels, str):
            return gather_all(call, labels)
        sharding = _forward(call, labels, sums)
        if not _divides(sharding):
            return sharding
        make = local(call, sharding) if local is not None else None
        return handle_empty_parts(call, OpSharding(sharding.inputs, sharding.outputs, make))

    def demand(call: OpCall, wanted: Any) -> tuple[Layout, ...] | None:
        labels = describe(call)
        return None if isinstance(labels, str) else _demand(call, labels, as_layouts(wanted))

    return Rule(forward, demand)


def _divides(sharding: OpSharding) -> bool:
    return any(not layout.is_whole for layout in (*sharding.inputs, *as_layouts(sharding.outputs)))


def handle_empty_parts(call: OpCall, sharding: OpSharding) -> OpSharding:
    """Many kernels refuse empty operands or return something odd: a rank with no part of any result makes it itself."""
    layouts, make = as_layouts(sharding.outputs), sharding.local
    if not any(0 in dim.sizes for layout in layouts for dim in layout.dims if dim is not None):
        return sharding
    shapes = [
        [layout.local_shape(spec.shape, rank) for layout, spec in zip(layouts, call.results, strict=True)]
        for rank in range(call.mesh.world_size)
    ]
    empty = [all(0 in shape for shape in own) for own in shapes]

    def local(rank: int) -> LocalCall:
        if empty[rank]:
            return _nothing(call, shapes[rank])
        return (call.node.target, call.node.args, call.node.kwargs) if make is None else make(rank)  # type: ignore[return-value]

    return OpSharding(sharding.inputs, sharding.outputs, local, sharding.fallback)


def _nothing(call: OpCall, shapes: Sequence[tuple[int, ...]]) -> LocalCall:
    """On the device of the result: scalars may be on another one than the other operands."""
    operands = nodes_in((call.node.args, call.node.kwargs))
    source = next((node for node in operands if node.meta[SPEC].shape), operands[0])
    if len(shapes) == 1 and call.out is call.node.meta[SPEC]:
        moved = {name: device for name, device in call.node.kwargs.items() if name == "device" and device is not None}
        return aten.new_empty.default, (source, list(shapes[0])), {"dtype": call.out.dtype, **moved}
    return empties, (source, list(shapes), [spec.dtype for spec in call.results]), {}


def empties(x: torch.Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """Tensors without elements."""
    return [x.new_empty(tuple(shape), dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def _sizes(call: OpCall, labels: Labels) -> dict[Any, int]:
    sizes: dict[Any, int] = {}
    for spec, names in zip((*call.specs, *call.results), (*labels.operands, *labels.results), strict=True):
        for name, size in zip(names, spec.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 0))
    return sizes


def _forward(call: OpCall, labels: Labels, sums: bool) -> OpSharding:
    sizes = _sizes(call, labels)
    kept = set.intersection(*(set(names) for names in labels.results))

    def candidates() -> Iterator[tuple[Any, Partition]]:
        for place in by_size(call):
            for name, partition in zip(labels.operands[place], call.layouts[place].dims, strict=True):
                if name is None or partition is None or partition.size != sizes[name]:
                    continue
                once = partition if name in kept else call.mesh.apart(partition) if sums else None
                if once is not None:
                    yield name, once

    chosen = choose(call.mesh, candidates())
    reduced = (partition for name, partition in chosen.items() if name not in kept)
    partial = frozenset[str]().union(*(call.dividing_dims(partition) for partition in reduced))
    outputs = [Layout(dims, partial) for dims in _dims(call.results, labels.results, sizes, chosen)]
    inputs = tuple(Layout(dims) for dims in _dims(call.specs, labels.operands, sizes, chosen))
    return OpSharding(inputs, as_outputs(call, outputs))


def _dims(
    specs: Sequence[TensorSpec], named: Sequence[Names], sizes: dict[Any, int], chosen: dict[Any, Partition]
) -> list[tuple[Partition | None, ...]]:
    return [
        tuple(
            chosen.get(name) if name is not None and size == sizes[name] else None
            for name, size in zip(names, spec.shape, strict=True)
        )
        for spec, names in zip(specs, named, strict=True)
    ]


def _demand(call: OpCall, labels: Labels, wanted: tuple[Layout, ...]) -> tuple[Layout, ...] | None:
    sizes = _sizes(call, labels)
    chosen: dict[Any, Partition] = {}
    for names, layout in zip(labels.results, wanted, strict=True):
        for name, partition in zip(names, layout.dims, strict=True):
            if partition is not None:
                chosen[name] = partition
    inputs = tuple(Layout(dims) for dims in _dims(call.specs, labels.operands, sizes, chosen))
    sharding = _forward(OpCall(call.node, call.mesh, inputs), labels, sums=False)
    return inputs if as_layouts(sharding.outputs) == wanted and sharding.inputs == inputs else None
