"""Examples of reading and writing at places that index tensors name."""

from __future__ import annotations

import math

import torch
from ir_examples import Sample, aten, example

from xdit_ir.ir import ops
from xdit_ir.ir.partition import Indices


@example(aten.embedding)
def embedding(d, packet):
    rows = d.int(1, 6)
    return Sample(packet.default, (d.tensor(rows, d.int(1, 4)), d.index(rows, *d.shape(d.int(0, 3)))))


def indices(d, shape, masks):
    """Index tensors for some dims, that broadcast; or a mask."""
    ndim = len(shape)
    if masks and d.int(0, 3) == 3:
        first = d.int(0, ndim - 1)
        width = d.int(1, min(2, ndim - first))
        return [*[None] * first, d.mask(*shape[first : first + width])]
    common = d.shape(d.int(0, 2), high=4)
    places = d.some(range(ndim), least=1)
    return [d.index(n, *d.broadcast(common)) if i in places else None for i, n in enumerate(shape)]


@example(aten.index, aten._unsafe_index)
def index(d, packet):
    shape = d.shape(d.int(1, 4))
    return Sample(packet.Tensor, (d.tensor(*shape), indices(d, shape, packet is aten.index)))


@example(aten.index_put, aten._unsafe_index_put)
def index_put(d, packet):
    shape = d.shape(d.int(1, 3))
    x, where = d.tensor(*shape), indices(d, shape, packet is aten.index_put)
    values = d.tensor(*d.broadcast(aten.index(x, where).shape))
    return Sample(packet.default, (x, where, values, True))


@example(aten.index_select, aten.gather, aten.take_along_dim)
def pick(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.dim(len(shape))
    x = d.tensor(*shape)
    if packet is aten.index_select:
        return Sample(packet.default, (x, dim, d.index(shape[dim], d.int(0, 6))))
    if packet is aten.gather:
        own = [d.int(1, 5) if i == dim % len(shape) else d.pick(n, n, d.int(1, n)) for i, n in enumerate(shape)]
        return Sample(packet.default, (x, dim, d.index(shape[dim], *own)))
    own = [d.int(1, 5) if i == dim % len(shape) else d.pick(n, n, 1) for i, n in enumerate(shape)]
    return Sample(packet.default, (x, d.index(shape[dim], *own), dim))


@example(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.dim(len(shape))
    own = [d.int(1, n) if i == dim % len(shape) else d.pick(n, n, d.int(1, n)) for i, n in enumerate(shape)]
    where = torch.argsort(d.tensor(*shape), dim)[tuple(slice(n) for n in own)]
    x, source = d.tensor(*shape), d.tensor(*own)
    if packet is aten.scatter:
        return d.pick(Sample(packet.src, (x, dim, where, source)), Sample(packet.value, (x, dim, where, 0.5)))
    if packet is aten.scatter_add:
        return Sample(packet.default, (x, dim, where, source))
    return Sample(packet.two, (x, dim, where, source, "amax"))


@example(aten.index_add, aten.index_copy, aten.index_fill)
def index_write(d, packet):
    shape = list(d.shape(d.int(1, 3)))
    dim = d.dim(len(shape))
    x, count = d.tensor(*shape), d.int(1, shape[dim])
    where = d.distinct(shape[dim], count)
    shape[dim] = count
    if packet is aten.index_fill:
        return d.pick(
            Sample(packet.int_Scalar, (x, dim, where, 0.5)), Sample(packet.int_Tensor, (x, dim, where, d.tensor()))
        )
    return Sample(packet.default, (x, dim, where, d.tensor(*shape)))


@example(ops.take)
def take(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.int(0, len(shape) - 1)
    kept = Indices.of_array(d.distinct(shape[dim], d.int(0, shape[dim])).numpy())
    return Sample(packet, (d.tensor(*shape), dim, kept.runs))


@example(ops.put)
def put(d, packet):
    shape = list(d.shape(d.int(1, 3)))
    dim = d.int(0, len(shape) - 1)
    x, kept = d.tensor(*shape), Indices.of_array(d.distinct(shape[dim], d.int(0, shape[dim])).numpy())
    shape[dim] = kept.size
    return Sample(packet, (x, d.tensor(*shape), dim, kept.runs))


@example(aten.one_hot)
def one_hot(d, packet):
    return Sample(packet.default, (d.index(4, *d.shape(d.int(1, 3))), d.pick(-1, 5)))


@example(aten.searchsorted)
def searchsorted(d, packet):
    shape = d.shape(d.int(1, 3))
    rows = d.tensor(4) if d.bool() else d.tensor(*shape[:-1], 4)
    return Sample(packet.Tensor, (rows.sort().values, d.tensor(*shape)))


@example(aten.take, aten.masked_scatter, aten.masked_select, aten.nonzero)
def flat(d, packet):
    x = d.tensor(*d.shape(2))
    if packet is aten.take:
        return Sample(packet.default, (x, d.index(x.numel(), 2, 3)))
    mask = d.mask(*x.shape)
    rest = {aten.masked_scatter: (mask, d.tensor(x.numel())), aten.masked_select: (mask,), aten.nonzero: ()}[packet]
    return Sample(packet.default, (x, *rest))


@example(ops.upload)
def upload(d, packet):
    return Sample(packet, (d.tensor(*d.shape(2)),))


@example(ops.unpack)
def unpack(d, packet):
    shape = list(d.shape(d.int(0, 3)))
    start, behind = 8 * d.int(0, 2), d.int(0, 9)
    packed = d.index(256, start + math.prod(shape) * 8 + behind).to(torch.uint8)
    return Sample(packet, (packed, start, torch.int64, shape))
