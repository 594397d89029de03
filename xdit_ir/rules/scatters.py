"""Writing into part of a value: slices, single indices, diagonals, and places that index tensors name."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from xdit_ir import ops
from xdit_ir.layout import Layout
from xdit_ir.partition import Partition
from xdit_ir.rules.base import Call, LocalCall, Rule, Ruling, by_size, choose, rules_of, verified
from xdit_ir.rules.joins import concat_partitions, section, slice_start
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain
from xdit_ir.rules.lookups import indexed

aten = torch.ops.aten


def _slice_scatter(call: Call) -> Ruling:
    """The source is divided like the slice that it replaces; a whole value like a divided source."""
    dim, step = call.arguments["dim"] % len(call.out.shape), call.arguments["step"]
    start, size = slice_start(call, dim), call.specs[1].shape[dim]

    def candidates() -> Iterator[tuple[int, Partition]]:
        for place in by_size(call):
            for at, partition in enumerate(call.layouts[place].dims):
                if at == dim and place == 1:
                    partition = _around(call, dim, partition)
                if partition is not None:
                    yield at, partition

    chosen = choose(call.mesh, candidates())
    own = chosen.get(dim)
    layout = Layout(tuple(chosen.get(d) for d in range(len(call.out.shape))))
    source = layout.with_dims({dim: section(own, start, size, step)})
    if own is None:
        return Ruling((layout, source), layout)

    def local(rank: int) -> LocalCall:
        runs = own.parts[rank].select(start, start + (size - 1) * step + 1, step)[1].runs
        return ops.put, (call.arguments["self"], call.arguments["src"], dim, runs), {}

    return Ruling((layout, source), layout, local)


def _around(call: Call, dim: int, source: Partition | None) -> Partition | None:
    """A partition of the whole dim whose slice is divided like the source; None where the value has its own."""
    own = call.layouts[0].dims[dim]
    if own is not None or source is None or call.arguments["step"] != 1:
        return None
    start = slice_start(call, dim)
    sizes = [start, source.size, call.out.shape[dim] - start - source.size]
    parts = [source if i == 1 else call.mesh.divide(n, call.varies(source)) for i, n in enumerate(sizes)]
    return concat_partitions(parts, sizes)


def _slice_scatter_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    dim = call.arguments["dim"] % len(call.out.shape)
    part = section(wanted.dims[dim], slice_start(call, dim), call.specs[1].shape[dim], call.arguments["step"])
    return (wanted, wanted.with_dims({dim: part}))


def _select_scatter(call: Call) -> Labels:
    dim = call.arguments["dim"] % len(call.out.shape)
    names = plain(call.out, [dim])
    return by_argument(call, names, self=names, src=(*names[:dim], *names[dim + 1 :]))


def _diagonal_scatter(call: Call) -> Labels:
    ndim = len(call.out.shape)
    pair = [call.arguments[name] % ndim for name in ("dim1", "dim2")]
    names = plain(call.out, pair)
    rest = tuple(name for d, name in enumerate(names) if d not in pair)
    return by_argument(call, names, self=names, src=(*rest, None))


def _scatter(call: Call) -> Labels:
    """Element by element along the other dims, as far as all have the same size there."""
    names = list(plain(call.out, [call.arguments["dim"]] if call.out.shape else []))
    for spec in call.specs:
        for d, size in enumerate(spec.shape):
            if size != call.out.shape[d]:
                names[d] = None
    same = tuple(names)
    return by_argument(call, same, self=same, index=same, src=same)


def _index_add(call: Call) -> Labels:
    """`index_add`, `index_copy`: rows of one dim; `index_fill` likewise with a single value."""
    if not call.out.shape:
        return by_argument(call, ())
    names = plain(call.out, [call.arguments["dim"]])
    return by_argument(call, names, self=names, source=names)


def _index_put(call: Call) -> Labels | str:
    """Writes at divided places would leave every rank with others of them, so that indices are whole."""
    labels = indexed(call)
    if isinstance(labels, str):
        return labels
    (own, *indices, _), (result,) = labels.operands, labels.results
    ndim = len(call.specs[call.slots.index("values")].shape)
    values = result[len(result) - ndim :]
    return Labels((own, *indices, values), (own,))


RULES = {
    **rules_of(verified(Rule(_slice_scatter, _slice_scatter_demand)), aten.slice_scatter),
    **rules_of(labelled(_select_scatter), aten.select_scatter),
    **rules_of(labelled(_diagonal_scatter), aten.diagonal_scatter),
    **rules_of(labelled(_scatter), aten.scatter, aten.scatter_add, aten.scatter_reduce),
    **rules_of(labelled(_index_add), aten.index_add, aten.index_copy, aten.index_fill),
    **rules_of(labelled(_index_put), aten.index_put, aten._unsafe_index_put),
}
