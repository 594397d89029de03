"""`take-known`: indexing with a constant becomes `take` or `put`, whose positions the rules can follow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph, operands, placeholders, remove_dead
from xdit_ir.ir.guards import STATE, Guard
from xdit_ir.ir.hoist import ancestors, descendants
from xdit_ir.ir.partition import Indices, IntArray
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.known_integers import Known, known_integers

aten = torch.ops.aten
SELECTED = (aten.index_select.default, aten.index_copy.default)
INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor)
WRITTEN = (aten.index_put.default, aten._unsafe_index_put.default)
ADDED = (aten.scatter_add.default, aten.index_add.default)
# What is more scattered is too much to follow.
MOST_RUNS = 1 << 13


@dataclass(frozen=True)
class TakeKnown:
    """Where ragged text is packed, or padding left out, the kept positions are known."""

    name: ClassVar[str] = "take-known"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def apply(self, program: Program) -> Program:
        """The program with constant selections along one dim, or several as one, as `take` and `put`."""
        known = known_integers(program)
        blocks = {name: replace(block, graph=_rewritten(block.graph, known)) for name, block in program.blocks.items()}
        return program.replace(graph=_rewritten(program.graph, known), blocks=blocks)


def guard_places(program: Program) -> Program:
    """The program with guards on those integer inputs and buffers that say where rows of what floating-point inputs
    make are read or written, each in a place of its own: contents that hold for a whole request, such as the order of
    a packed stream."""
    paths = [leaf.path for leaf in program.signature.leaves if leaf.spec is not None]
    given = dict(zip(placeholders(program.graph), paths, strict=True))
    floating = descendants(node for node in given if node.meta[SPEC].dtype.is_floating_point)
    guards = {path: Guard(path, value, "where its rows are") for path, value in program.contents.items()}
    known = known_integers(_guarded(program, guards.values()))
    wanted: dict[str, Guard] = {}
    for node in program.graph.nodes:
        found = _selection(node) if node.op == "call_function" else None
        if found is None or len(found.index) > 1 or not {found.x, found.values} & floating:
            continue
        kept = _places(found, known)
        if kept is not None and kept.size > 1:
            sources = (given.get(node, f"{STATE}{node.target}") for node in ancestors(found.index))
            wanted |= {path: guards[path] for path in sources if path in guards}
    return _guarded(program, wanted.values()) if wanted else program


def _guarded(program: Program, guards: Iterable[Guard]) -> Program:
    signature = program.signature
    return program.replace(signature=replace(signature, guards=(*signature.guards, *guards)))


def _rewritten(source: fx.Graph, known: Known) -> fx.Graph:
    graph = copy_graph(source)
    contents = {new: known[old] for old, new in zip(source.nodes, graph.nodes, strict=True) if old in known}
    for node in list(graph.nodes):
        found = _selection(node) if node.op == "call_function" else None
        kept = _places(found, contents) if found is not None else None
        if found is not None and kept is not None and len(kept.runs) <= MOST_RUNS:
            node.replace_all_uses_with(_written(Emitter(graph, node), found, kept))
    remove_dead(graph)
    return graph


@dataclass(frozen=True)
class _Selection:
    """Reading `width` dims of `x` from `dim` on, at an index for each or a mask for all, or writing `values` there, or
    adding them to what is there."""

    x: fx.Node
    dim: int
    index: tuple[fx.Node, ...]
    values: fx.Node | None = None
    width: int = 1
    adds: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the dims that are indexed."""
        sizes: tuple[int, ...] = self.x.meta[SPEC].shape[self.dim : self.dim + self.width]
        return sizes

    @property
    def size(self) -> int:
        """Of these dims as one."""
        return math.prod(self.sizes)

    def as_one(self, emitter: Emitter) -> fx.Node:
        """`x` with these dims as one."""
        shape = self.x.meta[SPEC].shape
        return emitter.reshape(self.x, [*shape[: self.dim], self.size, *shape[self.dim + self.width :]])


def _selection(node: fx.Node) -> _Selection | None:
    args: Any = node.args
    if node.target in SELECTED and args[0].meta[SPEC].shape:
        return _Selection(args[0], args[1] % len(args[0].meta[SPEC].shape), (args[2],), *args[3:4])
    if node.target in ADDED:
        return _addition(node)
    if node.target not in INDEXED + WRITTEN:
        return None
    given = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
    if not given or (len(args) > 3 and args[3]):
        return None
    first, index = given[0][0], tuple(index for _, index in given)
    values = args[2] if len(args) > 2 else None
    if len(index) == 1 and index[0].meta[SPEC].dtype == torch.bool:
        return _Selection(args[0], first, index, values, len(index[0].meta[SPEC].shape))
    adjacent = [dim for dim, _ in given] == list(range(first, first + len(index)))
    if not adjacent or any(len(one.meta[SPEC].shape) != 1 for one in index):
        return None
    return _Selection(args[0], first, index, values, len(index))


def _addition(node: fx.Node) -> _Selection | None:
    """Whole rows that are added, each at the place that a list names."""
    args: Any = node.args
    x, dim, index, values, *rest = args
    shape = x.meta[SPEC].shape
    if not shape or rest or node.kwargs:
        return None
    dim %= len(shape)
    if node.target is aten.scatter_add.default:
        whole = (*shape[:dim], values.meta[SPEC].shape[dim], *shape[dim + 1 :])
        if (
            index.target is not aten.expand.default
            or index.meta[SPEC].shape != whole
            or values.meta[SPEC].shape != whole
        ):
            return None
        [index] = operands(index)
        if index.meta[SPEC].shape != tuple(size if d == dim else 1 for d, size in enumerate(whole)):
            return None
    return _Selection(x, dim, (index,), values, adds=True)


def _written(emitter: Emitter, found: _Selection, kept: Indices) -> fx.Node:
    name = emitter.node.name
    if found.values is None:
        x = found.as_one(emitter)
        return x if kept.is_whole(found.size) else emitter.emit(ops.take, x, found.dim, kept.runs, name=name)
    shape = list(found.as_one(emitter).meta[SPEC].shape)
    shape[found.dim] = kept.size
    values = emitter.expand(found.values, shape)
    if found.adds:
        there = found.x if kept.is_whole(found.size) else emitter.emit(ops.take, found.x, found.dim, kept.runs)
        values = emitter.emit(aten.add.Tensor, there, values)
    if not kept.is_whole(found.size):
        values = emitter.emit(ops.put, found.as_one(emitter), values, found.dim, kept.runs, name=name)
    return emitter.reshape(values, emitter.node.meta[SPEC].shape)


def _places(found: _Selection, contents: Known) -> Indices | None:
    """The distinct positions that are named, in order, in all dims as one; None where they are not known."""
    sizes = found.sizes if len(found.index) > 1 else (found.size,)
    known = [_positions(contents.get(index), size) for index, size in zip(found.index, sizes, strict=True)]
    arrays = [one for one in known if one is not None]
    if len(arrays) < len(known):
        return None
    flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*arrays)), sizes)
    distinct = len(np.unique(flat)) == len(flat)
    return Indices.of_array(flat.astype(np.int64)) if distinct else None


def _positions(value: torch.Tensor | None, size: int) -> IntArray | None:
    """The positions that a known index names, not negative; a mask names those where it is true."""
    if value is None or value.dtype not in (torch.bool, torch.int64, torch.int32):
        return None
    value = value.reshape(-1)
    value = value.nonzero().reshape(-1) if value.dtype == torch.bool else value
    return torch.where(value < 0, value + size, value).to(torch.int64).numpy()
