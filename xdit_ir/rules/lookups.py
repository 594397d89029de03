"""Reading at places that index tensors name: the indexed dim must be whole, the indices may be divided."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices, spread
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, gather_all, rules_of, same_call, verified
from xdit_ir.rules.labels import Labels, Names, by_argument, labelled, plain

aten = torch.ops.aten


def _embedding(call: OpCall) -> Labels:
    ids = plain(call.specs[call.slots.index("indices")])
    return by_argument(call, (*ids, "features"), weight=(None, "features"), indices=ids)


def indexed(call: OpCall) -> Labels | str:
    """`x[:, i, j]`: the other dims keep their labels; index tensors broadcast to dims of their own, and are free if
    there is no boolean mask among them."""
    given = call.arguments["indices"]
    count = sum(isinstance(index, fx.Node) for index in given)
    specs = call.specs[1 : 1 + count]
    masks = [spec.dtype in (torch.bool, torch.uint8) for spec in specs]
    widths = iter([len(spec.shape) if mask else 1 for spec, mask in zip(specs, masks, strict=True)])
    taken = _taken([next(widths) if isinstance(index, fx.Node) else None for index in given])
    if not taken:
        return "indexed by nothing"
    ndim = max(1 if mask else len(spec.shape) for spec, mask in zip(specs, masks, strict=True))
    free = not any(masks)
    fresh: Names = tuple(("index", d) if free else None for d in range(ndim))
    own = plain(call.specs[0], taken)
    names = [fresh[ndim - len(s.shape) :] if free else (None,) * len(s.shape) for s in specs]
    others = [(None,) * len(spec.shape) for spec in call.specs[1 + count :]]
    return Labels((own, *names, *others), (_replaced(own, taken, fresh),))


def _taken(widths: Sequence[int | None]) -> list[int]:
    """The dims that are indexed, by how many each entry of an index takes (None: a slice, which takes none).

    >>> _taken([None, 1, 2])  # x[:, i, mask] with a mask of two dims
    [1, 2, 3]
    """
    starts = itertools.accumulate((1 if width is None else width for width in widths), initial=0)
    return [start + d for start, width in zip(starts, widths, strict=False) for d in range(width or 0)]


def _replaced(own: Names, taken: Sequence[int], fresh: Names) -> Names:
    """Labels of a result: `fresh` ones stand where the dims `taken` were if those are adjacent, else in front.

    >>> _replaced(("a", None, None, "d"), [1, 2], ("i",)), _replaced((None, "b", None, "d"), [0, 2], ("i",))
    (('a', 'i', 'd'), ('i', 'b', 'd'))
    """
    at = taken[0] if len(taken) == taken[-1] + 1 - taken[0] else 0
    rest = [(d, name) for d, name in enumerate(own) if d not in taken]
    return (*(name for d, name in rest if d < at), *fresh, *(name for d, name in rest if d >= at))


def _index_select(call: OpCall) -> Labels:
    shape = call.specs[0].shape
    if not shape:
        return by_argument(call, (None,) * len(call.out.shape))
    dim = call.arguments["dim"] % len(shape)
    own = plain(call.specs[0], [dim])
    index: Names = ("index",) if call.specs[1].shape else ()
    result = (*own[:dim], index[0] if index else None, *own[dim + 1 :])
    return by_argument(call, result, self=own, index=index)


def _gather(call: OpCall) -> Labels:
    """Element by element along the other dims, where the sizes agree; the indices are free along `dim`."""
    own, index = call.specs[0].shape, call.out.shape
    if not index or not own:
        return by_argument(call, plain(call.out), index=plain(call.out))
    dim = call.arguments["dim"] % len(index)
    same = tuple(d if d != dim and own[d] == index[d] else None for d in range(len(index)))
    result = tuple(("index", d) if d == dim else name for d, name in enumerate(same))
    return by_argument(call, result, self=same, index=result)


def _take_along(call: OpCall) -> Labels | str:
    """`gather` that broadcasts the other dims."""
    dim = call.arguments["dim"]
    own, index = call.specs
    if dim is None or len(own.shape) != len(index.shape):
        return "take from the flattened value"
    dim %= len(own.shape)
    same = plain(own, [dim])
    result = tuple("index" if d == dim else name for d, name in enumerate(same))
    return by_argument(call, result, self=same, indices=result)


def _one_hot(call: OpCall) -> Labels:
    names = plain(call.specs[0])
    return by_argument(call, (*names, None), self=names)


def _searchsorted(call: OpCall) -> Labels | str:
    """Values to look up; the sorted sequence goes with them in all dims but its last one, or is 1-D."""
    slots = call.slots
    if "self" not in slots:
        return by_argument(call, (None,) * len(call.out.shape))
    names = plain(call.out)
    sequence = call.specs[slots.index("sorted_sequence")]
    rows: Names = (None,) if len(sequence.shape) == 1 else (*names[:-1], None)
    return by_argument(call, names, self=names, sorted_sequence=rows, sorter=rows)


def _take(call: OpCall) -> OpSharding:
    """A rank keeps those of the wanted positions that it holds, in their order."""
    layout, dim = call.layouts[0].summed(), call.arguments["dim"]
    partition, wanted = layout.dims[dim], Indices.of_runs(call.arguments["runs"])
    if partition is None:
        return OpSharding((layout,), layout)
    kept = partition.map(wanted.size, wanted.places_in)

    def local(rank: int) -> LocalCall:
        places = partition.parts[rank].positions(wanted.at(kept.parts[rank]))
        return ops.take, (call.arguments["x"], dim, places.runs), {}

    return OpSharding((layout,), layout.with_dims({dim: kept}), local)


def _take_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    """What is not taken is divided evenly."""
    dim = call.arguments["dim"]
    partition, taken, size = wanted.dims[dim], Indices.of_runs(call.arguments["runs"]), call.specs[0].shape[dim]
    if partition is None:
        return (wanted,)
    talk = call.dividing_dims(partition)
    return (wanted.with_dims({dim: spread(lambda n: call.mesh.divide(n, talk), partition, taken, size)}),)


def _flat(call: OpCall) -> OpSharding:
    return gather_all(call, "addresses the flattened value")


RULES = {
    **rules_of(labelled(_embedding), aten.embedding),
    **rules_of(labelled(indexed), aten.index, aten._unsafe_index),
    **rules_of(labelled(_index_select), aten.index_select),
    **rules_of(labelled(_gather), aten.gather),
    **rules_of(labelled(_take_along), aten.take_along_dim),
    **rules_of(
        labelled(_one_hot, lambda call, sharding: lambda rank: same_call(call, num_classes=call.out.shape[-1])),
        aten.one_hot,
    ),
    **rules_of(labelled(_searchsorted), aten.searchsorted),
    **rules_of(verified(Rule(_take, _take_demand)), ops.take),
    **rules_of(Rule(_flat), aten.take, aten.masked_scatter, aten.masked_select, aten.nonzero),
}
