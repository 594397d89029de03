"""Propagate layouts through a program: forward by the rules, then push cuts upstream by demand.

The result is a new program in which every node carries a `Layout` and every change of layout is a node of its own.
Blocks that are called with different layouts become different blocks.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from xdit_ir import ops
from xdit_ir.layout import Layout, kind
from xdit_ir.mesh import Mesh
from xdit_ir.program import LAYOUT, SPEC, WHERE, Block, Program, call_block, call_parts, is_block_call
from xdit_ir.rules import decide, rule_for
from xdit_ir.rules.base import Call, Ruling, operands, with_operands

FALLBACK = "fallback"
Decide = Callable[[Call], Ruling]
Layouts = tuple[Layout, ...]
Seeds = Mapping[str, Layouts]


@dataclass(frozen=True)
class Body:
    """A block for certain layouts of its arguments; `wants` are arguments that it would rather get cut."""

    graph: fx.Graph
    outputs: Layouts
    wants: Mapping[int, Layout]


@dataclass
class Propagation:
    """One propagation over a program; also the memo for repeated ones over the same program (trial partitions)."""

    program: Program
    mesh: Mesh
    decide: Decide = decide
    bodies: dict[tuple[str, Layouts], Body] = field(default_factory=dict)
    rulings: dict[tuple[fx.Node, Layouts], Ruling] = field(default_factory=dict)

    def run(self, seeds: Seeds | None = None) -> Program:
        """The program with layouts; `seeds` bring the values of these names (nodes of the outer graph) into the given
        layouts, one after the other."""
        inputs = [
            node.meta.get(LAYOUT, Layout.whole(len(node.meta[SPEC].shape)))
            for node in self.program.graph.nodes
            if node.op == "placeholder"
        ]
        writer = _Writer(self, inputs, seeds or {}, outer=True)
        for node in self.program.graph.nodes:
            writer.visit(node)
        _push_upstream(writer.graph, self)
        return _named(self.program.replace(graph=writer.graph), writer.calls, self.bodies)

    def rule(self, node: fx.Node, layouts: Layouts) -> Ruling:
        """The ruling for a node of the source program, remembered."""
        key = (node, layouts)
        if key not in self.rulings:
            self.rulings[key] = self.decide(Call(node, self.mesh, layouts))
        return self.rulings[key]

    def body(self, name: str, layouts: Layouts) -> Body:
        """The block `name` for arguments of these layouts."""
        key = (name, layouts)
        if key not in self.bodies:
            writer = _Writer(self, layouts, {}, outer=False)
            for node in self.program.blocks[name].graph.nodes:
                writer.visit(node)
            _push_upstream(writer.graph, self)
            self.bodies[key] = Body(writer.graph, writer.outputs, _wants(writer.graph))
        return self.bodies[key]


class _Writer:
    """Copies one graph, deciding a layout for every node and inserting the changes of layout."""

    def __init__(self, run: Propagation, inputs: Sequence[Layout], seeds: Seeds, *, outer: bool) -> None:
        self.run, self.seeds, self.outer = run, seeds, outer
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs = iter(inputs)
        self.outputs: Layouts = ()
        self.calls: dict[fx.Node, tuple[str, Layouts]] = {}
        self.converted: dict[tuple[fx.Node, Layout], fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Write one node of the source graph."""
        if node.op == "output":
            self._output(node)
            return
        if ops.is_relayout(node.target):
            new = self.convert(self.env[operands(node)[0]], node.meta[LAYOUT])
        elif node.op == "placeholder":
            new = self._copy(node, next(self.inputs))
        elif node.op == "get_attr":
            new = self._copy(node, Layout.whole(len(node.meta[SPEC].shape)))
        elif node.target is operator.getitem:
            source = self.env[operands(node)[0]]
            new = self._copy(node, source.meta[LAYOUT][node.args[1]])
        elif is_block_call(node):
            new = self._call(node)
        else:
            new = self._operator(node)
        for layout in self.seeds.get(node.name, ()):
            new = self.convert(new, layout)
        self.env[node] = new

    def _copy(self, node: fx.Node, layout: Any) -> fx.Node:
        new = self.graph.node_copy(node, self.env.__getitem__)
        new.meta = {**node.meta, LAYOUT: layout}
        return new

    def _operator(self, node: fx.Node) -> fx.Node:
        sources = [self.env[operand] for operand in operands(node)]
        ruling = self.run.rule(node, tuple(source.meta[LAYOUT] for source in sources))
        args, kwargs = with_operands(
            node, [self.convert(source, want) for source, want in zip(sources, ruling.inputs, strict=True)]
        )
        new = self.graph.create_node(node.op, ruling.target or node.target, args, kwargs, name=node.name)
        new.meta = {**node.meta, LAYOUT: ruling.outputs}
        if ruling.fallback:
            new.meta[FALLBACK] = ruling.fallback
        return new if ruling.after is None else self.convert(new, ruling.after)

    def _call(self, node: fx.Node) -> fx.Node:
        name, prefix, values = call_parts(node)
        sources = [self.env[value] for value in values]
        while True:
            layouts = tuple(source.meta[LAYOUT] for source in sources)
            body = self.run.body(name, layouts)
            if not body.wants:
                break
            for place, want in body.wants.items():
                sources[place] = self.convert(sources[place], want)
        new = self.graph.create_node("call_function", call_block, (name, prefix, sources), name=node.name)
        new.meta = {**node.meta, LAYOUT: body.outputs}
        self.calls[new] = (name, layouts)
        return new

    def _output(self, node: fx.Node) -> None:
        results = [self.env[value] for value in operands(node)]
        if self.outer:
            results = [self.convert(value, Layout.whole(len(value.meta[SPEC].shape))) for value in results]
        results = [self.convert(value, value.meta[LAYOUT].summed()) for value in results]
        self.outputs = tuple(value.meta[LAYOUT] for value in results)
        new = self.graph.output(tuple(results))
        new.meta = dict(node.meta)

    def convert(self, value: fx.Node, want: Layout) -> fx.Node:
        """The value in another layout."""
        have: Layout = value.meta[LAYOUT]
        if have.partial and not want.partial:
            value = self._relayout(value, "all_reduce", have.summed())
            have = have.summed()
        if have == want:
            return value
        return self._relayout(value, kind(self.run.mesh, have, want)[0], want)

    def _relayout(self, value: fx.Node, name: str, want: Layout) -> fx.Node:
        key = (value, want)
        if key not in self.converted:
            self.converted[key] = insert_relayout(self.graph, value, name, want)
        return self.converted[key]


def insert_relayout(graph: fx.Graph, value: fx.Node, name: str, want: Layout) -> fx.Node:
    """Append a change of layout at the graph's insertion point."""
    node = graph.create_node("call_function", ops.RELAYOUTS[name], (value,), name=f"{value.name}_{name}")
    node.meta = {SPEC: value.meta[SPEC], LAYOUT: want}
    if WHERE in value.meta:
        node.meta[WHERE] = value.meta[WHERE]
    return node


def _cut_by_all(node: fx.Node) -> Layout | None:
    """The layout to which every user of a value cuts it, if they agree."""
    wanted = {user.meta[LAYOUT] if user.target is ops.shard else None for user in node.users}
    return wanted.pop() if len(wanted) == 1 else None


def _wants(graph: fx.Graph) -> dict[int, Layout]:
    places = [node for node in graph.nodes if node.op == "placeholder"]
    return {i: want for i, node in enumerate(places) if (want := _cut_by_all(node)) is not None}


def _push_upstream(graph: fx.Graph, run: Propagation) -> None:
    """Move cuts before the operators whose whole result they cut, in one sweep against the data flow."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or ops.is_relayout(node.target) or is_block_call(node):
            continue
        if node.target is not operator.getitem:
            _push_one(graph, node, run)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)


def _push_one(graph: fx.Graph, node: fx.Node, run: Propagation) -> None:
    several = isinstance(node.meta[LAYOUT], tuple)
    results = list(node.users) if several else [node]
    wanted = [_cut_by_all(result) for result in results]
    if not results or any(want is None for want in wanted):
        return
    if several and len(results) != len(node.meta[LAYOUT]):
        return
    order = sorted(range(len(results)), key=lambda i: results[i].args[1] if several else 0)  # type: ignore[arg-type, return-value]
    outputs = tuple(wanted[i] for i in order)
    target = outputs if several else outputs[0]
    sources = operands(node)
    needs = _demanded(node, target, run)
    if needs is None:
        return
    with graph.inserting_before(node):
        cut = [
            source if need == source.meta[LAYOUT] else insert_relayout(graph, source, "shard", need)
            for source, need in zip(sources, needs, strict=True)
        ]
    node.args, node.kwargs = with_operands(node, cut)
    node.meta = {**node.meta, LAYOUT: target}
    for result, want in zip(results, wanted, strict=True):
        result.meta = {**result.meta, LAYOUT: want} if several else result.meta
        for user in list(result.users):
            user.replace_all_uses_with(result)
            graph.erase_node(user)


def _demanded(node: fx.Node, target: Any, run: Propagation) -> Layouts | None:
    """Operand layouts that make a node's result `target` without communication, verified by its rule."""
    rule = rule_for(node.target)
    sources = operands(node)
    layouts = tuple(source.meta[LAYOUT] for source in sources)
    if rule is None or any(layout.partial for layout in layouts):
        return None
    needs = rule.demand(Call(node, run.mesh, layouts), target)
    if needs is None or len(needs) != len(sources):
        return None
    for have, need in zip(layouts, needs, strict=True):
        if have != need and kind(run.mesh, have, need)[0] != "shard":
            return None
    ruling = rule.forward(Call(node, run.mesh, needs))
    return needs if ruling.outputs == target and ruling.inputs == needs else None


def _named(program: Program, calls: Mapping[fx.Node, tuple[str, Layouts]], bodies: Mapping[Any, Body]) -> Program:
    """Give every used variant of a block a name of its own: `Block`, `Block.2`, ..."""
    names: dict[tuple[str, Layouts], str] = {}
    for node, key in calls.items():
        if key not in names:
            taken = set(names.values())
            choices = itertools.chain([key[0]], (f"{key[0].partition('.')[0]}.{i}" for i in itertools.count(2)))
            names[key] = next(name for name in choices if name not in taken)
        node.args = (names[key], *node.args[1:])
    blocks = {name: Block(name, bodies[key].graph) for key, name in names.items()}
    return program.replace(blocks=blocks)
