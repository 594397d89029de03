"""Examples of pointwise operators, reductions and normalisations."""

from __future__ import annotations

import math

import torch
from ir_examples import Sample, aten, example, named

from xdit_ir.ir import ops

UNARY = [
    "clone",
    "alias",
    "detach",
    "lift",
    "lift_fresh",
    "lift_fresh_copy",
    "contiguous",
    "resolve_conj",
    "resolve_neg",
    "log_sigmoid",
    "hardswish",
    "isreal",
    "square",
    "negative",
    "absolute",
    "fix",
    "ones_like",
    "zeros_like",
    "silu",
    "gelu",
    "tanh",
    "exp",
    "sigmoid",
    "relu",
    "neg",
    "logical_not",
    "cos",
]
BINARY = [
    "multiply",
    "divide",
    "true_divide",
    "subtract",
    "floor_divide",
    "arctan2",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "not_equal",
    "add",
    "mul",
    "sub",
    "div",
    "maximum",
    "pow",
    "rsub",
]


@example(*named(*UNARY))
def unary(d, packet):
    return Sample(packet.default, (d.tensor(*d.sized()),))


@example(ops.watch, ops.reuse)
def of_a_step_cache(d, packet):
    shape = d.sized()
    return Sample(packet, (d.tensor(*shape), d.tensor(*shape)) if d.bool() else (d.tensor(*shape),))


@example(aten.real, aten.imag, aten._conj, aten._neg_view)
def complex_views(d, packet):
    return Sample(packet.default, (d.complex(*d.sized()),))


@example(aten.complex, aten.polar)
def to_complex(d, packet):
    shape = d.sized()
    return Sample(packet.default, (d.positive(*shape), d.positive(*shape)))


@example(*named(*BINARY))
def binary(d, packet):
    shape = d.sized()
    target = next(
        getattr(packet, name) for name in ("Tensor", "Tensor_Tensor", "default") if name in packet.overloads()
    )
    pair = [d.positive(*shape), d.positive(*d.broadcast(shape))]
    return Sample(target, tuple(pair if d.bool() else reversed(pair)))


@example(aten.multiply, aten.greater, aten.rsub)
def with_scalar(d, packet):
    return Sample(packet.Scalar, (d.tensor(*d.sized()), 0.5))


@example(aten.isclose, aten.copy, aten._prelu_kernel)
def with_broadcast(d, packet):
    shape = d.sized()
    return Sample(packet.default, (d.tensor(*shape), d.tensor(*d.broadcast(shape))))


@example(aten.__and__, aten.__or__)
def bits(d, packet):
    shape = d.sized()
    return Sample(packet.Tensor, (d.index(8, *shape), d.index(8, *d.broadcast(shape))))


@example(aten.type_as)
def type_as(d, packet):
    return Sample(packet.default, (d.tensor(*d.sized()), d.tensor(*d.sized(), dtype=torch.float32)))


@example(aten.bucketize)
def bucketize(d, packet):
    return Sample(packet.Tensor, (d.tensor(*d.sized()), d.tensor(d.int(1, 5)).sort().values))


@example(aten.isin)
def isin(d, packet):
    return Sample(packet.Tensor_Tensor, (d.index(5, *d.sized()), d.index(5, 3)))


@example(aten.expand_as)
def expand_as(d, packet):
    shape = d.sized()
    return Sample(packet.default, (d.tensor(*d.broadcast(shape)), d.tensor(*shape)))


@example(aten._to_copy, aten.full_like, aten.empty_like)
def new_dtype(d, packet):
    args = (d.tensor(*d.sized()), *((2.5,) if packet is aten.full_like else ()))
    return Sample(packet.default, args, {"dtype": torch.float32}, contents=packet is not aten.empty_like)


@example(aten.fill, aten.masked_fill)
def fill(d, packet):
    shape = d.sized()
    mask = (d.mask(*d.broadcast(shape)),) if packet is aten.masked_fill else ()
    if d.bool():
        return Sample(packet.Tensor, (d.tensor(*shape), *mask, d.tensor()))
    return Sample(packet.Scalar, (d.tensor(*shape), *mask, 0.5))


@example(aten.where)
def where(d, packet):
    shape = d.sized()
    if d.int(0, 3):
        some = [d.mask(*shape), d.tensor(*d.broadcast(shape)), d.tensor(*d.broadcast(shape))]
        return Sample(packet.self, tuple(some))
    return Sample(packet.ScalarOther, (d.mask(*shape), d.tensor(*d.broadcast(shape)), 0.5))


@example(aten.dropout, aten.alpha_dropout, aten.feature_dropout, aten.feature_alpha_dropout)
@example(aten.native_dropout, aten.log_sigmoid_forward)
def no_dropout(d, packet):
    args = () if packet is aten.log_sigmoid_forward else (0.5, False)
    return Sample(packet.default, (d.tensor(*d.sized()), *args), contents=packet is not aten.log_sigmoid_forward)


@example(aten.prelu)
def prelu(d, packet):
    shape = d.shape(d.int(2, 4))
    return Sample(packet.default, (d.tensor(*shape), d.tensor(d.pick(1, shape[1]))))


SOFT = [aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default]


@example(aten.softmax, aten.log_softmax, aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(d, packet):
    shape = d.sized()
    target = next((target for target in SOFT if target.overloadpacket is packet), aten._safe_softmax.default)
    extra = (False,) if target._schema.name in ("aten::_softmax", "aten::_log_softmax") else ()
    return Sample(target, (d.tensor(*shape), d.dim(len(shape)), *extra))


@example(*named("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "glu", "diff"))
def along(d, packet):
    shape = d.shape(d.int(1, 4))
    dim = d.dim(len(shape))
    if packet is aten.glu:
        shape = tuple(2 * n if i == dim % len(shape) else n for i, n in enumerate(shape))
    args = (1, dim) if packet is aten.diff else (dim,)
    return Sample(packet.default, (d.tensor(*shape), *args))


@example(aten.diff)
def diff(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.dim(len(shape))
    before = [2 if i == dim % len(shape) else n for i, n in enumerate(shape)]
    return Sample(packet.default, (d.tensor(*shape), 1, dim, d.tensor(*before)))


@example(aten.topk, aten.kthvalue)
def topk(d, packet):
    shape = d.shape(d.int(1, 3))
    dim = d.dim(len(shape))
    return Sample(packet.default, (d.tensor(*shape), d.int(1, shape[dim]), dim))


@example(*named("sum", "mean", "nansum", "nanmean", "amax", "amin", "logsumexp", "linalg_vector_norm", "norm"))
@example(*named("any", "all", "var", "std", "var_mean", "std_mean", "linalg_norm"))
def reduce_dims(d, packet):
    shape = d.sized() if packet in (aten.sum, aten.nansum) else d.shape(d.int(1, 4))
    dims = d.some(range(-len(shape), 0), least=1)
    keep = d.bool()
    x = d.tensor(*shape)
    if packet in (aten.any, aten.all):
        return Sample(packet.dim, (x > 0, dims[0], keep))
    if packet in (aten.sum, aten.mean):
        kwargs = {"dtype": torch.float32} if d.int(0, 3) == 3 else {}
        target = packet.dim_IntList if packet is aten.sum else packet.dim
        return Sample(target, (x, d.pick(dims, dims, dims, None), keep), kwargs)
    if packet is aten.norm:
        return Sample(packet.ScalarOpt_dim, (x, 2, dims, keep))
    if packet is aten.linalg_norm:
        return Sample(packet.default, (x, None, dims[:2], keep))
    if packet in (aten.var, aten.std, aten.var_mean, aten.std_mean):
        return Sample(packet.correction, (x, d.pick(dims, None)), {"correction": 0, "keepdim": keep})
    args = (2, dims, keep) if packet is aten.linalg_vector_norm else (dims, keep)
    return Sample(packet.default, (x, *args))


@example(*named("sum", "mean", "any", "all", "max", "min", "prod", "median", "argmax", "norm", "var", "count_nonzero"))
def reduce_all(d, packet):
    x = d.tensor(*d.shape(d.int(0, 3)))
    target = packet.Scalar if packet is aten.norm else packet.default
    args = (False,) if packet is aten.var else ()
    return Sample(target, (x > 0 if packet in (aten.any, aten.all) else x, *args))


@example(*named("argmax", "argmin", "max", "min", "median", "prod", "aminmax"))
def reduce_one(d, packet):
    shape = d.shape(d.int(1, 4))
    x, dim, keep = d.tensor(*shape), d.dim(len(shape)), d.bool()
    if packet is aten.aminmax:
        return Sample(packet.default, (x,), {"dim": dim, "keepdim": keep})
    target = packet.dim_int if packet is aten.prod else getattr(packet, "dim", None)
    return Sample(target if target is not None and "arg" not in str(packet) else packet.default, (x, dim, keep))


@example(aten.count_nonzero)
def count_nonzero(d, packet):
    shape = d.shape(d.int(1, 3))
    return Sample(packet.dim_IntList, (d.tensor(*shape) > 0, d.some(range(len(shape)), least=1)))


@example(aten.max, aten.min)
def larger(d, packet):
    shape = d.sized()
    return Sample(packet.other, (d.tensor(*shape), d.tensor(*d.broadcast(shape))))


@example(aten.cosine_similarity)
def cosine(d, packet):
    shape = d.shape(d.int(1, 4))
    return Sample(packet.default, (d.tensor(*shape), d.tensor(*d.broadcast(shape)), d.dim(len(shape))))


@example(aten.triu, aten.tril)
def triangle(d, packet):
    return Sample(packet.default, (d.tensor(*d.shape(d.int(2, 4))), d.int(-1, 1)))


@example(aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm)
def layer_norm(d, packet):
    shape = d.shape(d.int(1, 4))
    own = shape[d.int(0, len(shape) - 1) :]
    weights = [d.tensor(*own) if d.bool() else None for _ in range(2 if "layer" in str(packet) else 1)]
    return Sample(packet.default, (d.tensor(*shape), list(own), *weights, 1e-5))


@example(aten._weight_norm)
def weight_norm(d, packet):
    shape, dim = d.shape(d.int(2, 3)), d.int(0, 1)
    return Sample(
        packet.default, (d.tensor(*shape), d.tensor(*(n if i == dim else 1 for i, n in enumerate(shape))), dim)
    )


@example(aten.group_norm, aten.native_group_norm)
def group_norm(d, packet):
    groups = d.int(1, 3)
    shape = (d.int(1, 4), groups * d.int(1, 2), *d.shape(d.int(0, 2), low=2))
    if shape[1] // groups * len(shape[2:]) < 2:
        shape = (*shape, 3)
    x, weight, bias = d.tensor(*shape), d.tensor(shape[1]), d.tensor(shape[1])
    if packet is aten.group_norm:
        return Sample(packet.default, (x, groups, weight, bias))
    flat = x[0, 0].numel()
    return Sample(packet.default, (x, weight, None, shape[0], shape[1], flat, groups, 1e-5))


@example(aten.batch_norm, aten.native_batch_norm, aten._native_batch_norm_legit_no_training)
def batch_norm(d, packet):
    shape = (d.int(1, 4), d.int(1, 4), *d.shape(d.int(1, 2), low=2))
    x, weight, bias, mean = d.tensor(*shape), d.tensor(shape[1]), d.tensor(shape[1]), d.tensor(shape[1])
    args = (x, d.pick(weight, None), d.pick(bias, None), mean, d.positive(shape[1]))
    training = d.bool() if packet is aten.batch_norm and x[:, 0].numel() > 1 else False
    flags = () if "legit" in str(packet) else (training,)
    return Sample(packet.default, (*args, *flags, 0.1, 1e-5, *((False,) if packet is aten.batch_norm else ())))


@example(ops.moments)
def moments(d, packet):
    shape = d.shape(d.int(3, 5))
    return Sample(packet, (d.tensor(*shape), math.prod(shape[2:])))


def _runs(d):
    """A tensor, a dim of it, and lengths of its runs along that."""
    shape = d.shape(d.int(1, 3))
    dim = d.int(0, len(shape) - 1)
    first = d.int(0, shape[dim])
    return d.tensor(*shape), dim, tuple(length for length in (first, shape[dim] - first) if length)


@example(ops.run_sums)
def run_sums(d, packet):
    x, dim, lengths = _runs(d)
    return Sample(packet, (x, dim, lengths, torch.float32))


@example(ops.run_extremes)
def run_extremes(d, packet):
    return Sample(packet, (*_runs(d), d.bool()))


@example(ops.running_sum)
def running_sum(d, packet):
    x, dim, lengths = _runs(d)
    return Sample(packet, (x, ops.run_sums(x, dim, lengths, torch.float32), dim, lengths, torch.float32))


@example(ops.normalize)
def normalize(d, packet):
    shape = d.shape(d.int(3, 5))
    mean, weight, bias = d.tensor(*shape[:2]), d.tensor(*shape[1:3]), d.tensor(*shape[1:3])
    args = (torch.stack((mean, mean * mean + 1)), d.pick(weight, None), d.pick(bias, None), 1e-5)
    return Sample(packet, (d.tensor(*shape), *args))


@example(aten.instance_norm)
def instance_norm(d, packet):
    shape = (d.int(1, 4), d.int(1, 4), d.int(2, 5), d.int(1, 3))
    weight, bias = d.tensor(shape[1]), d.tensor(shape[1])
    running = (d.tensor(shape[1]), d.tensor(shape[1]).abs() + 1, False) if d.bool() else (None, None, True)
    return Sample(packet.default, (d.tensor(*shape), weight, bias, *running, 0.1, 1e-5, False))
