"""What the rules say about the nodes of a program, remembered for all attempts at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.relayout import kind
from xdit_ir.rules import infer, rule_for
from xdit_ir.rules.base import OpCall, OpSharding, as_layouts
from xdit_ir.sharding.layout_graph import LayoutNode, Layouts

Infer = Callable[[OpCall], OpSharding]


@dataclass
class Rulings:
    """Those on one mesh; `infer` gives the ruling for an operator."""

    mesh: Mesh
    infer: Infer = infer
    _rulings: dict[tuple[fx.Node, Layouts], OpSharding] = field(default_factory=dict)
    _demands: dict[Any, Layouts | None] = field(default_factory=dict)
    _layouts: dict[Layout, Layout] = field(default_factory=dict)

    def same(self, layout: Layout) -> Layout:
        """One object for equal layouts, which makes comparing them cheap."""
        return self._layouts.setdefault(layout, layout)

    def rule(self, node: fx.Node, layouts: Layouts) -> OpSharding:
        """The ruling for a node of the source program, remembered."""
        key = (node, layouts)
        if key not in self._rulings:
            ruling = self.infer(OpCall(node, self.mesh, layouts))
            inputs, outputs = ruling.inputs, ruling.outputs
            one = isinstance(outputs, Layout)
            shared = tuple(map(self.same, as_layouts(outputs)))
            self._rulings[key] = replace(
                ruling, inputs=tuple(map(self.same, inputs)), outputs=shared[0] if one else shared
            )
        return self._rulings[key]

    def demanded(self, step: LayoutNode, target: Any) -> Layouts | None:
        """Operand layouts that make a step's result `target` without communication, verified by its rule."""
        layouts = tuple(source.layout for source in step.sources)
        key = (step.node, step.target, layouts, target)
        if key not in self._demands:
            self._demands[key] = self._demanded(step, layouts, target)
        return self._demands[key]

    def _demanded(self, step: LayoutNode, layouts: Layouts, target: Any) -> Layouts | None:
        rule = rule_for(step.target)
        if rule is None or any(layout.partial for layout in layouts):
            return None
        needs = rule.demand(OpCall(step.node, self.mesh, layouts), target)
        if needs is None or len(needs) != len(layouts):
            return None
        if any(a != b and kind(self.mesh, a, b)[0] != "shard" for a, b in zip(layouts, needs, strict=True)):
            return None
        ruling = rule.forward(OpCall(step.node, self.mesh, needs))
        return tuple(map(self.same, needs)) if ruling.outputs == target and ruling.inputs == needs else None
