"""`split-statistics`: norms over what is divided take statistics of each part, which ranks add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
from xdit_ir.rules.norms import divided_statistics
from xdit_ir.rules.running import lengths_of_runs

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitStatistics:
    """Write norms that are taken over a divided dim with sums, which ranks exchange once: a part's sum or mean of
    squares, or its mean and variance, of which those of the whole are made in double precision. Norms over what every
    rank holds stay one operator. Sums that run along a divided dim go on from those of the parts before, likewise.
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


WRITERS: dict[Any, Callable[[Emitter, dict[str, Any]], fx.Node]] = {
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.linalg_vector_norm.default: _euclidean,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.cumsum.default: _cumsum,
}
