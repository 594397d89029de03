"""What treats samples apart and rows alike, in whatever order they are, by the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import BATCH, Mesh
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.sample_orders import Orders
from xdit_ir.passes.views import VIEWS
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall, as_layouts, same_call
from xdit_ir.sharding.layout_graph import LayoutNode
from xdit_ir.sharding.propagate import Propagation

aten = torch.ops.aten


@dataclass(frozen=True)
class RowDims:
    """Which dims of a value are samples and rows."""

    samples: int
    rows: int


# Of each operand, the result's last; None for an operand without rows.
Region = dict[fx.Node, tuple[RowDims | None, ...]]


def region_of(program: Program, root: fx.Node, orders: Orders) -> Region:
    """What is made of a value such that its samples stay apart and its rows may be in any order."""
    shape = root.meta[SPEC].shape
    apart, whole = Mesh.of(**{BATCH: shape[0]}), Layout.whole(len(shape))
    by_samples = _Run.of(program, apart, root, whole.with_dims({0: apart.divide(shape[0], (BATCH,))}))
    by_rows = [
        _Run.of(program, Mesh.of(), root, whole.with_dims({1: Partition(shape[1], (order,))}))
        for order in dict.fromkeys(orders)
        if not order.is_whole(shape[1])
    ]
    region: Region = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and any(source is root or source in region for source in operands(node)):
            dims = _dims(by_samples.moved(node), [run.moved(node) for run in by_rows])
            known = [region.get(source, (None,))[-1] for source in operands(node)]
            if dims is not None and all(None in pair or len({*pair}) == 1 for pair in zip(known, dims, strict=False)):
                region[node] = dims
    return region


Moved = tuple[int | None, ...] | None


def _dims(by_samples: Moved, by_rows: Sequence[Moved]) -> tuple[RowDims | None, ...] | None:
    first = by_rows[0]
    if by_samples is None or first is None or first[-1] is None or any(one != first for one in by_rows):
        return None
    pairs = list(zip(by_samples, first, strict=True))
    if any(rows is not None and samples in (None, rows) for samples, rows in pairs):
        return None
    return tuple(None if rows is None or samples is None else RowDims(samples, rows) for samples, rows in pairs)


@dataclass(frozen=True)
class _Run:
    """How a value in one layout, along one of its dims, goes through the program."""

    propagation: Propagation
    wanted: Partition
    steps: dict[fx.Node, LayoutNode]

    @staticmethod
    def of(program: Program, mesh: Mesh, root: fx.Node, layout: Layout) -> _Run:
        propagation = Propagation(program, mesh)
        steps = {step.node: step for step in propagation.forward({root.name: (layout,)}).steps if not step.relayout}
        return _Run(propagation, next(dim for dim in layout.dims if dim is not None), steps)

    def moved(self, node: fx.Node) -> Moved:
        """The dim of each operand and (last) of the result along which they are in that layout; None where one is in
        another, or something has to be changed for it."""
        step = self.steps[node]
        if not self._is_unchanged(step):
            return None
        found = [self._dim(layout) for layout in (*(source.layout for source in step.sources), step.layout)]
        return None if -1 in found else tuple(found)

    def _dim(self, layout: Any) -> int | None:
        """-1: in another layout."""
        found = {self._dim_of(one) for one in as_layouts(layout)}
        return found.pop() if len(found) == 1 else -1

    def _dim_of(self, layout: Layout) -> int | None:
        divided = [dim for dim, part in enumerate(layout.dims) if part is not None]
        if not divided and not layout.partial:
            return None
        same = len(divided) == 1 and layout.dims[divided[0]] == self.wanted and not layout.partial
        return divided[0] if same else -1

    def _is_unchanged(self, step: LayoutNode) -> bool:
        """Whether it is computed by the operators that stand there, none of which is told where its rows are."""
        if step.body is not None:
            return all(map(self._is_unchanged, self.propagation.body(*step.body).draft.steps))
        if step.relayout:
            return _is_repeated(step)
        if step.fallback:
            return False
        if not step.is_operator or self.propagation.mesh.world_size > 1:
            return True
        call = OpCall(step.node, self.propagation.mesh, tuple(source.layout for source in step.sources))
        local = infer(call).local
        same = [same_call(call), (step.node.target, step.node.args, step.node.kwargs)]
        if step.node.target in VIEWS:
            same.append((aten.reshape.default, (step.node.args[0], list(call.out.shape)), {}))
        return local is None or local(0) in same


def _is_repeated(step: LayoutNode) -> bool:
    """Whether a change of layout puts equal rows in another order."""
    if step.node.target is not aten.expand.default or step.sources[0].relayout:
        return False
    [source] = operands(step.node)
    lengths = (*[1] * (len(step.spec.shape) - len(source.meta[SPEC].shape)), *source.meta[SPEC].shape)
    return all(lengths[dim] == 1 for dim, part in enumerate(step.layout.dims) if part is not None)
