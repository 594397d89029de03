"""Replace block calls by the operators of their bodies."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import replace

from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.program import WHERE, Program, call_parts, where_of

Note = Callable[[fx.Node | None, fx.Node, fx.Node], None]


def inline(program: Program, calls: Collection[fx.Node], note: Note) -> Program:
    """The program with these calls of its outer graph expanded.

    `note(call, node, new)` sees every node of the new outer graph, with the node (of the outer graph, or of the body
    of `call`) that it was made from.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    results: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node in calls:
            results[node] = _expand(program, node, graph, env, note)
        elif node.target is operator.getitem and node.args[0] in results:
            env[node] = results[node.args[0]][node.args[1]]
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            note(None, node, env[node])
    return program.with_graph(graph)


def _expand(
    program: Program, call: fx.Node, graph: fx.Graph, outer: dict[fx.Node, fx.Node], note: Note
) -> list[fx.Node]:
    name, prefix, *_ = call_parts(call)
    given = iter(operands(call))
    env: dict[fx.Node, fx.Node] = {}
    for node in program.blocks[name].graph.nodes:
        if node.op == "placeholder":
            env[node] = outer[next(given)]
        elif node.op == "output":
            return [env[value] for value in operands(node)]
        else:
            env[node] = new = _copy(node, prefix, graph, env)
            note(call, node, new)
    raise AssertionError("a graph ends with an output")


def _copy(node: fx.Node, prefix: str, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
    new = graph.create_node(node.op, node.target, args, dict(kwargs), name=f"{prefix}_{node.name}".replace(".", "_"))
    new.meta = dict(node.meta)
    where = where_of(node)
    new.meta[WHERE] = replace(where, module=where.below(prefix))
    return new
