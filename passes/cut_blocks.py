"""`cut-blocks`: what waits for the host stands between blocks, not inside of one."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph, expand_call, fit_calls, operands, placeholders, results_of
from xdit_ir.ir.host_reads import reads_on_host
from xdit_ir.ir.program import SPEC, WEIGHT, Block, Program, call_block, call_parts, called_block


@dataclass(frozen=True)
class CutBlocks:
    """A block with operators that read values on the host (opaque leaves too) becomes a block before, between and
    behind them, and they stand in the outer graph. Each of these blocks can be compiled, and be part of a CUDA graph.
    """

    name: ClassVar[str] = "cut-blocks"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    def apply(self, program: Program) -> Program:
        """The program without such operators in blocks."""
        cut = {
            name: _Cut.of(block) for name, block in program.blocks.items() if any(map(reads_on_host, block.graph.nodes))
        }
        if not cut:
            return program
        outer = copy_graph(program.graph)
        for call in list(program.replace(graph=outer).calls):
            if called_block(call) in cut:
                prefix = call_parts(call).prefix
                for new in expand_call(outer, call, cut[called_block(call)].graph, prefixed=True).values():
                    if new.target is call_block:
                        new.args = (new.args[0], prefix, *new.args[2:])
        blocks = {name: block for name, block in program.blocks.items() if name not in cut}
        blocks |= {block.name: block for one in cut.values() for block in one.blocks}
        fit_calls(outer, blocks)
        return program.replace(graph=outer, blocks=blocks)


@dataclass(eq=False)
class _Cut:
    """A block as `graph`, a body that calls `blocks` and has between them what was cut out."""

    name: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    blocks: list[Block] = field(default_factory=list)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @staticmethod
    def of(block: Block) -> _Cut:
        """The cut of a block."""
        cut = _Cut(block.name)
        for node in placeholders(block.graph):
            cut.env[node] = cut.graph.node_copy(node)
        for inside, nodes in _pieces(block.graph):
            if inside:
                cut._call(nodes)
            else:
                for node in nodes:
                    cut.env[node] = cut.graph.node_copy(node, cut._known)
        cut.graph.output(tuple(cut._known(node) for node in results_of(block.graph)))
        return cut

    def _known(self, node: fx.Node) -> fx.Node:
        """A value of the block in this graph; constants, which all pieces may name, are copied where they are used."""
        return self.env[node] if node in self.env else self.graph.node_copy(node)

    def _call(self, nodes: Sequence[fx.Node]) -> None:
        """Make a block of these nodes, and call it."""
        made = set(nodes)
        taken = dict.fromkeys(source for node in nodes for source in operands(node) if source in self.env)
        values = [node for node in taken if WEIGHT not in node.meta]
        weights = {str(node.meta[WEIGHT]): node for node in taken if WEIGHT in node.meta}
        results = [node for node in nodes if node.op != "get_attr" and any(user not in made for user in node.users)]
        block = Block(f"{self.name}_part{len(self.blocks)}", _body([*values, *weights.values()], nodes, results))
        given = {key: self.env[node] for key, node in weights.items()}
        call = self.graph.call_function(call_block, (block.name, "", [self.env[node] for node in values], given))
        call.meta[SPEC] = tuple(node.meta[SPEC] for node in results)
        for place, node in enumerate(results):
            self.env[node] = self.graph.call_function(operator.getitem, (call, place))
            self.env[node].meta = dict(node.meta)
        self.blocks.append(block)


def _pieces(graph: fx.Graph) -> Iterator[tuple[bool, list[fx.Node]]]:
    """The nodes of a body in order: those of a block to be made (True), or one that reads values; what picks a result
    stands with what gives it, since only tensors are handed on."""
    waiting: list[fx.Node] = []
    done: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in done:
            continue
        together = [node, *(user for user in node.users if user.target is operator.getitem)]
        done.update(together)
        if not reads_on_host(node):
            waiting += together
            continue
        yield from _if_any(waiting)
        waiting = []
        yield False, together
    yield from _if_any(waiting)


def _if_any(nodes: list[fx.Node]) -> Iterator[tuple[bool, list[fx.Node]]]:
    if any(node.op != "get_attr" for node in nodes):
        yield True, nodes


def _body(taken: Sequence[fx.Node], nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Graph:
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in taken:
        env[node] = graph.create_node("placeholder", node.name, name=node.name)
        env[node].meta = dict(node.meta)

    def known(node: fx.Node) -> fx.Node:
        if node not in env:
            env[node] = graph.node_copy(node)
        return env[node]

    for node in nodes:
        if node.op != "get_attr":
            env[node] = graph.node_copy(node, known)
    graph.output(tuple(env[node] for node in results))
    return graph
