"""Propagate layouts through a program: forward by the rules, then push cuts upstream by demand.

The result is a new program in which every node carries a `Layout` and every change of layout is a node of its own.
Blocks that are called with different layouts become different blocks.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands, results_of
from xdit_ir.ir.layout import Layout, kind
from xdit_ir.ir.mesh import FEATURES, TIME, Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Block, Program, called_block, is_block_call
from xdit_ir.rules import infer, rule_for
from xdit_ir.rules.base import OpCall, OpSharding, as_layouts
from xdit_ir.rules.views import RULES as VIEWS
from xdit_ir.sharding.layout_graph import FALLBACK as FALLBACK
from xdit_ir.sharding.layout_graph import LayoutGraph, LayoutNode, Layouts
from xdit_ir.sharding.machine import Machine

Infer = Callable[[OpCall], OpSharding]
Seeds = Mapping[str, Layouts]
# A block, the layouts of its arguments, and those that its results are brought into (None: as they come).
Variant = tuple[str, Layouts, Layouts | None]


@dataclass(frozen=True)
class BlockVariant:
    """A variant of a block; `preferred_inputs` are arguments that it would rather get cut."""

    draft: LayoutGraph
    preferred_inputs: Mapping[int, Layout]


@dataclass
class Propagation:
    """One propagation over a program; also the memo for repeated ones over the same program (trial partitions).

    `inside`: seeds in blocks that have layouts; what these return stays as it is.
    """

    program: Program
    mesh: Mesh
    infer: Infer = infer
    inside: Mapping[str, Seeds] = field(default_factory=dict)
    bodies: dict[Variant, BlockVariant] = field(default_factory=dict)
    rulings: dict[tuple[fx.Node, Layouts], OpSharding] = field(default_factory=dict)
    demands: dict[Any, Layouts | None] = field(default_factory=dict)
    layouts: dict[Layout, Layout] = field(default_factory=dict)

    def run(self, seeds: Seeds | None = None) -> Program:
        """The program with layouts; `seeds` bring the values of these names (nodes of the outer graph) into the given
        layouts, one after the other."""
        return self.attempt(seeds).program()

    def attempt(self, seeds: Seeds | None = None) -> Assignment:
        """The same, to be priced before it is written down."""
        draft = self.forward(seeds or {})
        draft.sweep(lambda step: _push(step, self))
        return Assignment(self, draft)

    def forward(self, seeds: Seeds) -> LayoutGraph:
        """What follows from the seeds along the data flow, no cut moved before what it cuts."""
        inputs = [
            node.meta.get(LAYOUT, Layout.whole(len(node.meta[SPEC].shape)))
            for node in self.program.graph.nodes
            if node.op == "placeholder"
        ]
        return _GraphPropagation(self, inputs, seeds, None, outer=True).write(self.program.graph)

    def same(self, layout: Layout) -> Layout:
        """One object for equal layouts, which makes comparing them cheap."""
        return self.layouts.setdefault(layout, layout)

    def rule(self, node: fx.Node, layouts: Layouts) -> OpSharding:
        """The ruling for a node of the source program, remembered."""
        key = (node, layouts)
        if key not in self.rulings:
            ruling = self.infer(OpCall(node, self.mesh, layouts))
            inputs, outputs = ruling.inputs, ruling.outputs
            one = isinstance(outputs, Layout)
            shared = tuple(map(self.same, as_layouts(outputs)))
            self.rulings[key] = replace(
                ruling, inputs=tuple(map(self.same, inputs)), outputs=shared[0] if one else shared
            )
        return self.rulings[key]

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
        draft.sweep(lambda step: _push(step, self))
        return draft

    def block_input_fixpoint(self, name: str, layouts: Layouts, results: Layouts | None = None) -> Iterator[Layouts]:
        """The layouts of a block's arguments, then what the block wants instead, until it wants nothing else or, as it
        may want one order of indices for the other, what it had before."""
        seen: set[Layouts] = set()
        while layouts not in seen:
            yield layouts
            seen.add(layouts)
            preferred_inputs = self.body(name, layouts, results).preferred_inputs
            layouts = tuple(preferred_inputs.get(place, layout) for place, layout in enumerate(layouts))

    def demanded(self, step: LayoutNode, target: Any) -> Layouts | None:
        """Operand layouts that make a step's result `target` without communication, verified by its rule."""
        layouts = tuple(source.layout for source in step.sources)
        key = (step.node, step.target, layouts, target)
        if key not in self.demands:
            self.demands[key] = self._demanded(step, layouts, target)
        return self.demands[key]

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


@dataclass(frozen=True)
class Assignment:
    """A program whose layouts are decided but not written down."""

    run: Propagation
    draft: LayoutGraph

    def body(self, call: LayoutNode) -> LayoutGraph:
        """What a block call runs."""
        return self.run.bodies[call.body].draft

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
        """Time of all exchanges of a forward, none of them hidden."""
        total = Counter(self.draft.traffic())
        for body in self.bodies():
            total.update(body.traffic())
        return machine.exchange_seconds(self.draft.mesh, total)

    def attention_mesh_dims(self, *parts: str) -> frozenset[str]:
        """The mesh dims that divide the `queries`, `keys` or `batch` (and heads) of some attention."""
        return frozenset().union(*(draft.attention_mesh_dims(part) for draft in self._drafts() for part in parts))

    def key_gather_dims(self) -> frozenset[str]:
        """The mesh dims along which some attention finds only a part of its keys."""
        return frozenset().union(*(draft.key_gather_dims() for draft in self._drafts()))

    def _drafts(self) -> list[LayoutGraph]:
        return [self.draft, *(self.run.bodies[v].draft for v in {step.body: None for step in self.draft.calls})]

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
        blocks = {name: Block(name, self.run.bodies[v].draft.write(names.__getitem__)) for v, name in names.items()}
        return self.run.program.replace(graph=self.draft.write(names.__getitem__), blocks=blocks)


class _GraphPropagation:
    """Drafts one graph, deciding a layout for every node and inserting the changes of layout."""

    def __init__(
        self, run: Propagation, inputs: Sequence[Layout], seeds: Seeds, results: Layouts | None, *, outer: bool
    ) -> None:
        self.run, self.seeds, self.results, self.outer = run, seeds, results, outer
        self.draft = LayoutGraph(run.mesh)
        self.env: dict[fx.Node, LayoutNode] = {}
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
            for layout in self.seeds.get(node.name, ()):
                new = self.convert(new, layout)
            self.env[node] = new
        return self.draft

    def _step(self, node: fx.Node) -> LayoutNode:
        if node.op == "placeholder":
            return self._add(node, node.target, [], self.run.same(next(self.inputs)))
        if node.op == "get_attr":
            layout = node.meta.get(LAYOUT) or Layout.whole(len(node.meta[SPEC].shape))
            return self._add(node, node.target, [], self.run.same(layout))
        sources = [self.env[operand] for operand in operands(node)]
        if ops.is_relayout(node.target):
            return self.convert(sources[0], self._carried(node, sources[0].layout))
        if node.target is operator.getitem:
            return self._add(node, node.target, sources, sources[0].layout[node.args[1]])
        return self._call(node, sources) if is_block_call(node) else self._operator(node, sources)

    def _add(self, node: fx.Node, target: Any, sources: list[LayoutNode], layout: Any) -> LayoutNode:
        return self.draft.add(LayoutNode(node, target, sources, layout))

    def _operator(self, node: fx.Node, sources: list[LayoutNode]) -> LayoutNode:
        ruling = self.run.rule(node, tuple(source.layout for source in sources))
        if node in self.tail and any(self._divides_anew(*pair) for pair in zip(sources, ruling.inputs, strict=True)):
            ruling = self.run.rule(node, tuple(Layout.whole(len(source.spec.shape)) for source in sources))
        taken = [self.convert(source, want) for source, want in zip(sources, ruling.inputs, strict=True)]
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
        return want.with_dims({dim: now for dim, now in kept.items() if self.run.mesh.dividing_dims(now) & {*FEATURES}})

    def _divides_anew(self, source: LayoutNode, want: Layout) -> bool:
        """Whether a value would be exchanged only to be gathered behind."""
        have: Layout = source.layout
        return not have.partial and kind(self.run.mesh, have, want)[0] not in ("shard", "gather")

    def _call(self, node: fx.Node, sources: list[LayoutNode]) -> LayoutNode:
        name = called_block(node)
        *_, layouts = self.run.block_input_fixpoint(name, tuple(self._given(source.layout) for source in sources))
        sources = [self.convert(source, want) for source, want in zip(sources, layouts, strict=True)]
        new = self._add(node, node.target, sources, self.run.body(name, layouts).draft.outputs)
        new.body = (name, layouts, None)
        return new

    def _given(self, layout: Layout) -> Layout:
        """What a block is given: sums; and whole features, where seeds inside of blocks say how these are divided."""
        mesh, features = self.run.mesh, frozenset(FEATURES)
        if self.run.inside and not layout.dividing_dims(mesh).isdisjoint(features):
            dims = ((dim, part) for dim, part in enumerate(layout.dims) if mesh.dividing_dims(part) & features)
            layout = layout.with_dims({dim: mesh.gathered(part, features) for dim, part in dims if part})
        return layout.summed()

    def _output(self, node: fx.Node) -> None:
        results = [self.env[value] for value in operands(node)]
        if self.outer:
            results = [self.convert(value, Layout.whole(len(value.spec.shape))) for value in results]
        results = [self.convert(value, value.layout.summed()) for value in results]
        if self.results is not None:
            results = [self.convert(value, want) for value, want in zip(results, self.results, strict=True)]
        self.draft.outputs = tuple(value.layout for value in results)
        self._add(node, node.target, results, self.draft.outputs)

    def convert(self, value: LayoutNode, want: Layout) -> LayoutNode:
        """The value in another layout."""
        have: Layout = value.layout
        if have is want:
            return value
        want = self.run.same(want)
        if have.partial and not want.partial:
            whole = self.run.same(have.summed())
            value = self._converted(value, whole, ops.all_reduce)
        if value.layout is want or value.layout == want:
            return value
        return self._converted(value, want, ops.RELAYOUTS[kind(self.run.mesh, value.layout, want)[0]])

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


def _push(step: LayoutNode, run: Propagation) -> list[LayoutNode]:
    """Move cuts of all results of a step before it; the cuts to insert there."""
    if step.relayout and step.target is ops.all_reduce:
        return _push_sum(step, run)
    if step.body is None and not step.is_operator:
        return []
    results = list(step.users) if isinstance(step.layout, tuple) else [step]
    wanted = [result.common_shard() for result in results]
    return _push_call(step, results, wanted, run) if step.body else _push_operator(step, results, wanted, run)


def _push_operator(
    step: LayoutNode, results: list[LayoutNode], wanted: list[Layout | None], run: Propagation
) -> list[LayoutNode]:
    if not results or any(want is None for want in wanted):
        return []
    target: Any = wanted[0]
    if isinstance(step.layout, tuple):
        if len(results) != len(step.layout):
            return []
        placed = {result.node.args[1]: want for result, want in zip(results, wanted, strict=True)}
        target = tuple(placed[i] for i in range(len(results)))
    needs = run.demanded(step, target)
    return [] if needs is None else _moved(step, needs, target, results, run)


def _push_sum(step: LayoutNode, run: Propagation) -> list[LayoutNode]:
    """A sum of which every rank takes a part only becomes a sum of parts."""
    [source], wanted = step.sources, step.common_shard()
    pending: frozenset[str] = source.layout.partial
    if wanted is None:
        return []
    scattered = wanted.dividing_dims(run.mesh) - step.layout.dividing_dims(run.mesh)
    if not scattered or not scattered <= pending - {TIME}:
        return []
    if scattered == pending:
        step.target = ops.reduce_scatter
        return _moved(step, (source.layout,), wanted, [step], run)
    part = run.same(replace(wanted, partial=pending - scattered))
    first = LayoutNode(source.node, ops.reduce_scatter, [source], part, relayout=True)
    step.set_operands([first])
    return [first, *_moved(step, (part,), wanted, [step], run)]


def _push_call(
    step: LayoutNode, results: list[LayoutNode], wanted: list[Layout | None], run: Propagation
) -> list[LayoutNode]:
    """A block whose results are cut becomes one that makes only these parts, if that is less work."""
    name, layouts, before = step.body
    if before is not None or all(want is None for want in wanted):
        return []
    made = list(step.layout)
    for result, want in zip(results, wanted, strict=True):
        made[result.node.args[1]] = want or result.layout  # type: ignore[index]
    *_, needs = run.block_input_fixpoint(name, layouts, tuple(made))
    variant = (name, needs, tuple(made))
    old, new = (run.bodies[one].draft for one in (step.body, variant))
    if max(new.flops()) >= max(old.flops()) or new.moved_bytes() > old.moved_bytes():
        return []
    step.body = variant
    cut = [result for result, want in zip(results, wanted, strict=True) if want is not None]
    return _moved(step, variant[1], new.outputs, cut, run)


def _moved(
    step: LayoutNode, needs: Layouts, target: Any, results: list[LayoutNode], run: Propagation
) -> list[LayoutNode]:
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
