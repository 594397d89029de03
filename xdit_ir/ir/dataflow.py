"""How values flow through block calls: with every call expanded, or for all calls of a block at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from xdit_ir.ir.graphs import all_graphs, operands, placeholders, results_of
from xdit_ir.ir.program import Program, called_block, is_block_call

# Whether an operator hands on what reaches it, given which of its operands are reached.
HandsOn = Callable[[fx.Node, list[bool]], bool]
# Nodes by graph: of the outer graph, and of every block by its name.
Nodes = dict[str, set[fx.Node]]


@dataclass(frozen=True)
class ProgramValue:
    """A value of the expanded program: a node of the outer graph, or of the body of a call."""

    call: fx.Node | None
    node: fx.Node


class Expanded:
    """A program with its block calls expanded.

    An argument of a body is the value that the call gives, a part of a call's result the value that the body returns:
    `resolved` tells which, and the sources of a value are resolved.
    """

    def __init__(self, program: Program) -> None:
        self.program = program

    def __iter__(self) -> Iterator[ProgramValue]:
        """What is computed, and the inputs and weights, in the order of execution."""
        for node in self.program.graph.nodes:
            if is_block_call(node):
                body = self.program.blocks[called_block(node)].graph.nodes
                yield from (ProgramValue(node, inner) for inner in body if inner.op not in ("placeholder", "output"))
            elif not self._is_part_of_call(node):
                yield ProgramValue(None, node)

    def resolved(self, value: ProgramValue) -> ProgramValue:
        """The value that this one is."""
        if value.call is not None and value.node.op == "placeholder":
            return self.resolved(ProgramValue(None, self._given[value.call][value.node]))
        if value.call is None and self._is_part_of_call(value.node):
            call, place = value.node.args
            assert isinstance(call, fx.Node) and isinstance(place, int)
            return self.resolved(ProgramValue(call, self._results[called_block(call)][place]))
        return value

    def sources(self, value: ProgramValue) -> list[ProgramValue]:
        """What a resolved value is computed from."""
        return [self.resolved(ProgramValue(value.call, source)) for source in operands(value.node)]

    @staticmethod
    def _is_part_of_call(node: fx.Node) -> bool:
        return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and is_block_call(node.args[0])

    @cached_property
    def _given(self) -> dict[fx.Node, dict[fx.Node, fx.Node]]:
        """By call, what each placeholder of its body stands for."""
        inputs = {name: placeholders(block.graph) for name, block in self.program.blocks.items()}
        return {c: dict(zip(inputs[called_block(c)], operands(c), strict=True)) for c in self.program.calls}

    @cached_property
    def _results(self) -> dict[str, list[fx.Node]]:
        return {name: results_of(block.graph) for name, block in self.program.blocks.items()}


def reach(program: Program, seeds: Mapping[str, set[fx.Node]], hands_on: HandsOn | None = None) -> Nodes:
    """Nodes that those of `seeds` reach, in the outer graph and in bodies.

    What reaches a block in one call counts for all its calls. `hands_on`: default is that every operator does.
    """
    graphs = {name: graph for name, graph, _ in all_graphs(program)}
    found: Nodes = {name: set(seeds.get(name, ())) for name in graphs}
    size = -1
    while size != sum(map(len, found.values())):
        size = sum(map(len, found.values()))
        for name, graph in graphs.items():
            _reach_one(program, graph, found[name], found, hands_on)
    return found


def _reach_one(program: Program, graph: fx.Graph, mine: set[fx.Node], found: Nodes, hands_on: HandsOn | None) -> None:
    for node in graph.nodes:
        if is_block_call(node):
            body, inside = program.blocks[called_block(node)].graph, found[called_block(node)]
            given = zip(placeholders(body), operands(node), strict=True)
            inside.update(place for place, value in given if value in mine)
            if any(value in inside for value in results_of(body)):
                mine.add(node)
        elif node.op != "placeholder" and node not in mine:
            source = node.args[0] if node.target is operator.getitem else None
            if isinstance(source, fx.Node) and is_block_call(source):
                name = called_block(source)
                hit = results_of(program.blocks[name].graph)[node.args[1]] in found[name]
            else:
                reached = [value in mine for value in operands(node)]
                hit = any(reached) and (hands_on is None or hands_on(node, reached))
            if hit:
                mine.add(node)
