"""Adaptive pooling to one element of a dim, as a mean or the largest: ranks then add up, or compare, those of parts."""

from __future__ import annotations

import operator

import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments
from xdit_ir.ir.program import SPEC
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten
MEANS = {getattr(aten, f"adaptive_avg_pool{n}d").default: n for n in (1, 2, 3)}
LARGEST = {getattr(aten, f"adaptive_max_pool{n}d").default: n for n in (1, 2, 3)}


def pool_of_everything(graph: fx.Graph, node: fx.Node) -> bool:
    """The mean over dims of which one element is left, before what is left of others; and the largest, where none but
    such dims are pooled and nobody asks where it was."""
    if node.target in MEANS:
        return _mean(graph, node, MEANS[node.target])
    return node.target in LARGEST and _largest(graph, node, LARGEST[node.target])


def _single(node: fx.Node, shape: tuple[int, ...], spatial: int) -> list[int]:
    """The dims of which one element is left of several."""
    before = bound_arguments(node)["self"].meta[SPEC].shape
    return [dim for dim in range(len(shape) - spatial, len(shape)) if shape[dim] == 1 < before[dim]]


def _mean(graph: fx.Graph, node: fx.Node, spatial: int) -> bool:
    shape, emitter = node.meta[SPEC].shape, Emitter(graph, node)
    single = _single(node, shape, spatial)
    if not single:
        return False
    pooled = emitter.emit(aten.mean.dim, bound_arguments(node)["self"], single, True)
    if pooled.meta[SPEC].shape != shape:
        pooled = emitter.emit(node.target, pooled, list(shape[-spatial:]))
    node.replace_all_uses_with(pooled)
    return True


def _largest(graph: fx.Graph, node: fx.Node, spatial: int) -> bool:
    spec, *_ = node.meta[SPEC]
    taken = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    single, before = _single(node, spec.shape, spatial), bound_arguments(node)["self"].meta[SPEC].shape
    rest = [dim for dim, size in enumerate(before) if size != spec.shape[dim] and dim not in single]
    if not single or rest or len(taken) != len(node.users):
        return False
    largest = Emitter(graph, node).emit(aten.amax.default, bound_arguments(node)["self"], single, True)
    for user in taken:
        user.replace_all_uses_with(largest)
    return True
