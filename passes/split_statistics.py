"""`split-statistics`: norms over more than the features of a token become means, which ranks can sum up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, map_graphs, remove_dead
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitStatistics:
    """Write group and instance norms, and Euclidean norms along other dims than the last, with means and sums.

    Their rules need the dims whole over which statistics are taken, and these are where tokens are. The variance is
    the mean of squared deviations, so that nothing cancels.
    """

    name: ClassVar[str] = "split-statistics"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def apply(self, program: Program) -> Program:
        """The program with statistics as operators of their own."""
        return map_graphs(program, _split)


def _split(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        write = WRITERS.get(node.target)
        new = write(Emitter(graph, node), bound_arguments(node)) if write is not None else None
        if new is not None:
            node.replace_all_uses_with(new)
    remove_dead(graph)


def _group_norm(emitter: Emitter, given: dict[str, Any]) -> fx.Node | None:
    return _grouped(emitter, given, given["num_groups"])


def _instance_norm(emitter: Emitter, given: dict[str, Any]) -> fx.Node | None:
    channels = given["input"].meta[SPEC].shape[1]
    return _grouped(emitter, given, channels) if given["use_input_stats"] else None


def _grouped(emitter: Emitter, given: dict[str, Any], groups: int) -> fx.Node | None:
    """Normalise over the channels of a group and all that is behind them."""
    x: fx.Node = given["input"]
    batch, channels, *space = x.meta[SPEC].shape
    if math.prod(space) < 2:
        return None
    split = [batch, groups, channels // groups, *space]
    dims = list(range(2, len(split)))
    x = emitter.reshape(emitter.cast(x, _accumulated(x)), split)
    centred = _pointwise(emitter, aten.sub.Tensor, x, _mean(emitter, x, dims))
    squares = _pointwise(emitter, aten.mul.Tensor, centred, centred)
    variance = _pointwise(emitter, aten.add.Tensor, _mean(emitter, squares, dims), given["eps"])
    y = _pointwise(emitter, aten.mul.Tensor, centred, _pointwise(emitter, aten.rsqrt.default, variance))
    y = emitter.reshape(y, (batch, channels, *space))
    for target, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
        if given[name] is not None:
            y = _pointwise(emitter, target, y, emitter.reshape(given[name], (channels, *(1 for _ in space))))
    return emitter.cast(y, emitter.node.meta[SPEC].dtype)


def _euclidean(emitter: Emitter, given: dict[str, Any]) -> fx.Node | None:
    """The root of a sum of squares."""
    x: fx.Node = given["self"]
    spec, dims = x.meta[SPEC], given["dim"]
    ndim = len(spec.shape)
    if given["ord"] != 2 or not dims or spec.dtype.is_complex or {dim % ndim for dim in dims} == {ndim - 1}:
        return None
    x = emitter.cast(x, _accumulated(x))
    squares = _pointwise(emitter, aten.mul.Tensor, x, x)
    shape, dtype = emitter.node.meta[SPEC].shape, squares.meta[SPEC].dtype
    total = emitter.emit(aten.sum.dim_IntList, (squares, list(dims), given["keepdim"]), shape, dtype=dtype)
    return emitter.cast(_pointwise(emitter, aten.sqrt.default, total), emitter.node.meta[SPEC].dtype)


def _accumulated(x: fx.Node) -> torch.dtype:
    """What kernels accumulate statistics in."""
    dtype: torch.dtype = x.meta[SPEC].dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _mean(emitter: Emitter, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    spec = x.meta[SPEC]
    shape = [1 if d in dims else size for d, size in enumerate(spec.shape)]
    return emitter.emit(aten.mean.dim, (x, list(dims), True), shape, dtype=spec.dtype)


def _pointwise(emitter: Emitter, target: Any, x: fx.Node, *others: Any) -> fx.Node:
    spec = x.meta[SPEC]
    return emitter.emit(target, (x, *others), spec.shape, dtype=spec.dtype)


WRITERS: dict[Any, Callable[[Emitter, dict[str, Any]], fx.Node | None]] = {
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.linalg_vector_norm.default: _euclidean,
}
