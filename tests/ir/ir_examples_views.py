"""Examples of views, repeats, joins, and writes into slices."""

from __future__ import annotations

import itertools
import math

import torch
from ir_examples import Sample, aten, example, named


def refactored(d, shape):
    """Another shape of the same size: neighbours merged, sizes split, ones put in and taken out."""
    sizes = [1 + factor for n in shape for factor in split(d, n)]
    result = []
    for size in sizes:
        if result and d.int(0, 2) == 2:
            result[-1] *= size
        else:
            result.append(size)
        if d.int(0, 5) == 5:
            result.append(1)
    return [n for n in result if n != 1 or d.bool()]


def split(d, size):
    divisors = [n for n in range(2, size) if size % n == 0]
    if not divisors or d.bool():
        return [size - 1]
    first = d.pick(*divisors)
    pair = [first, size // first]
    return [n - 1 for n in pair]


@example(aten.view, aten.reshape, aten._unsafe_view)
def view(d, packet):
    shape = tuple(d.pick(1, 2, 3, 4, 6, 8) for _ in range(d.int(1, 4)))
    return Sample(packet.default, (d.tensor(*shape), refactored(d, shape)))


@example(aten.view)
def view_dtype(d, packet):
    shape = d.shape(d.int(1, 3))
    return Sample(packet.dtype, (d.tensor(*shape), d.pick(torch.int64, torch.int32)))


@example(aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten)
def small_views(d, packet):
    shape = tuple(d.pick(1, 1, 2, 4, 6) for _ in range(d.int(1, 4)))
    x, dim = d.tensor(*shape), d.dim(len(shape))
    if packet is aten.unsqueeze:
        return Sample(packet.default, (x, dim))
    if packet is aten.squeeze:
        return d.pick(Sample(packet.default, (x,)), Sample(packet.dim, (x, dim)), Sample(packet.dims, (x, [dim])))
    if packet is aten.flatten:
        first = d.int(0, len(shape) - 1)
        return Sample(packet.using_ints, (x, first, d.int(first, len(shape) - 1)))
    width = d.pick(*(n for n in range(1, 7) if shape[dim] % n == 0))
    return Sample(packet.int, (x, dim, [shape[dim] // width, width]))


@example(aten.permute, aten.transpose, aten.t, aten.swapaxes, aten.swapdims)
def permute(d, packet):
    ndim = d.int(0, 2) if packet is aten.t else d.int(1, 4)
    x = d.tensor(*d.shape(ndim))
    if packet is aten.permute:
        order = d.some(range(ndim), least=ndim)
        return Sample(packet.default, (x, [n - d.pick(0, ndim) for n in order]))
    args = () if packet is aten.t else (d.dim(ndim), d.dim(ndim))
    return Sample(packet.int if packet is aten.transpose else packet.default, (x, *args))


@example(aten.view_as_real, aten.view_as_complex)
def reals(d, packet):
    shape = d.sized()
    return Sample(packet.default, (d.complex(*shape) if "real" in str(packet) else d.tensor(*shape, 2),))


@example(aten.diagonal, aten.diag_embed)
def diagonals(d, packet):
    ndim = d.int(2, 4)
    shape = d.shape(ndim if packet is aten.diagonal else ndim - 1)
    a, b = d.some(range(ndim), least=2)[:2]
    return Sample(packet.default, (d.tensor(*shape), d.int(-1, 1), a, b - d.pick(0, ndim)))


@example(aten.unfold)
def unfold(d, packet):
    shape = d.shape(d.int(1, 3), low=2)
    dim = d.dim(len(shape))
    return Sample(packet.default, (d.tensor(*shape), dim, d.int(1, shape[dim]), d.int(1, 2)))


@example(aten.as_strided, aten.as_strided_scatter)
def strided(d, packet):
    x = d.tensor(4, 6)
    source = () if packet is aten.as_strided else (d.tensor(2, 3),)
    return Sample(packet.default, (x, *source, [2, 3], [6, 2], d.int(0, 1)))


@example(aten.expand)
def expand(d, packet):
    shape = d.sized()
    given = d.broadcast(shape)
    size = [*d.shape(d.int(0, 1)), *shape]
    kept = [d.pick(n, -1) if m == n else n for m, n in zip(given[::-1], size[::-1], strict=False)]
    return Sample(packet.default, (d.tensor(*given), size[: len(size) - len(kept)] + kept[::-1]))


@example(aten.repeat, aten.tile)
def repeat(d, packet):
    shape = d.sized()
    counts = [d.pick(1, 1, 2, 3) for _ in range(len(shape) + d.int(0, 1))]
    short = counts[d.int(0, len(counts) - 1) :] if packet is aten.tile else counts
    return Sample(packet.default, (d.tensor(*shape), short))


@example(aten.repeat_interleave)
def repeat_interleave(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.pick(None, *range(-len(shape), len(shape)))
    if d.bool():
        return Sample(packet.self_int, (d.tensor(*shape), d.int(1, 3), dim))
    size = math.prod(shape) if dim is None else shape[dim]
    counts = d.index(3, size)
    return Sample(packet.self_Tensor, (d.tensor(*shape), counts, dim), {"output_size": int(counts.sum())})


@example(aten.fliplr, aten.flipud)
def flip_one(d, packet):
    return Sample(packet.default, (d.tensor(*d.shape(d.int(2, 3))),))


@example(aten.flip, aten.roll, aten.rot90)
def reorder(d, packet):
    shape = d.shape(d.int(2, 4))
    dims = d.some(range(-len(shape), 0))
    if packet is aten.roll:
        shifts = [d.int(-3, 8) for _ in dims] if dims else [d.int(-3, 8)]
        return Sample(packet.default, (d.tensor(*shape), shifts, dims))
    if packet is aten.rot90:
        return Sample(packet.default, (d.tensor(*shape), d.int(0, 3), d.some(range(len(shape)), least=2)[:2]))
    return Sample(packet.default, (d.tensor(*shape), dims))


@example(aten.cat, aten.concat, aten.concatenate)
def cat(d, packet):
    shape = list(d.shape(d.int(1, 3)))
    dim = d.dim(len(shape))
    values = []
    for _ in range(d.int(1, 3)):
        shape[dim] = d.int(0, 6)
        values.append(d.tensor(*shape))
    return Sample(packet.default, (values, dim))


@example(aten.vstack, aten.hstack, aten.column_stack, aten.dstack)
def stack_along(d, packet):
    shape = list(d.shape(d.int(1, 4)))
    dim = {aten.vstack: 0, aten.dstack: 2}.get(packet, min(1, len(shape) - 1))
    values = []
    for _ in range(d.int(1, 3)):
        if len(shape) > dim and (len(shape) > 1 or packet is aten.hstack):
            shape[dim] = d.int(1, 4)
        values.append(d.tensor(*shape))
    return Sample(packet.default, (values,))


@example(aten.cat)
def cat_twice(d, packet):
    x = d.tensor(*d.shape(2))
    return Sample(packet.default, ([x, x, d.tensor(0)] if d.bool() else [x, x], d.dim(2)))


@example(aten.stack)
def stack(d, packet):
    shape = d.sized()
    return Sample(packet.default, ([d.tensor(*shape) for _ in range(d.int(1, 3))], d.dim(len(shape) + 1)))


@example(*named("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk"))
@example(aten.tensor_split, aten.unbind)
def split_up(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.dim(len(shape))
    x, size = d.tensor(*shape), shape[dim]
    if packet is aten.unbind:
        return Sample(packet.int, (x, dim))
    if packet is aten.tensor_split:
        return d.pick(
            Sample(packet.sections, (x, d.int(1, 4), dim)),
            Sample(packet.indices, (x, sorted(d.int(0, size) for _ in range(2)), dim)),
            Sample(packet.tensor_indices_or_sections, (x, torch.tensor(2), dim)),
        )
    if "sizes" in str(packet):
        cuts = sorted(d.int(0, size) for _ in range(d.int(0, 2)))
        return Sample(packet.default, (x, [b - a for a, b in itertools.pairwise([0, *cuts, size])], dim))
    target = packet.Tensor if "split" in str(packet) else packet.default
    return Sample(target, (x, d.int(1, 4), dim))


@example(aten.slice, aten.narrow, aten.select)
def cut(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.dim(len(shape))
    x, size = d.tensor(*shape), shape[dim]
    if packet is aten.select:
        return Sample(packet.int, (x, dim, d.dim(size)))
    if packet is aten.narrow:
        start = d.int(0, size)
        return d.pick(
            Sample(packet.default, (x, dim, start - d.pick(0, size if start < size else 0), d.int(0, size - start))),
            Sample(packet.Tensor, (x, dim, torch.tensor(start), d.int(0, size - start))),
        )
    return Sample(packet.Tensor, (x, dim, d.pick(None, d.int(-size - 1, size)), d.int(-size, size + 1), d.int(1, 3)))


@example(aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter)
def scatter_part(d, packet):
    shape = d.shape(d.int(2, 3))
    x, dim = d.tensor(*shape), d.dim(len(shape))
    if packet is aten.select_scatter:
        index = d.dim(shape[dim])
        return Sample(packet.default, (x, d.tensor(*x.select(dim, index).shape), dim, index))
    if packet is aten.diagonal_scatter:
        pair = d.some(range(len(shape)), least=2)[:2]
        return Sample(packet.default, (x, d.tensor(*x.diagonal(0, *pair).shape), 0, *pair))
    place = (dim, d.int(-shape[dim], shape[dim]), d.int(0, shape[dim]), d.pick(1, 1, 2))
    return Sample(packet.default, (x, d.tensor(*aten.slice(x, *place).shape), *place))
