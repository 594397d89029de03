"""`take-known`: indexing with a constant becomes `take` or `put`, whose positions the rules can follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph, remove_dead
from xdit_ir.ir.partition import Indices
from xdit_ir.ir.program import CONSTANT, SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.views import VIEWS

aten = torch.ops.aten
SELECTED = (aten.index_select.default, aten.index_copy.default)
INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor)
WRITTEN = (aten.index_put.default, aten._unsafe_index_put.default)
# Each run is a copy on its own; what is more scattered is better left to one gathering kernel.
MOST_RUNS = 64


@dataclass(frozen=True)
class TakeKnown:
    """Where ragged text is packed, or padding left out, the kept positions are known."""

    name: ClassVar[str] = "take-known"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def apply(self, program: Program) -> Program:
        """The program with constant selections along one dim as `take` and `put`."""
        blocks = {
            name: replace(block, graph=_rewritten(block.graph, program.constants))
            for name, block in program.blocks.items()
        }
        return program.replace(graph=_rewritten(program.graph, program.constants), blocks=blocks)


def _rewritten(graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> fx.Graph:
    graph = copy_graph(graph)
    for node in list(graph.nodes):
        found = _selection(node) if node.op == "call_function" else None
        kept = _known(found.index, constants, found.size) if found is not None else None
        if found is not None and kept is not None and len(kept.runs) <= MOST_RUNS:
            node.replace_all_uses_with(_written(Emitter(graph, node), found, kept))
    remove_dead(graph)
    return graph


@dataclass(frozen=True)
class _Selection:
    """Reading `index` of one dim of `x`, or writing `values` there."""

    x: fx.Node
    dim: int
    index: fx.Node
    values: fx.Node | None = None

    @property
    def size(self) -> int:
        size: int = self.x.meta[SPEC].shape[self.dim]
        return size


def _selection(node: fx.Node) -> _Selection | None:
    args: Any = node.args
    if node.target in SELECTED and args[0].meta[SPEC].shape:
        return _Selection(args[0], args[1] % len(args[0].meta[SPEC].shape), *args[2:4])
    if node.target not in INDEXED + WRITTEN:
        return None
    given = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
    if len(given) != 1 or len(given[0][1].meta[SPEC].shape) != 1 or (len(args) > 3 and args[3]):
        return None
    return _Selection(args[0], *given[0], *args[2:3])


def _written(emitter: Emitter, found: _Selection, kept: Indices) -> fx.Node:
    name = emitter.node.name
    if found.values is None:
        if kept.is_whole(found.size):
            return found.x
        return emitter.emit(ops.take, found.x, found.dim, kept.runs, name=name)
    part = [kept.size if d == found.dim else size for d, size in enumerate(emitter.node.meta[SPEC].shape)]
    values = emitter.expand(found.values, part)
    if kept.is_whole(found.size):
        return values
    return emitter.emit(ops.put, found.x, values, found.dim, kept.runs, name=name)


def _known(index: Any, constants: Mapping[str, torch.Tensor], size: int) -> Indices | None:
    """The distinct positions that a constant names, not negative, in order; a mask names those where it is true."""
    while index.op == "call_function" and index.target in VIEWS:
        index = index.args[0]
    owner, _, name = str(index.target).partition(".")
    if index.op != "get_attr" or owner != CONSTANT or name not in constants:
        return None
    value = constants[name].detach().cpu().reshape(-1)
    if value.dtype == torch.bool:
        value = value.nonzero().reshape(-1)
    if value.dtype not in (torch.int64, torch.int32):
        return None
    places: list[int] = torch.where(value < 0, value + size, value).tolist()
    distinct = len(set(places)) == len(places)
    return Indices.of_array(np.array(places, dtype=np.int64)) if distinct else None
