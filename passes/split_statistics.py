"""`split-statistics`: norms over what is divided take statistics of each part, which ranks add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import all_graphs, bound_arguments, map_graphs, operands, remove_dead
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.rules.norms import LOG_SOFTMAXES, SOFTMAXES, SPREADS, divided_statistics
from xdit_ir.rules.reductions import combined_dims, softmax_dims
from xdit_ir.rules.running import lengths_of_runs

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitStatistics:
    """Write norms that are taken over a divided dim with sums, which ranks exchange once: a part's sum or mean of
    squares, or its mean and variance, of which those of the whole are made in double precision; softmax with the
    largest element and the sum of powers of each. Norms over what every rank holds stay one operator. Sums that run
    along a divided dim go on from those of the parts before, likewise.
    """

    name: ClassVar[str] = "split-statistics"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTENTION})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    def apply(self, program: Program) -> Program:
        """The program whose norms each rank can compute with what the layouts give it."""
        mesh = program.mesh
        if mesh is None or not any(_divided(graph, mesh) for _, graph, _ in all_graphs(program)):
            return program
        return map_graphs(program, lambda graph: _split(graph, mesh))


def _divided(graph: fx.Graph, mesh: Mesh) -> list[fx.Node]:
    """The norms whose statistics are divided."""
    norms = (node for node in graph.nodes if node.target in WRITERS)
    return [node for node in norms if divided_statistics(node, operands(node)[0].meta[LAYOUT], mesh)]


def _split(graph: fx.Graph, mesh: Mesh) -> None:
    for node in _divided(graph, mesh):
        emitter = Emitter(graph, node, mesh)
        new = WRITERS[node.target](emitter, bound_arguments(node))
        if isinstance(new, tuple):
            for user in [*node.users]:
                user.replace_all_uses_with(emitter.relayout(new[user.args[1]], user.meta[LAYOUT]))  # type: ignore[index]
        else:
            node.replace_all_uses_with(emitter.relayout(new, node.meta[LAYOUT]))
    remove_dead(graph)


def _group_norm(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    return _grouped(emitter, given, given["num_groups"])


def _instance_norm(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    return _grouped(emitter, given, given["input"].meta[SPEC].shape[1])


def _grouped(emitter: Emitter, given: dict[str, Any], groups: int) -> fx.Node:
    """Normalise over the channels of a group and all that is behind them."""
    batch, channels, *space = given["input"].meta[SPEC].shape
    split = [groups, channels // groups, *space]
    x = emitter.reshape(given["input"], [batch, *split])
    parts = emitter.emit(ops.moments, x, math.prod(split[1:]))
    total = emitter.relayout(parts, parts.meta[LAYOUT].summed())
    weights = (one and emitter.reshape(one, split[:2]) for one in (given["weight"], given["bias"]))
    weight, bias = (one and emitter.relayout(one, Layout(x.meta[LAYOUT].dims[1:3])) for one in weights)
    return emitter.reshape(emitter.emit(ops.normalize, x, total, weight, bias, given["eps"]), (batch, channels, *space))


def _euclidean(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """The root of a sum of squares."""
    x: fx.Node = given["self"]
    dtype = x.meta[SPEC].dtype
    x = emitter.cast(x, torch.promote_types(dtype, torch.float32))
    squares = emitter.emit(aten.mul.Tensor, x, x)
    parts = emitter.emit(aten.sum.dim_IntList, squares, given["dim"] or None, given["keepdim"])
    total = emitter.relayout(parts, parts.meta[LAYOUT].summed())
    return emitter.cast(emitter.emit(aten.sqrt.default, total), dtype)


def _layer_norm(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """Rows one by one, as groups of their own."""
    shape = given["input"].meta[SPEC].shape
    features = shape[-1]
    x = emitter.reshape(given["input"], [math.prod(shape[:-1]), 1, features])
    parts = emitter.emit(ops.moments, x, features)
    total = emitter.relayout(parts, parts.meta[LAYOUT].summed())
    weight, bias = (one and emitter.reshape(one, [1, features]) for one in (given["weight"], given["bias"]))
    return emitter.reshape(emitter.emit(ops.normalize, x, total, weight, bias, given["eps"]), shape)


def _rms_norm(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """Over the root of a mean of squares."""
    source: fx.Node = given["input"]
    dtype, eps = source.meta[SPEC].dtype, given["eps"]
    x = emitter.cast(source, torch.promote_types(dtype, torch.float32))
    squares = emitter.emit(aten.mul.Tensor, x, x)
    parts = emitter.emit(aten.mean.dim, squares, [-1], True)
    total = emitter.relayout(parts, parts.meta[LAYOUT].summed())
    total = emitter.emit(aten.add.Tensor, total, torch.finfo(dtype).eps if eps is None else eps)
    x = emitter.emit(aten.mul.Tensor, x, emitter.emit(aten.rsqrt.default, total))
    x = x if given["weight"] is None else emitter.emit(aten.mul.Tensor, x, given["weight"])
    return emitter.cast(x, dtype)


def _weight_norm(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """Each row scaled to a length that is given."""
    weight: fx.Node = given["v"]
    dims = [dim for dim in range(len(weight.meta[SPEC].shape)) if dim != given["dim"]]
    length = _euclidean(emitter, {"self": weight, "dim": dims, "keepdim": True})
    return emitter.emit(aten.mul.Tensor, weight, emitter.emit(aten.div.Tensor, given["g"], length))


def _cumsum(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """Each rank's own, which goes on from the sums of the parts before."""
    x: fx.Node = given["self"]
    layout, shape = x.meta[LAYOUT], x.meta[SPEC].shape
    dim, dtype = given["dim"] % len(shape), emitter.node.meta[SPEC].dtype
    assert emitter.mesh is not None
    lengths = lengths_of_runs(emitter.mesh, layout.dims[dim])
    parts = emitter.emit(ops.run_sums, x, dim, lengths, dtype)
    total = emitter.relayout(parts, parts.meta[LAYOUT].with_dims({dim: None}))
    return emitter.emit(ops.running_sum, x, total, dim, lengths, dtype)


def _extreme(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    return _of_parts(emitter, given["self"], emitter.node.target, combined_dims(given), given["keepdim"])


def _of_parts(emitter: Emitter, x: fx.Node, target: Any, dims: Sequence[int], keepdim: bool) -> fx.Node:
    """The largest or smallest element of each rank's part, of all of which there is one number each."""
    assert emitter.mesh is not None
    runs = {dim: lengths_of_runs(emitter.mesh, x.meta[LAYOUT].dims[dim]) for dim in dims}
    for dim, lengths in runs.items():
        if lengths:
            x = emitter.emit(ops.run_extremes, x, dim, lengths, target is aten.amax.default)
        else:
            x = emitter.emit(target, x, [dim], True)
    x = emitter.relayout(x, x.meta[LAYOUT].with_dims(dict.fromkeys(dims)))
    return emitter.emit(target, x, [*dims], keepdim)


def _powers(emitter: Emitter, x: fx.Node, largest: fx.Node, dims: Sequence[int]) -> tuple[fx.Node, fx.Node, fx.Node]:
    """What is less than the largest element by how much, e to the power of that, and the sum of these."""
    lower = emitter.emit(aten.sub.Tensor, x, largest)
    powers = emitter.emit(aten.exp.default, lower)
    parts = emitter.emit(aten.sum.dim_IntList, powers, [*dims], True)
    return lower, powers, emitter.relayout(parts, parts.meta[LAYOUT].summed())


def _softmax(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """Shares, or their logarithms, by the largest element and the sum of powers of all parts."""
    dtype, dims = emitter.node.meta[SPEC].dtype, softmax_dims(given)
    x = emitter.cast(given["self"], torch.promote_types(dtype, torch.float32))
    lower, powers, total = _powers(emitter, x, _of_parts(emitter, x, aten.amax.default, dims, True), dims)
    if emitter.node.target in SOFTMAXES:
        return emitter.cast(emitter.emit(aten.div.Tensor, powers, total), dtype)
    return emitter.cast(emitter.emit(aten.sub.Tensor, lower, emitter.emit(aten.log.default, total)), dtype)


def _logsumexp(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """The same sum's logarithm, to which the largest element is added again, but for one that is infinite."""
    node, dims = emitter.node, combined_dims(given)
    x = emitter.cast(given["self"], torch.promote_types(node.meta[SPEC].dtype, torch.float32))
    largest = _of_parts(emitter, x, aten.amax.default, dims, True)
    infinite = emitter.emit(aten.isinf.default, largest)
    largest = emitter.emit(aten.masked_fill.Scalar, largest, infinite, 0)
    _, _, total = _powers(emitter, x, largest, dims)
    found = emitter.emit(aten.add.Tensor, emitter.emit(aten.log.default, total), largest)
    return emitter.cast(emitter.reshape(found, node.meta[SPEC].shape), node.meta[SPEC].dtype)


def _spread(emitter: Emitter, given: dict[str, Any]) -> fx.Node | tuple[fx.Node, fx.Node]:
    """The variance about the mean of all, or its root; and that mean, if it is asked for."""
    node, dims = emitter.node, combined_dims(given)
    dtype = given["self"].meta[SPEC].dtype
    x = emitter.cast(given["self"], torch.promote_types(dtype, torch.float32))
    means = emitter.emit(aten.mean.dim, x, dims, True)
    mean = emitter.relayout(means, means.meta[LAYOUT].summed())
    centred = emitter.emit(aten.sub.Tensor, x, mean)
    squares = emitter.emit(aten.mul.Tensor, centred, centred)
    parts = emitter.emit(aten.sum.dim_IntList, squares, dims, given.get("keepdim", False))
    total = emitter.relayout(parts, parts.meta[LAYOUT].summed())
    count = math.prod(x.meta[SPEC].shape[dim] for dim in dims)
    correction = given["correction"] if "correction" in given else int(given["unbiased"])
    spread = emitter.emit(aten.div.Tensor, total, max(count - (1 if correction is None else correction), 0))
    if node.target.overloadpacket in (aten.std, aten.std_mean):  # type: ignore[union-attr]
        spread = emitter.emit(aten.sqrt.default, spread)
    spread = emitter.cast(spread, dtype)
    if not isinstance(node.meta[SPEC], tuple):
        return spread
    return spread, emitter.cast(emitter.reshape(mean, node.meta[SPEC][1].shape), dtype)


WRITERS: dict[Any, Callable[[Emitter, dict[str, Any]], fx.Node | tuple[fx.Node, fx.Node]]] = {
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.linalg_vector_norm.default: _euclidean,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten._weight_norm.default: _weight_norm,
    aten.cumsum.default: _cumsum,
    **dict.fromkeys((aten.amax.default, aten.amin.default), _extreme),
    **dict.fromkeys((*SOFTMAXES, *LOG_SOFTMAXES), _softmax),
    aten.logsumexp.default: _logsumexp,
    **{one: _spread for packet in SPREADS for one in map(partial(getattr, packet), ("default", "dim", "correction"))},
}
