"""A program with `watch` and `reuse` as programs: what decides, and the rest for each choice of what is reused."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_ir.caching.cut_blocks import CutBlock, cut_block, group_of
from xdit_ir.caching.decision import REGION
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_node, operands, placeholders, remove_dead, results_of
from xdit_ir.ir.hoist import ancestors, call_with_given, descendants
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, Program, called_block, is_block_call

aten = torch.ops.aten
_TYPE = (SPEC, LAYOUT, WHERE)
NOTHING = frozenset[int]()


@dataclass(frozen=True, eq=False)
class CachedProgram:
    """The programs of a step, with layouts or each rank's. All take the inputs of the model first.

    `head` gives the `watched` values, whose change decides, then those that the others take behind the inputs; there
    is none where nothing is watched. Of `rest` is run the one for the groups that a step reuses: it takes the values of
    these last, and gives the `outputs` of the model, then the values of all others. `points` has the group of each
    value.
    """

    head: Program | None
    rest: Mapping[frozenset[int], Program]
    points: Sequence[int]
    watched: int
    outputs: int

    @property
    def programs(self) -> list[Program]:
        """All of them, the head first."""
        return [*([] if self.head is None else [self.head]), *self.rest.values()]

    def each(self, change: Callable[[Program], Program]) -> CachedProgram:
        """The same with every program changed."""
        head = None if self.head is None else change(self.head)
        return replace(self, head=head, rest={reused: change(one) for reused, one in self.rest.items()})


def cut_cached(program: Program, variants: Sequence[frozenset[int]] = (NOTHING, REGION)) -> CachedProgram:
    """The programs of a program with values to reuse, for each of the `variants` of what a step reuses together."""
    cut = _Cut(program)
    rest = {reused: cut.rest(reused) for reused in variants}
    needed = {place for one in rest.values() for place, node in one.given.items() if node.users}
    for one in rest.values():
        one.keep_only(needed)
    taken = [node for node in cut.border if any(_placeholder(one.graph, node).users for one in rest.values())]
    for one in rest.values():
        for node in set(cut.border) - set(taken):
            one.graph.erase_node(_placeholder(one.graph, node))
    head = program.with_graph(cut.head(taken)) if cut.watches else None
    points = [group for place, group in enumerate(cut.points) if place in needed]
    programs = {reused: one.of(program) for reused, one in rest.items()}
    return CachedProgram(head, programs, points, len(cut.watches), len(results_of(program.graph)))


@dataclass(frozen=True, eq=False)
class _Rest:
    """The graph of a step: by the places of values, those that it is `given` and those that it has `computed`."""

    graph: fx.Graph
    blocks: Mapping[str, CutBlock]
    given: dict[int, fx.Node]
    computed: dict[int, fx.Node]

    def keep_only(self, needed: Iterable[int]) -> None:
        """Neither take nor give what no step uses."""
        for place in self.given.keys() - needed:
            self.graph.erase_node(self.given[place])
        unused = [node for place, node in self.computed.items() if place not in needed]
        self.graph.output_node().args = (tuple(one for one in results_of(self.graph) if one not in unused),)
        remove_dead(self.graph)

    def of(self, program: Program) -> Program:
        """The program."""
        blocks = {name: cut.block for name, cut in self.blocks.items()}
        return program.replace(blocks={**program.blocks, **blocks}).with_graph(self.graph)


class _Cut:
    """`early` is what decides; `border` what of that the rest uses; `points` are the groups of what is reused."""

    def __init__(self, program: Program) -> None:
        self.program, self.source = program, program.graph
        self.watches = [node for node in self.source.nodes if node.target is ops.watch]
        early = ancestors(source for node in self.watches for source in operands(node))
        early |= {user for node in early for user in node.users if user.target is operator.getitem}
        self.varying = descendants(placeholders(self.source))  # the others depend on weights alone
        self.early = {node for node in early & self.varying if node.op != "placeholder"}
        self.border = [node for node in self.source.nodes if node in self.early and not set(node.users) <= self.early]
        self.points = [group_of(value) for node in self.source.nodes for value in self._values(node)]

    def _values(self, node: fx.Node) -> list[fx.Node]:
        """What may be reused of a node: itself, or what the block has that it calls."""
        if is_block_call(node):
            body = self.program.blocks[called_block(node)].graph
            return [one for one in body.nodes if one.target is ops.reuse]
        return [node] if node.target is ops.reuse else []

    def head(self, taken: Iterable[fx.Node]) -> fx.Graph:
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.source.nodes:
            if node.op == "placeholder" or node in self.early or node not in self.varying:
                env[node] = copy_node(graph, node, env.__getitem__)
        decisive = [
            _difference(graph, f"{node.name}_change", [env[one] for one in operands(node)]) for node in self.watches
        ]
        graph.output((*decisive, *(env[node] for node in taken)))
        remove_dead(graph)
        return graph

    def rest(self, reused: frozenset[int]) -> _Rest:
        blocks = {name: cut_block(block, reused) for name, block in self.program.blocks.items()}
        made = _Rest(fx.Graph(), blocks, {}, {})
        graph, env, border = made.graph, dict[fx.Node, fx.Node](), set(self.border)
        for node in [*placeholders(self.source), *self.border]:
            env[node] = _given(graph, node, node.name)
        kept = self._kept(made, reused)
        for node in self.source.nodes:
            if node in env or node in self.early - border:
                continue
            if node.target is ops.watch:
                env[node] = env[operands(node)[0]]
            elif node.target is ops.reuse:
                values, [place] = [env[one] for one in operands(node)], kept[node]
                if place in made.given:
                    env[node] = _sum(graph, node.name, made.given[place], values[1:])
                else:
                    made.computed[place] = _difference(graph, f"{node.name}_kept", values)
                    env[node] = values[0]
            elif node.op == "output":
                graph.output((*(env[one] for one in operands(node)), *made.computed.values()))
            else:
                env[node] = copy_node(graph, node, env.__getitem__)
                if node in kept:
                    self._fit(node, env, made, kept[node])
        remove_dead(graph)
        return made

    def _kept(self, made: _Rest, reused: frozenset[int]) -> dict[fx.Node, list[int]]:
        """The places of what is kept of each node, after they are given where they are reused."""
        found, places = dict[fx.Node, list[int]](), itertools.count()
        for node in self.source.nodes:
            for value in self._values(node):
                place = next(places)
                found.setdefault(node, []).append(place)
                if group_of(value) in reused:
                    name = node.name if value is node else f"{node.name}_{value.name}"
                    made.given[place] = _given(made.graph, value, f"{name}_kept")
        return found

    def _fit(self, call: fx.Node, env: dict[fx.Node, fx.Node], made: _Rest, places: Sequence[int]) -> None:
        """Make the copy of a call one of the block's form: give it what is reused, and take what is not."""
        cut, copy, graph = made.blocks[called_block(call)], env[call], made.graph
        with graph.inserting_before(copy):
            given = [_sum(graph, "reused", made.given[place], []) for place in places if place in made.given]
        name = called_block(call)
        copy.args = call_with_given(copy, self.program.blocks[name], given, {name: cut.block})
        copy.meta |= cut.types(call)
        offset = len(call.meta[SPEC])
        for place, value in zip(places, cut.values, strict=True):
            if place not in made.given:
                item = graph.call_function(operator.getitem, (copy, offset))
                item.meta = {key: value.meta[key] for key in _TYPE if key in value.meta}
                made.computed[place], offset = item, offset + 1


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return next(one for one in placeholders(graph) if one.target == node.name)


def _given(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    made = graph.create_node("placeholder", name, name=name)
    made.meta = {key: node.meta[key] for key in _TYPE if key in node.meta}
    return made


def _difference(graph: fx.Graph, name: str, values: Sequence[fx.Node]) -> fx.Node:
    """A value, less another one if there is one, in memory of its own."""
    return _made(graph, name, aten.sub.Tensor if values[1:] else aten.clone.default, values)


def _sum(graph: fx.Graph, name: str, kept: fx.Node, stream: Sequence[fx.Node]) -> fx.Node:
    return _made(graph, name, aten.add.Tensor if stream else aten.clone.default, [*stream, kept])


def _made(graph: fx.Graph, name: str, target: Any, values: Sequence[fx.Node]) -> fx.Node:
    made = graph.create_node("call_function", target, tuple(values), name=name)
    made.meta = {key: values[0].meta[key] for key in _TYPE if key in values[0].meta}
    return made
