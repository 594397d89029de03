"""Values that are written piece by piece (`out = torch.empty(...)`, `out[a:b] = ...`), until nothing of what was there
before is left, are joined from the pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments
from xdit_ir.ir.program import SPEC
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten
WRITE = aten.slice_scatter.default
Piece = tuple[int, int, fx.Node]  # from where to where, and what


def joined_from_pieces(graph: fx.Graph, node: fx.Node) -> bool:
    """The last of several writes along one dim, which cover it and do not overlap, is a `cat` of what is written."""
    if node.target is not WRITE:
        return False
    dim, shape = _dim(node), node.meta[SPEC].shape
    pieces: list[Piece] = []
    base: Any = node
    while base.target is WRITE and _dim(base) == dim and (piece := _piece(base, dim)) is not None:
        pieces.append(piece)
        base = base.args[0]
    pieces.sort(key=lambda one: one[:2])
    ends = [0, *(end for _, end, _ in pieces)]
    if [start for start, _, _ in pieces] != ends[:-1] or ends[-1] != shape[dim] or len(pieces) < 2:
        return False
    node.replace_all_uses_with(Emitter(graph, node).emit(aten.cat.default, [what for _, _, what in pieces], dim))
    return True


def _dim(node: fx.Node) -> int:
    dim: Any = bound_arguments(node)["dim"]
    return int(dim) % len(node.meta[SPEC].shape)


def _piece(node: fx.Node, dim: int) -> Piece | None:
    given = bound_arguments(node)
    source: Any = given["src"]
    start, end, step = slice(given["start"], given["end"], given["step"]).indices(node.meta[SPEC].shape[dim])
    same = step == 1 and end > start and source.meta[SPEC].dtype == node.meta[SPEC].dtype
    return (start, end, source) if same else None
