"""Layouts of a program that are decided but not written down: what they cost, and the program that they make."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import Block, Program
from xdit_ir.sharding.layout_graph import LayoutGraph, LayoutNode, Layouts
from xdit_ir.sharding.machine import Machine

# A block, the layouts of its arguments, and those that its results are brought into (None: as they come).
Variant = tuple[str, Layouts, Layouts | None]


@dataclass(frozen=True)
class BlockVariant:
    """A variant of a block; `preferred_inputs` are arguments that it would rather get cut."""

    draft: LayoutGraph
    preferred_inputs: Mapping[int, Layout]


@dataclass(frozen=True)
class Assignment:
    """A program whose layouts are decided but not written down; `variants` has the blocks that it calls."""

    source: Program
    draft: LayoutGraph
    variants: Mapping[Variant, BlockVariant]

    def body(self, call: LayoutNode) -> LayoutGraph:
        """What a block call runs."""
        return self.variants[call.body].draft

    def bodies(self) -> Iterator[LayoutGraph]:
        """What every block call runs, once a call."""
        return map(self.body, self.draft.calls)

    def flops(self) -> list[int]:
        """FLOPs per rank."""
        total = self.draft.flops()
        for body in self.bodies():
            total = [a + b for a, b in zip(total, body.flops(), strict=True)]
        return total

    def work(self, machine: Machine) -> list[int]:
        """Ticks of a machine per rank."""
        total = self.draft.work(machine)
        for body in self.bodies():
            total = [a + b for a, b in zip(total, body.work(machine), strict=True)]
        return total

    def exchange_seconds(self, machine: Machine) -> float:
        """Time of all exchanges of a forward, none of them hidden, and of putting together what comes."""
        total, pieces = Counter(self.draft.traffic()), self.draft.pieces()
        for body in self.bodies():
            total.update(body.traffic())
            pieces += body.pieces()
        return machine.exchange_seconds(self.draft.mesh, total) + pieces * machine.gap

    def attention_mesh_dims(self, *parts: str) -> frozenset[str]:
        """The mesh dims that divide the `queries`, `keys` or `batch` (and heads) of some attention."""
        return frozenset().union(*(draft.attention_mesh_dims(part) for draft in self._drafts() for part in parts))

    def key_gather_dims(self) -> frozenset[str]:
        """The mesh dims along which some attention finds only a part of its keys."""
        return frozenset().union(*(draft.key_gather_dims() for draft in self._drafts()))

    def _drafts(self) -> list[LayoutGraph]:
        return [self.draft, *(self.variants[v].draft for v in {step.body: None for step in self.draft.calls})]

    def sums_up(self) -> bool:
        """Whether ranks hold summands outside of blocks."""
        return self.draft.sums_up()

    def divides_space(self) -> bool:
        """Whether windows of some convolution move along what is divided."""
        return any(draft.divides_space() for draft in self._drafts())

    def layout(self, name: str) -> Layout | None:
        """The layout of the value of this name, for an input as it is cut; None where nothing is left of it."""
        step = next((step for step in self.draft.steps if step.node.name == name and not step.relayout), None)
        return None if step is None else step.common_shard() or step.layout

    def program(self) -> Program:
        """Written down. Every variant of a block that is used gets a name of its own: `Block`, `Block.2`, ..."""
        names: dict[Variant, str] = {}
        for step in self.draft.calls:
            if step.body not in names:
                block = step.body[0]
                choices = itertools.chain([block], (f"{block.partition('.')[0]}.{i}" for i in itertools.count(2)))
                names[step.body] = next(name for name in choices if name not in set(names.values()))
        blocks = {name: Block(name, self.variants[v].draft.write(names.__getitem__)) for v, name in names.items()}
        return self.source.replace(graph=self.draft.write(names.__getitem__), blocks=blocks)
