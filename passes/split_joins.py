"""`split-joins`: a projection of joined features whose parts arrive at different times becomes a sum of projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, map_graphs, remove_dead
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, is_weight
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitJoins:
    """`linear(cat(a, b), w)` is `linear(a, w_a) + linear(b, w_b)`: where `b` comes from other ranks and `a` does not,
    the first product can run while `b` is on its way.
    """

    name: ClassVar[str] = "split-joins"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    def apply(self, program: Program) -> Program:
        """The program with such projections split."""
        return map_graphs(program, lambda graph: _split(graph, program.mesh))


def _split(graph: fx.Graph, mesh: Mesh | None) -> None:
    for node in list(graph.nodes):
        if node.target is not aten.linear.default:
            continue
        join, weight = node.args[:2]
        parts = _parts(join)
        late = [_arrives(part) for part in parts]
        if any(late) and not all(late) and is_weight(weight):
            _project_parts(Emitter(graph, node, mesh), parts, sorted(range(len(parts)), key=late.__getitem__))
    remove_dead(graph)


def _parts(join: fx.Node) -> list[fx.Node]:
    """What a join of features over their last, undivided dimension is made of."""
    if join.target is not aten.cat.default or len(join.users) != 1:
        return []
    given = bound_arguments(join)
    last = len(join.meta[SPEC].shape) - 1
    parts: list[fx.Node] = list(given["tensors"])
    whole = all(part.meta[LAYOUT].dims[-1] is None for part in parts)
    return parts if whole and given["dim"] % (last + 1) == last else []


def _arrives(node: fx.Node) -> bool:
    """Whether a value is what an exchange brings, as it is or seen in another shape."""
    while node.target in (aten.reshape.default, aten.permute.default, aten.transpose.int):
        node = node.args[0]  # type: ignore[assignment]
    return ops.communicates(node.target)


def _project_parts(emitter: Emitter, parts: list[fx.Node], order: list[int]) -> None:
    _, weight, *bias = emitter.node.args
    widths = [part.meta[SPEC].shape[-1] for part in parts]
    total: fx.Node | None = None
    for place in order:
        start = sum(widths[:place])
        columns = emitter.emit(aten.slice.Tensor, weight, 1, start, start + widths[place])
        product = emitter.emit(aten.linear.default, parts[place], columns, *(bias if total is None else ()))
        total = product if total is None else emitter.emit(aten.add.Tensor, total, product)
    assert total is not None
    emitter.node.replace_all_uses_with(total)
