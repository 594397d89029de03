"""Cuts move upstream by demand: what makes a result of which every rank wants a part makes that part only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import TIME
from xdit_ir.sharding.assignment import BlockVariant
from xdit_ir.sharding.layout_graph import LayoutNode, Layouts
from xdit_ir.sharding.rulings import Rulings


class VariantsOfBlocks(Protocol):
    """The blocks of a program, for any layouts of their arguments and results."""

    def body(self, name: str, layouts: Layouts, results: Layouts | None = None) -> BlockVariant:
        """The block `name` for arguments of these layouts, its results brought into those."""

    def block_input_fixpoint(self, name: str, layouts: Layouts, results: Layouts | None = None) -> Iterator[Layouts]:
        """The layouts of a block's arguments, then what the block wants instead, until it wants nothing else."""


@dataclass(frozen=True)
class CutPusher:
    """`push` is what a sweep over a draft does with each of its steps, from the last to the first."""

    rulings: Rulings
    blocks: VariantsOfBlocks

    def push(self, step: LayoutNode) -> list[LayoutNode]:
        """Move cuts of all results of a step before it; the cuts to insert there."""
        if step.relayout and step.target is ops.all_reduce:
            return self._sum(step)
        if step.body is None and not step.is_operator:
            return []
        results = list(step.users) if isinstance(step.layout, tuple) else [step]
        wanted = [result.common_shard() for result in results]
        return self._call(step, results, wanted) if step.body else self._operator(step, results, wanted)

    def _operator(self, step: LayoutNode, results: list[LayoutNode], wanted: list[Layout | None]) -> list[LayoutNode]:
        if not results or any(want is None for want in wanted):
            return []
        target: Any = wanted[0]
        if isinstance(step.layout, tuple):
            if len(results) != len(step.layout):
                return []
            placed = {result.node.args[1]: want for result, want in zip(results, wanted, strict=True)}
            target = tuple(placed[i] for i in range(len(results)))
        needs = self.rulings.demanded(step, target)
        return [] if needs is None else _moved(step, needs, target, results)

    def _sum(self, step: LayoutNode) -> list[LayoutNode]:
        """A sum of which every rank takes a part only becomes a sum of parts."""
        [source], wanted = step.sources, step.common_shard()
        pending: frozenset[str] = source.layout.partial
        if wanted is None:
            return []
        scattered = wanted.dividing_dims(self.rulings.mesh) - step.layout.dividing_dims(self.rulings.mesh)
        if not scattered or not scattered <= pending - {TIME}:
            return []
        if scattered == pending:
            step.target = ops.reduce_scatter
            return _moved(step, (source.layout,), wanted, [step])
        part = self.rulings.same(replace(wanted, partial=pending - scattered))
        first = LayoutNode(source.node, ops.reduce_scatter, [source], part, relayout=True)
        step.set_operands([first])
        return [first, *_moved(step, (part,), wanted, [step])]

    def _call(self, step: LayoutNode, results: list[LayoutNode], wanted: list[Layout | None]) -> list[LayoutNode]:
        """A block whose results are cut becomes one that makes only these parts, if that is less work."""
        name, layouts, before = step.body
        if before is not None or all(want is None for want in wanted):
            return []
        made = list(step.layout)
        for result, want in zip(results, wanted, strict=True):
            made[result.node.args[1]] = want or result.layout  # type: ignore[index]
        *_, needs = self.blocks.block_input_fixpoint(name, layouts, tuple(made))
        variant = (name, needs, tuple(made))
        old, new = (self.blocks.body(*one).draft for one in (step.body, variant))
        if max(new.flops()) >= max(old.flops()) or new.moved_bytes() > old.moved_bytes():
            return []
        step.body = variant
        cut = [result for result, want in zip(results, wanted, strict=True) if want is not None]
        return _moved(step, variant[1], new.outputs, cut)


def _moved(step: LayoutNode, needs: Layouts, target: Any, results: list[LayoutNode]) -> list[LayoutNode]:
    """Give a step operands of these layouts; the cuts of its results are then idle and vanish."""
    before = []
    taken = []
    for source, need in zip(step.sources, needs, strict=True):
        if source.layout != need:
            before.append(LayoutNode(source.node, ops.shard, [source], need, relayout=True))
            source = before[-1]
        taken.append(source)
    step.set_operands(taken)
    step.layout = target
    for result in results:
        if result is not step:
            result.layout = target[result.node.args[1]]
        for shard in list(result.users):
            for user in list(shard.users):
                user.set_operands([result if source is shard else source for source in user.sources])
            shard.detach()
    return before
