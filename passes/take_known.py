"""`take-known`: indexing with a constant becomes `take`, whose positions the rules can follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_ir import ops
from xdit_ir.partition import Indices
from xdit_ir.passes.base import copy_graph, remove_dead
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.views import VIEWS
from xdit_ir.program import CONSTANT, SPEC, Program

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor)
# Each run is a copy on its own; what is more scattered is better left to one gathering kernel.
MOST_RUNS = 64


@dataclass(frozen=True)
class TakeKnown:
    """Where ragged text is packed, or padding left out, the kept positions are known. Numerics: exact."""

    name: str = "take-known"

    def apply(self, program: Program) -> Program:
        """The program with constant selections along one dim as `take`."""
        blocks = {
            name: replace(block, graph=_rewritten(block.graph, program.constants))
            for name, block in program.blocks.items()
        }
        return program.replace(graph=_rewritten(program.graph, program.constants), blocks=blocks)


def _rewritten(graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> fx.Graph:
    graph = copy_graph(graph)
    for node in list(graph.nodes):
        found = _selection(node)
        if found is None:
            continue
        x, dim, index = found
        kept = _known(index, constants, x.meta[SPEC].shape[dim])
        if kept is None or len(kept.runs) > MOST_RUNS:
            continue
        if kept.is_whole(x.meta[SPEC].shape[dim]):
            node.replace_all_uses_with(x)
        else:
            new = Emitter(graph, node).emit(ops.take, (x, dim, kept.runs), node.meta[SPEC].shape, name=node.name)
            node.replace_all_uses_with(new)
    remove_dead(graph)
    return graph


def _selection(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """The value, the dim and the index tensor of a selection along one dim."""
    if node.op != "call_function":
        return None
    args: Any = node.args
    if node.target is aten.index_select.default and args[0].meta[SPEC].shape:
        return args[0], args[1] % len(args[0].meta[SPEC].shape), args[2]
    if node.target not in INDEXED:
        return None
    given = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
    if len(given) != 1 or len(given[0][1].meta[SPEC].shape) != 1:
        return None
    return args[0], *given[0]


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
    if value.dtype not in (torch.int64, torch.int32) or value.numel() != value.unique().numel():
        return None
    places = torch.where(value < 0, value + size, value).long()
    return Indices.of_array(places.numpy()) if places.unique().numel() == places.numel() else None
