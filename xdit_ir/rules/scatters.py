"""Writing into part of a value: slices, single indices, diagonals, and places that index tensors name."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices, Partition, selected, spread
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, by_size, choose, rules_of, verified
from xdit_ir.rules.joins import slice_start
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain
from xdit_ir.rules.lookups import indexed

aten = torch.ops.aten


def _places(call: OpCall) -> tuple[int, Indices]:
    """The dim into which `slice_scatter` or `put` writes, and where."""
    dim = call.arguments["dim"] % len(call.out.shape)
    if call.node.target is ops.put:
        return dim, Indices.of_runs(call.arguments["runs"])
    start, step, size = slice_start(call, dim), call.arguments["step"], call.specs[1].shape[dim]
    return dim, Indices.range(0, size).map(lambda array: array * step + start)


def _put(call: OpCall) -> OpSharding:
    """The source is divided like what it replaces; a whole value like a divided source."""
    dim, places = _places(call)

    def candidates() -> Iterator[tuple[int, Partition]]:
        for place in by_size(call):
            for at, partition in enumerate(call.layouts[place].dims):
                if at == dim and place == 1:
                    partition = _around(call, dim, places, partition)
                if partition is not None:
                    yield at, partition

    chosen = choose(call.mesh, candidates())
    own = chosen.get(dim)
    layout = Layout(tuple(chosen.get(d) for d in range(len(call.out.shape))))
    kept = selected(own, places)
    source = layout.with_dims({dim: kept})
    if own is None or kept is None:
        return OpSharding((layout, source), layout)

    def local(rank: int) -> LocalCall:
        runs = own.parts[rank].positions(places.at(kept.parts[rank])).runs
        return ops.put, (*call.node.args[:2], dim, runs), {}

    return OpSharding((layout, source), layout, local)


def _around(call: OpCall, dim: int, places: Indices, source: Partition | None) -> Partition | None:
    """A partition of the whole dim of which the places are divided like the source; None where it has its own."""
    if call.layouts[0].dims[dim] is not None or source is None:
        return None
    return spread(lambda n: call.mesh.divide(n, call.dividing_dims(source)), source, places, call.out.shape[dim])


def _put_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    dim, places = _places(call)
    return (wanted, wanted.with_dims({dim: selected(wanted.dims[dim], places)}))


def _select_scatter(call: OpCall) -> Labels:
    dim = call.arguments["dim"] % len(call.out.shape)
    names = plain(call.out, [dim])
    return by_argument(call, names, self=names, src=(*names[:dim], *names[dim + 1 :]))


def _diagonal_scatter(call: OpCall) -> Labels:
    ndim = len(call.out.shape)
    pair = [call.arguments[name] % ndim for name in ("dim1", "dim2")]
    names = plain(call.out, pair)
    rest = tuple(name for d, name in enumerate(names) if d not in pair)
    return by_argument(call, names, self=names, src=(*rest, None))


def _scatter(call: OpCall) -> Labels:
    """Element by element along the other dims, as far as all have the same size there."""
    names = list(plain(call.out, [call.arguments["dim"]] if call.out.shape else []))
    for spec in call.specs:
        for d, size in enumerate(spec.shape):
            if size != call.out.shape[d]:
                names[d] = None
    same = tuple(names)
    return by_argument(call, same, self=same, index=same, src=same)


def _index_add(call: OpCall) -> Labels:
    """`index_add`, `index_copy`: rows of one dim; `index_fill` likewise with a single value."""
    if not call.out.shape:
        return by_argument(call, ())
    names = plain(call.out, [call.arguments["dim"]])
    return by_argument(call, names, self=names, source=names)


def _index_put(call: OpCall) -> Labels | str:
    """Writes at divided places would leave every rank with others of them, so that indices are whole."""
    labels = indexed(call)
    if isinstance(labels, str):
        return labels
    (own, *indices, _), (result,) = labels.operands, labels.results
    ndim = len(call.specs[call.slots.index("values")].shape)
    values = result[len(result) - ndim :]
    return Labels((own, *indices, values), (own,))


RULES = {
    **rules_of(verified(Rule(_put, _put_demand)), aten.slice_scatter, ops.put),
    **rules_of(labelled(_select_scatter), aten.select_scatter),
    **rules_of(labelled(_diagonal_scatter), aten.diagonal_scatter),
    **rules_of(labelled(_scatter), aten.scatter, aten.scatter_add, aten.scatter_reduce),
    **rules_of(labelled(_index_add), aten.index_add, aten.index_copy, aten.index_fill),
    **rules_of(labelled(_index_put), aten.index_put, aten._unsafe_index_put),
}
