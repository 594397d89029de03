"""Views that regroup or reorder dimensions: exact on index sets."""

from __future__ import annotations

import itertools
import operator
from functools import lru_cache

import torch

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, gather_all, rules_of, verified
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.labels import Labels, by_argument, handle_empty_parts, labelled, plain

aten = torch.ops.aten
Dims = tuple[Partition | None, ...]


def groups(ins: tuple[int, ...], outs: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Match dimensions of equal product: minimal groups of consecutive input dims and output dims.

    >>> groups((2, 16, 64), (2, 4, 4, 64))  # tokens as rows and columns
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    groups = []
    i = j = 0
    while i < len(ins) and j < len(outs):
        left, right = [i], [j]
        a, b = ins[i], outs[j]
        while a != b:
            if a < b:
                i += 1
                left.append(i)
                a *= ins[i]
            else:
                j += 1
                right.append(j)
                b *= outs[j]
        groups.append((left, right))
        i, j = i + 1, j + 1
    if i < len(ins) or j < len(outs):
        groups.append((list(range(i, len(ins))), list(range(j, len(outs)))))
    return groups


@lru_cache(maxsize=4096)
def _flatten(sizes: tuple[int, ...], dims: Dims) -> tuple[Indices, ...]:
    """Row-major flat indices that each rank holds of a product of dims, at least one of them divided.

    >>> halves = Partition(4, (Indices.range(0, 2), Indices.range(2, 4)))
    >>> [part.runs for part in _flatten((3, 4), (None, halves))]  # two ranks have half of each of three rows
    [((0, 2), (4, 2), (8, 2)), ((2, 2), (6, 2), (10, 2))]
    """
    world = next(len(dim.parts) for dim in dims if dim is not None)
    done: dict[tuple[Indices, ...], Indices] = {}
    result = []
    for rank in range(world):
        parts = tuple(
            Indices.range(0, size) if dim is None else dim.parts[rank] for size, dim in zip(sizes, dims, strict=True)
        )
        if parts not in done:
            flat = parts[0]
            for part, size in zip(parts[1:], sizes[1:], strict=True):
                flat = flat.outer(part, size)
            done[parts] = flat
        result.append(done[parts])
    return tuple(result)


def _factors(flat: Indices, sizes: tuple[int, ...]) -> list[Indices] | None:
    """The index sets, one per dim, of which flat indices are the row-major product; None if they are no product.

    >>> [one.runs for one in _factors(Indices(((4, 8),)), (3, 4)) or ()]  # the last two of three rows
    [((1, 2),), ((0, 4),)]
    >>> _factors(Indices(((2, 4),)), (3, 4))  # half a row and half of the next
    """
    found: list[Indices] = []
    for size in reversed(sizes[1:]):
        pair = flat.factor(size)
        if pair is None:
            return None
        flat, inner = pair
        found.insert(0, inner)
    return [flat, *found]


@lru_cache(maxsize=4096)
def _unflatten(parts: tuple[Indices, ...], sizes: tuple[int, ...]) -> Dims | None:
    """Split flat index sets into a product of dimensions; None where some rank's set is no product."""
    if not sizes:
        return None
    factors = {part: _factors(part, sizes) for part in set(parts) if part.size}
    if any(value is None for value in factors.values()):
        return None
    known = [value for value in factors.values() if value is not None]
    divided = [d for d, size in enumerate(sizes) if not all(value[d].is_whole(size) for value in known)]
    hollow = divided[0] if divided else 0
    empty = [Indices(()) if d == hollow else Indices.range(0, size) for d, size in enumerate(sizes)]
    rows = [factors.get(part) or empty for part in parts]
    columns = [Partition(size, tuple(row[d] for row in rows)) for d, size in enumerate(sizes)]
    return tuple(None if column.is_whole else column for column in columns)


@lru_cache(maxsize=8192)
def regroup(mesh: Mesh, ins: tuple[int, ...], outs: tuple[int, ...], dims: Dims) -> tuple[Dims, Dims]:
    """Dims of a view from shape `ins` to `outs`: the input's (divided anew where no product fits) and the output's.

    >>> mesh = Mesh.of(ulysses=2)
    >>> tokens = mesh.divide(12, ("ulysses",))
    >>> needs, gives = regroup(mesh, (12, 64), (4, 3, 64), (tokens, None))
    >>> needs == (tokens, None), [dim and dim.sizes for dim in gives]  # each rank has two of four rows
    (True, [(2, 2), None, None])
    >>> needs, gives = regroup(mesh, (12, 64), (3, 4, 64), (tokens, None))  # half of three rows is no product
    >>> [dim and dim.sizes for dim in (*needs, *gives)]  # the tokens are divided by rows before
    [(8, 4), None, (2, 1), None, None]
    """
    needs: list[Partition | None] = list(dims)
    gives: list[Partition | None] = [None] * len(outs)
    if 0 in ins:
        return (None,) * len(ins), tuple(gives)
    for left, right in groups(ins, outs):
        mine = tuple(dims[d] for d in left)
        if all(dim is None for dim in mine):
            continue
        kept, split = _divide(mesh, tuple(ins[d] for d in left), mine, tuple(outs[d] for d in right))
        for d, partition in zip(left, kept, strict=True):
            needs[d] = partition
        for d, partition in zip(right, split, strict=True):
            gives[d] = partition
    return tuple(needs), tuple(gives)


def _divide(mesh: Mesh, ins: tuple[int, ...], dims: Dims, outs: tuple[int, ...]) -> tuple[Dims, Dims]:
    """One group of a view: keep as many of the divided dims as give a product, outer ones first."""
    divided = [d for d, dim in enumerate(dims) if dim is not None]
    for count in range(len(divided), 0, -1):
        for keep in itertools.combinations(divided, count):
            kept = tuple(dim if d in keep else None for d, dim in enumerate(dims))
            split = _unflatten(_flatten(ins, kept), outs)
            if split is not None and _orthogonal(mesh, split):
                return kept, split
    return _divide_anew(mesh, ins, dims, outs) or ((None,) * len(ins), (None,) * len(outs))


def _divide_anew(mesh: Mesh, ins: tuple[int, ...], dims: Dims, outs: tuple[int, ...]) -> tuple[Dims, Dims] | None:
    """Where ranks hold no product: an even division of a dim of the result, to which the operand is brought; of the
    outermost that has something for every rank."""
    talk = frozenset[str]().union(*(mesh.dividing_dims(dim) for dim in dims))
    scarce: tuple[Dims, Dims] | None = None
    for d, size in enumerate(outs):
        for many in itertools.accumulate(ins[:-1], operator.mul, initial=1):
            if size % many or size // many < 2:
                continue
            segments = (size // many,) * many
            partition = mesh.divide(size, talk, 1, segments)
            split = tuple(partition if at == d else None for at in range(len(outs)))
            kept = _unflatten(_flatten(outs, split), ins)
            if kept is not None and _orthogonal(mesh, kept):
                if all(partition.sizes):
                    return kept, split
                scarce = scarce or (kept, split)
    return scarce


def _orthogonal(mesh: Mesh, dims: Dims) -> bool:
    used: set[str] = set()
    for dim in dims:
        varies = mesh.dividing_dims(dim)
        if varies & used:
            return False
        used |= varies
    return True


def _view(call: OpCall) -> OpSharding:
    needs, gives = regroup(call.mesh, call.specs[0].shape, call.out.shape, call.layouts[0].dims)
    output = Layout(gives)

    def local(rank: int) -> LocalCall:
        operand = call.arguments["self"]
        return aten.reshape.default, (operand, list(output.local_shape(call.out.shape, rank))), {}

    return OpSharding((Layout(needs),), output, local)


def _view_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    needs, gives = regroup(call.mesh, call.out.shape, call.specs[0].shape, wanted.dims)
    return (Layout(gives),) if needs == wanted.dims else None


def _dtype(call: OpCall) -> Labels:
    """`view.dtype`: the last dim is scaled where the element sizes differ."""
    same = call.out.dtype.itemsize == call.specs[0].dtype.itemsize
    names = plain(call.out, [] if same else [-1])
    return by_argument(call, names, self=names)


VIEW, DTYPE = verified(Rule(_view, _view_demand)), labelled(_dtype)


def _permutation(call: OpCall) -> Labels:
    """The labels of the operand in the order of the result."""
    ndim = len(call.specs[0].shape)
    arguments = call.arguments
    order = list(range(ndim))
    if "dims" in arguments:
        order = [d % ndim for d in arguments["dims"]]
    elif ndim:
        swapped = [arguments[name] for name in ("dim0", "dim1", "axis0", "axis1") if name in arguments]
        a, b = (d % ndim for d in swapped or (0, ndim - 1))
        order[a], order[b] = order[b], order[a]
    return by_argument(call, tuple(order), self=tuple(range(ndim)))


def _as_real(call: OpCall) -> Labels:
    names = plain(call.specs[0])
    return by_argument(call, (*names, None), self=names)


def _as_complex(call: OpCall) -> Labels:
    names = plain(call.out)
    return by_argument(call, names, self=(*names, None))


def _diagonal(call: OpCall) -> Labels:
    """The diagonal of two dims, which must be whole, becomes the last dim."""
    ndim, arguments = len(call.specs[0].shape), call.arguments
    pair = [arguments["dim1"] % ndim, arguments["dim2"] % ndim]
    names = plain(call.specs[0], pair)
    return by_argument(call, (*(name for d, name in enumerate(names) if d not in pair), None), self=names)


def _diag_embed(call: OpCall) -> Labels:
    ndim, arguments = len(call.out.shape), call.arguments
    pair = {arguments["dim1"] % ndim, arguments["dim2"] % ndim}
    rest = iter(range(ndim - 2))
    names = tuple(None if d in pair else next(rest) for d in range(ndim))
    return by_argument(call, names, self=(*range(ndim - 2), None))


def _unfold(call: OpCall) -> OpSharding:
    """Windows of a dim, the elements of which become the last dim: each rank makes those in the middle of its part."""
    layout = call.layouts[0].summed()
    if not layout.dims:
        return OpSharding((layout,), Layout.whole(1))
    dim, window = _window(call)
    partition = layout.dims[dim]
    made = None if partition is None else window.of(call.mesh, partition)
    needs = None if made is None else made.map(window.size, window.needed)
    output = Layout((*layout.with_dims({dim: made}).dims, None))
    return handle_empty_parts(call, OpSharding((layout.with_dims({dim: needs}),), output))


def _unfold_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    if wanted.dims[-1] is not None or not call.specs[0].shape:
        return None
    dim, window = _window(call)
    partition = wanted.dims[dim]
    if partition is not None and any(len(part.runs) > 1 for part in partition.parts):
        return None
    needs = None if partition is None else partition.map(window.size, window.needed)
    return (Layout(wanted.dims[:-1]).with_dims({dim: needs}),)


def _window(call: OpCall) -> tuple[int, Window]:
    given, shape = call.arguments, call.specs[0].shape
    dim = given["dimension"] % len(shape)
    return dim, Window.sliding(shape[dim], call.out.shape[dim], given["step"], 0, given["size"])


def _strided(call: OpCall) -> OpSharding:
    return gather_all(call, "depends on how the whole value lies in memory")


RULES = {
    **rules_of(
        Rule.by(lambda call: DTYPE if "dtype" in call.arguments else VIEW),
        aten.view,
        aten._unsafe_view,
        aten.reshape,
        aten.unsqueeze,
        aten.squeeze,
        aten.flatten,
        aten.unflatten,
    ),
    **rules_of(labelled(_permutation), aten.permute, aten.transpose, aten.t, aten.swapaxes, aten.swapdims),
    **rules_of(labelled(_as_real), aten.view_as_real),
    **rules_of(labelled(_as_complex), aten.view_as_complex),
    **rules_of(labelled(_diagonal), aten.diagonal),
    **rules_of(labelled(_diag_embed), aten.diag_embed),
    **rules_of(verified(Rule(_unfold, _unfold_demand)), aten.unfold),
    **rules_of(Rule(_strided), aten.as_strided, aten.as_strided_scatter),
}
