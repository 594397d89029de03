"""A program with `watch` and `reuse` as programs: what decides, and the rest with the region, or without."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_node, operands, placeholders, remove_dead, results_of
from xdit_ir.ir.hoist import ancestors, descendants
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, Program

aten = torch.ops.aten
_TYPE = (SPEC, LAYOUT, WHERE)


@dataclass(frozen=True, eq=False)
class CachedProgram:
    """The programs of a step, with layouts or each rank's. All take the inputs of the model first.

    `head` gives the `watched` values, whose change decides, then those that the others take behind the inputs; there
    is none where nothing is watched. `computed` gives the `outputs` of the model, then what is kept for `skipped`,
    which takes that last.
    """

    head: Program | None
    computed: Program
    skipped: Program
    watched: int
    outputs: int

    @property
    def programs(self) -> list[Program]:
        """All of them."""
        return [one for one in (self.head, self.computed, self.skipped) if one is not None]


def cut_cached(program: Program) -> CachedProgram:
    """The programs of a program that `reuse-region` has been applied to."""
    cut = _Cut(program)
    computed, skipped = cut.rest(with_region=True), cut.rest(with_region=False)
    taken = [node for node in cut.border if any(_placeholder(graph, node).users for graph in (computed, skipped))]
    for graph in (computed, skipped):
        for node in set(cut.border) - set(taken):
            graph.erase_node(_placeholder(graph, node))
    head = program.with_graph(cut.head(taken)) if cut.watches else None
    count = len(results_of(program.graph))
    return CachedProgram(head, program.with_graph(computed), program.with_graph(skipped), len(cut.watches), count)


class _Cut:
    """`early` is what decides; `border` what of that the rest uses."""

    def __init__(self, program: Program) -> None:
        self.source = program.graph
        self.watches = [node for node in self.source.nodes if node.target is ops.watch]
        early = ancestors(source for node in self.watches for source in operands(node))
        early |= {user for node in early for user in node.users if user.target is operator.getitem}
        self.varying = descendants(placeholders(self.source))  # the others depend on weights alone
        self.early = {node for node in early & self.varying if node.op != "placeholder"}
        self.border = [node for node in self.source.nodes if node in self.early and not set(node.users) <= self.early]

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

    def rest(self, *, with_region: bool) -> fx.Graph:
        graph, env, kept = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
        border = set(self.border)
        for node in [*placeholders(self.source), *self.border]:
            env[node] = _given(graph, node, node.name)
        reused = [node for node in self.source.nodes if node.target is ops.reuse]
        if not with_region:
            kept = [_given(graph, node, f"{node.name}_kept") for node in reused]
        for node in self.source.nodes:
            if node in env or node in self.early - border:
                continue
            if node.target is ops.watch:
                env[node] = env[operands(node)[0]]
            elif node.target is ops.reuse:
                values = [env[one] for one in operands(node)]
                if with_region:
                    kept.append(_difference(graph, f"{node.name}_kept", values))
                    env[node] = values[0]
                else:
                    env[node] = _sum(graph, node.name, kept[reused.index(node)], values[1:])
            elif node.op == "output":
                results = tuple(env[one] for one in operands(node))
                graph.output((*results, *(kept if with_region else ())))
            else:
                env[node] = copy_node(graph, node, env.__getitem__)
        remove_dead(graph)
        return graph


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
