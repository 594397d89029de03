"""Views that regroup, reorder or repeat dimensions: exact on index sets."""

from __future__ import annotations

from functools import lru_cache

import torch

from xdit_ir.layout import Layout
from xdit_ir.mesh import Mesh
from xdit_ir.partition import Indices, Partition
from xdit_ir.rules.base import Call, LocalCall, Rule, Ruling, dims_whole, rules_of, same_call

aten = torch.ops.aten
Dims = tuple[Partition | None, ...]


def groups(ins: tuple[int, ...], outs: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Match dimensions of equal product: minimal groups of consecutive input dims and output dims."""
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
    """Row-major flat indices that each rank holds of a product of dimensions, at least one of them divided."""
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
        return ()
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
    """Dims of a view from shape `ins` to `outs`: what the input must be (undivided where no product) and the output."""
    needs, gives = list(dims), [None] * len(outs)
    if 0 in ins:
        return (None,) * len(ins), tuple(gives)
    for left, right in groups(ins, outs):
        mine = tuple(dims[d] for d in left)
        if all(dim is None for dim in mine):
            continue
        split = _unflatten(_flatten(tuple(ins[d] for d in left), mine), tuple(outs[d] for d in right))
        if split is None or not _orthogonal(mesh, split):
            for d in left:
                needs[d] = None
            continue
        for d, partition in zip(right, split, strict=True):
            gives[d] = partition
    return tuple(needs), tuple(gives)


def _orthogonal(mesh: Mesh, dims: Dims) -> bool:
    used: set[str] = set()
    for dim in dims:
        varies = mesh.varies(dim)
        if varies & used:
            return False
        used |= varies
    return True


def _view(call: Call) -> Ruling:
    needs, gives = regroup(call.mesh, call.specs[0].shape, call.out.shape, call.layouts[0].dims)
    output = Layout(gives)

    def local(rank: int) -> LocalCall:
        operand = call.arguments["self"]
        return aten.reshape.default, (operand, list(output.local_shape(call.out.shape, rank))), {}

    return Ruling((Layout(needs),), output, local)


def _view_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    needs, gives = regroup(call.mesh, call.out.shape, call.specs[0].shape, wanted.dims)
    return (Layout(gives),) if needs == wanted.dims else None


def _permutation(call: Call) -> list[int]:
    """For every output dim the input dim."""
    ndim = len(call.specs[0].shape)
    arguments = call.arguments
    if "dims" in arguments:
        return [d % ndim for d in arguments["dims"]]
    order = list(range(ndim))
    a, b = (arguments["dim0"] % ndim, arguments["dim1"] % ndim) if "dim0" in arguments else (0, ndim - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _permute(call: Call) -> Ruling:
    layout = call.layouts[0].summed()
    return Ruling((layout,), Layout(tuple(layout.dims[d] for d in _permutation(call))))


def _permute_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    dims: list[Partition | None] = [None] * len(wanted.dims)
    for at, d in enumerate(_permutation(call)):
        dims[d] = wanted.dims[at]
    return (Layout(tuple(dims)),)


def _expand(call: Call) -> Ruling:
    layout = call.layouts[0].summed()
    shape, out = call.specs[0].shape, call.out.shape
    offset = len(out) - len(shape)
    dims = [None] * offset + [d if shape[i] == out[i + offset] else None for i, d in enumerate(layout.dims)]
    output = Layout(tuple(dims))
    return Ruling((layout,), output, lambda rank: same_call(call, size=list(output.local_shape(out, rank))))


def _expand_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    shape, out = call.specs[0].shape, call.out.shape
    offset = len(out) - len(shape)
    if any(wanted.dims[d] is not None and (d < offset or shape[d - offset] == 1) for d in range(len(out))):
        return None
    return (Layout(wanted.dims[offset:]),)


def _repeat_interleave(call: Call) -> Ruling:
    arguments = call.arguments
    dim, count = arguments["dim"], arguments["repeats"]
    if dim is None or not isinstance(count, int):
        return Ruling((Layout.whole(len(call.specs[0].shape)),), Layout.whole(len(call.out.shape)), fallback="flattened")
    layout = call.layouts[0].summed()
    partition = layout.dims[dim]
    if partition is None:
        return Ruling((layout,), layout)
    every = Indices.range(0, count)
    tiled = partition.map(partition.size * count, lambda part: part.outer(every, count))
    return Ruling((layout,), layout.with_dims({dim: tiled}), lambda rank: same_call(call, output_size=None))


def _repeat_interleave_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    arguments = call.arguments
    dim, count = arguments["dim"], arguments["repeats"]
    if dim is None or not isinstance(count, int):
        return None
    partition = wanted.dims[dim]
    if partition is None:
        return (wanted,)
    pairs = {part: part.factor(count) for part in set(partition.parts) if part.size}
    if any(pair is None or not pair[1].is_whole(count) for pair in pairs.values()):
        return None
    outer = partition.map(partition.size // count, lambda part: pairs[part][0] if part.size else part)  # type: ignore[index]
    return (wanted.with_dims({dim: outer}),)


def _repeat(call: Call) -> Ruling:
    counts = call.arguments["repeats"]
    offset = len(counts) - len(call.specs[0].shape)
    layout = call.layouts[0].summed()
    dims: list[Partition | None] = [None] * offset
    for partition, count in zip(layout.dims, counts[offset:], strict=True):
        if partition is not None and count != 1:
            every, size = Indices.range(0, count), partition.size
            partition = partition.map(size * count, lambda part, e=every, s=size: e.outer(part, s))  # type: ignore[misc]
        dims.append(partition)
    return Ruling((layout,), Layout(tuple(dims)))


def _repeat_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    counts = call.arguments["repeats"]
    offset = len(counts) - len(call.specs[0].shape)
    if any(dim is not None and count != 1 for dim, count in zip(wanted.dims, counts, strict=True)):
        return None
    return (Layout(wanted.dims[offset:]),)


def _reverse(call: Call) -> Ruling:
    """flip and roll: local along dims that are not divided."""
    dims = call.arguments["dims"] or range(len(call.out.shape))
    layout = dims_whole(call, 0, list(dims))
    return Ruling((layout,), layout)


def _as_real(call: Call) -> Ruling:
    layout = call.layouts[0].summed()
    return Ruling((layout,), Layout((*layout.dims, None)))


def _as_complex(call: Call) -> Ruling:
    layout = dims_whole(call, 0, [-1])
    return Ruling((layout,), Layout(layout.dims[:-1]))


RULES = {
    **rules_of(
        Rule(_view, _view_demand),
        aten.view,
        aten._unsafe_view,
        aten.reshape,
        aten.unsqueeze,
        aten.squeeze,
        aten.flatten,
        aten.unflatten,
    ),
    **rules_of(Rule(_permute, _permute_demand), aten.permute, aten.transpose, aten.t),
    **rules_of(Rule(_expand, _expand_demand), aten.expand),
    **rules_of(Rule(_repeat, _repeat_demand), aten.repeat),
    **rules_of(Rule(_repeat_interleave, _repeat_interleave_demand), aten.repeat_interleave),
    **rules_of(Rule(_reverse), aten.flip, aten.roll),
    **rules_of(Rule(_as_real, lambda call, wanted: (Layout(wanted.dims[:-1]),)), aten.view_as_real),
    **rules_of(Rule(_as_complex, lambda call, wanted: (Layout((*wanted.dims, None)),)), aten.view_as_complex),
}
