"""Propagate layouts through a program: forward by the rules, then push cuts upstream by demand.

The result is a new program in which every node carries a `Layout` and every change of layout is a node of its own.
Blocks that are called with different layouts become different blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands, results_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import FEATURES, Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, called_block, is_block_call
from xdit_ir.ir.relayout import kind
from xdit_ir.rules import infer
from xdit_ir.rules.views import RULES as VIEWS
from xdit_ir.sharding.assignment import Assignment, BlockVariant, Variant
from xdit_ir.sharding.layout_graph import LayoutGraph, LayoutNode, Layouts
from xdit_ir.sharding.push_cuts import CutPusher
from xdit_ir.sharding.rulings import Infer, Rulings

Seeds = Mapping[str, Layouts]


@dataclass
class Propagation:
    """One propagation over a program; also the memo for repeated ones over the same program (trial partitions).

    `inside`: seeds in blocks that have layouts; what these return stays as it is.
    """

    program: Program
    mesh: Mesh
    infer: Infer = infer
    inside: Mapping[str, Seeds] = field(default_factory=dict)
    bodies: dict[Variant, BlockVariant] = field(default_factory=dict, init=False)
    _settled: dict[tuple[object, ...], tuple[Layouts, ...]] = field(default_factory=dict, init=False)
    rulings: Rulings = field(init=False)

    def __post_init__(self) -> None:
        self.rulings = Rulings(self.mesh, self.infer)

    def run(self, seeds: Seeds | None = None) -> Program:
        """The program with layouts; `seeds` bring the values of these names (nodes of the outer graph) into the given
        layouts, one after the other."""
        return self.attempt(seeds).program()

    def attempt(self, seeds: Seeds | None = None) -> Assignment:
        """The same, to be priced before it is written down."""
        draft = self.forward(seeds or {})
        draft.sweep(CutPusher(self.rulings, self).push)
        return Assignment(self.program, draft, self.bodies)

    def forward(self, seeds: Seeds) -> LayoutGraph:
        """What follows from the seeds along the data flow, no cut moved before what it cuts."""
        inputs = [
            node.meta.get(LAYOUT, Layout.whole(len(node.meta[SPEC].shape)))
            for node in self.program.graph.nodes
            if node.op == "placeholder"
        ]
        return _GraphPropagation(self, inputs, seeds, None, outer=True).write(self.program.graph)

    def body(self, name: str, layouts: Layouts, results: Layouts | None = None) -> BlockVariant:
        """The block `name` for arguments of these layouts, its results brought into those."""
        key = (name, layouts, results)
        if key not in self.bodies:
            draft = self.drafted(name, layouts, results, self.inside.get(name, {}))
            places = [step for step in draft.steps if step.node.op == "placeholder" and not step.relayout]
            preferred_inputs = {i: want for i, step in enumerate(places) if (want := step.common_shard()) is not None}
            self.bodies[key] = BlockVariant(draft, preferred_inputs)
        return self.bodies[key]

    def drafted(self, name: str, layouts: Layouts, results: Layouts | None, seeds: Seeds) -> LayoutGraph:
        """The draft of a block with these seeds; what it returns stays as it is, whatever the seeds divide."""
        graph = self.program.blocks[name].graph
        if seeds and results is None:
            results = tuple(result.meta[LAYOUT] for result in results_of(graph))
        draft = _GraphPropagation(self, layouts, seeds, results, outer=False).write(graph)
        draft.sweep(CutPusher(self.rulings, self).push)
        return draft

    def block_input_fixpoint(self, name: str, layouts: Layouts, results: Layouts | None = None) -> Iterator[Layouts]:
        """The layouts of a block's arguments, then what the block wants instead, until it wants nothing else or, as it
        may want one order of indices for the other, what it had before."""
        seen: set[Layouts] = set()
        while layouts not in seen:
            yield layouts
            seen.add(layouts)
            preferred_inputs = self.body(name, layouts, results).preferred_inputs
            if preferred_inputs:
                layouts = tuple(preferred_inputs.get(place, layout) for place, layout in enumerate(layouts))

    def settled(self, name: str, given: Layouts) -> tuple[Layouts, Layouts]:
        """What a block wants in the end instead of arguments of these layouts, and the layouts of what it then returns;
        remembered for these very objects."""
        key = (name, *map(id, given))
        if key not in self._settled:
            *_, wanted = self.block_input_fixpoint(name, given)
            self._settled[key] = wanted, self.body(name, wanted).draft.outputs, given  # which keeps their ids
        wanted, returned, _ = self._settled[key]
        return wanted, returned


class _GraphPropagation:
    """Drafts one graph, deciding a layout for every node and inserting the changes of layout."""

    def __init__(
        self, run: Propagation, inputs: Sequence[Layout], seeds: Seeds, results: Layouts | None, *, outer: bool
    ) -> None:
        self.run, self.seeds, self.results, self.outer = run, seeds, results, outer
        self.rulings = run.rulings
        self.draft = LayoutGraph(run.mesh)
        self.env: dict[fx.Node, LayoutNode] = {}
        self.given: dict[fx.Node, LayoutNode] = {}  # of the whole program, as they come: a result that is one stays so
        self.inputs = iter(inputs)
        self.tail: frozenset[fx.Node] = frozenset()
        self.converted: dict[tuple[LayoutNode, Layout], LayoutNode] = {}

    def write(self, graph: fx.Graph) -> LayoutGraph:
        """The draft of a whole graph."""
        self.tail = views_of_outputs(graph) if self.outer else self.tail
        for node in graph.nodes:
            if node.op == "output":
                self._output(node)
                break
            new = self._step(node)
            if self.outer and node.op == "placeholder":
                self.given[node] = new
            for layout in self.seeds.get(node.name, ()):
                new = self.convert(new, layout)
            self.env[node] = new
        return self.draft

    def _step(self, node: fx.Node) -> LayoutNode:
        if node.op == "placeholder":
            return self._add(node, node.target, [], self.rulings.same(next(self.inputs)))
        if node.op == "get_attr":
            layout = node.meta.get(LAYOUT) or Layout.whole(len(node.meta[SPEC].shape))
            return self._add(node, node.target, [], self.rulings.same(layout))
        sources = [self.env[operand] for operand in operands(node)]
        if ops.is_relayout(node.target):
            return self.convert(sources[0], self._carried(node, sources[0].layout))
        if node.target is operator.getitem:
            return self._add(node, node.target, sources, sources[0].layout[node.args[1]])
        return self._call(node, sources) if is_block_call(node) else self._operator(node, sources)

    def _add(self, node: fx.Node, target: Any, sources: list[LayoutNode], layout: Any) -> LayoutNode:
        return self.draft.add(LayoutNode(node, target, sources, layout))

    def _operator(self, node: fx.Node, sources: list[LayoutNode]) -> LayoutNode:
        ruling = self.rulings.rule(node, tuple(source.layout for source in sources))
        if node in self.tail and any(self._divides_anew(*pair) for pair in zip(sources, ruling.inputs, strict=True)):
            ruling = self.rulings.rule(node, tuple(Layout.whole(len(source.spec.shape)) for source in sources))
        taken = self._all_converted(sources, ruling.inputs)
        new = self._add(node, ruling.target or node.target, taken, ruling.outputs)
        new.fallback = ruling.fallback
        return new if ruling.result_layout is None else self.convert(new, ruling.result_layout)

    def _carried(self, node: fx.Node, have: Layout) -> Layout:
        """What a change of layout makes of a value of which features are divided since it was written."""
        want: Layout = node.meta[LAYOUT].summed()
        before: Layout | None = operands(node)[0].meta.get(LAYOUT)
        if before is None:  # written by hand, in a program that nothing has divided yet
            return want
        triples = enumerate(zip(before.dims, want.dims, have.dims, strict=True))
        kept = {dim: now for dim, (old, new, now) in triples if old == new}
        return want.with_dims(
            {dim: now for dim, now in kept.items() if self.rulings.mesh.dividing_dims(now) & {*FEATURES}}
        )

    def _divides_anew(self, source: LayoutNode, want: Layout) -> bool:
        """Whether a value would be exchanged only to be gathered behind."""
        have: Layout = source.layout
        return not have.partial and kind(self.rulings.mesh, have, want)[0] not in ("shard", "gather")

    def _call(self, node: fx.Node, sources: list[LayoutNode]) -> LayoutNode:
        name = called_block(node)
        layouts, returned = self.run.settled(name, tuple(self._given(source.layout) for source in sources))
        new = self._add(node, node.target, self._all_converted(sources, layouts), returned)
        new.body = (name, layouts, None)
        return new

    def _given(self, layout: Layout) -> Layout:
        """What a block is given: sums; and whole features, where seeds inside of blocks say how these are divided."""
        if not self.run.inside:
            return layout.summed() if layout.partial else layout
        mesh, features = self.rulings.mesh, frozenset(FEATURES)
        if not layout.dividing_dims(mesh).isdisjoint(features):
            dims = ((dim, part) for dim, part in enumerate(layout.dims) if mesh.dividing_dims(part) & features)
            layout = layout.with_dims({dim: mesh.gathered(part, features) for dim, part in dims if part})
        return layout.summed()

    def _output(self, node: fx.Node) -> None:
        results = [self.given.get(value) or self.env[value] for value in operands(node)]
        if self.outer:
            results = [self.convert(value, Layout.whole(len(value.spec.shape))) for value in results]
        results = [self.convert(value, value.layout.summed()) for value in results]
        if self.results is not None:
            results = [self.convert(value, want) for value, want in zip(results, self.results, strict=True)]
        self.draft.outputs = tuple(value.layout for value in results)
        self._add(node, node.target, results, self.draft.outputs)

    def _all_converted(self, values: list[LayoutNode], wanted: Layouts) -> list[LayoutNode]:
        pairs = zip(values, wanted, strict=True)
        return [value if value.layout is want else self.convert(value, want) for value, want in pairs]

    def convert(self, value: LayoutNode, want: Layout) -> LayoutNode:
        """The value in another layout."""
        have: Layout = value.layout
        if have is want:
            return value
        want = self.rulings.same(want)
        if have.partial and not want.partial:
            whole = self.rulings.same(have.summed())
            value = self._converted(value, whole, ops.all_reduce)
        if value.layout is want or value.layout == want:
            return value
        return self._converted(value, want, ops.RELAYOUTS[kind(self.rulings.mesh, value.layout, want)[0]])

    def _converted(self, value: LayoutNode, want: Layout, target: Any) -> LayoutNode:
        key = (value, want)
        if key not in self.converted:
            self.converted[key] = self.draft.add(LayoutNode(value.node, target, [value], want, relayout=True))
        return self.converted[key]


def views_of_outputs(graph: fx.Graph) -> frozenset[fx.Node]:
    """Views and permutations of which nothing but outputs is made: what they are of is gathered before or behind."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in VIEWS and all(user.op == "output" or user in found for user in node.users):
            found.add(node)
    return frozenset(found)
