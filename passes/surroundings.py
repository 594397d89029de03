"""What stands around the block calls of a program, in pieces that are bodies of their own."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence

from torch import fx

from xdit_ir.ir.graphs import add_node, copy_node, operands
from xdit_ir.ir.program import Block, Program, is_block_call

# Nodes of the longest piece. A layer has some hundred.
LONGEST = 400


def surroundings(program: Program, name: str) -> Iterator[Block]:
    """What is computed between two block calls, before the first or behind the last, each time a body, in order.

    Nodes keep their names. What comes from elsewhere is given, what is used elsewhere is returned; weights are there as
    in an outer graph. Longer ones are cut where fewest values are still needed, which is between layers.
    """
    between: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "call_function" and not _is_of_call(node):
            between += [] if _is_result(node) else [node, *filter(_is_result, node.users)]
        elif is_block_call(node) or node.op == "output":
            for piece in _pieces(between):
                yield Block(f"{name} {piece[0].name}", _body(piece))
            between = []


def _is_of_call(node: fx.Node) -> bool:
    return is_block_call(node) or any(is_block_call(source) for source in node.all_input_nodes)


def _is_result(node: fx.Node) -> bool:
    """Whether it is one of several results of an operator: it goes with that, since a body returns tensors."""
    return node.target is operator.getitem


def _pieces(nodes: Sequence[fx.Node]) -> Iterator[Sequence[fx.Node]]:
    alive, start = _alive(nodes), 0
    while len(nodes) - start > LONGEST:
        end = min(range(start + LONGEST // 2, start + LONGEST), key=alive.__getitem__)
        end = next((place for place in range(end, len(nodes)) if not _is_result(nodes[place])), len(nodes))
        yield nodes[start:end]
        start = end
    if nodes[start:]:
        yield nodes[start:]


def _alive(nodes: Sequence[fx.Node]) -> list[int]:
    """In front of each node: how many values of those before it are needed by it or later."""
    last = {source: place for place, node in enumerate(nodes) for source in operands(node)}
    change = [0] * (len(nodes) + 1)
    for place, node in enumerate(nodes):
        if last.get(node, place) > place:
            change[place + 1] += 1
            change[last[node] + 1] -= 1
    return list(itertools.accumulate(change))


def _body(nodes: Sequence[fx.Node]) -> fx.Graph:
    graph, inside, env = fx.Graph(), set(nodes), dict[fx.Node, fx.Node]()
    sources = dict.fromkeys(source for node in nodes for source in operands(node) if source not in inside)
    for source in sorted(sources, key=lambda source: source.op == "get_attr"):
        op, target = ("get_attr", source.target) if source.op == "get_attr" else ("placeholder", source.name)
        env[source] = add_node(graph, op, target, (), {}, source.name)
        env[source].meta.update(source.meta)
    for node in nodes:
        env[node] = copy_node(graph, node, env.__getitem__)
    graph.output(tuple(env[node] for node in nodes if any(user not in inside for user in node.users)))
    return graph
