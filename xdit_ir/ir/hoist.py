"""Take what does not depend on other blocks out of blocks, in front of the first one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from xdit_ir.ir.graphs import (
    add_node,
    arguments_of,
    copy_graph,
    copy_node,
    drop_unused_weights,
    operands,
    placeholders,
    remove_dead,
    results_of,
    weights_of,
)
from xdit_ir.ir.program import LAYOUT, SPEC, WEIGHT, Block, Program, call_block, call_parts, called_block, is_block_call

Chosen = Mapping[str, Sequence[fx.Node]]
Hoisted = dict[fx.Node, list[fx.Node]]


def early_inputs(program: Program) -> dict[str, set[fx.Node]]:
    """Per block the arguments and weights that come out of no block, in any of its calls."""
    late = _late(program.graph)
    found: dict[str, set[fx.Node]] = {}
    for call in program.calls:
        name = called_block(call)
        given = zip(placeholders(program.blocks[name].graph), operands(call), strict=True)
        early = {place for place, value in given if value not in late}
        found[name] = found.get(name, early) & early
    return found


def hoist(program: Program, chosen: Chosen, suffix: str) -> tuple[Program, Hoisted]:
    """The program in which these nodes of bodies are computed before the first block, and given to the blocks.

    For every call of a block there is a call of `<block>_<suffix>`, which computes the block's chosen nodes from early
    inputs; `Hoisted` has, per such call, its results. What only they needed is no longer given to the block.
    """
    graph, env, made, late = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, list[fx.Node]](), _late(program.graph)
    for node in program.graph.nodes:
        if node not in late:
            env[node] = copy_node(graph, node, env.__getitem__)
    early = {name: _early_part(program.blocks[name], nodes, suffix) for name, nodes in chosen.items()}
    rest = {name: with_given(program.blocks[name], nodes) for name, nodes in chosen.items()}
    for call in program.calls:
        if called_block(call) in chosen:
            made[call] = _call_early(graph, call, early[called_block(call)], env, program)
    for node in program.graph.nodes:
        if node in late:
            env[node] = copy_node(graph, node, env.__getitem__)
            if node in made:
                env[node].args = call_with_given(env[node], program.blocks[called_block(node)], made[node], rest)
    blocks = {name: rest.get(name, block) for name, block in program.blocks.items()}
    blocks |= {block.name: block for block in early.values()}
    return program.replace(graph=graph, blocks=blocks), {parts[0].all_input_nodes[0]: parts for parts in made.values()}


def _late(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a block."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if is_block_call(node) or node.op == "output" or any(source in late for source in operands(node)):
            late.add(node)
    return late


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes, and all that they are computed from in their graph."""
    return _reached(nodes, operands)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes, and all in their graph that is computed from them."""
    return _reached(nodes, lambda node: node.users)


def _reached(nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += following(node)
    return found


def _early_part(block: Block, nodes: Sequence[fx.Node], suffix: str) -> Block:
    graph, env, needed = fx.Graph(), dict[fx.Node, fx.Node](), ancestors(nodes)
    for node in block.graph.nodes:
        if node in needed:
            env[node] = copy_node(graph, node, env.__getitem__)
    graph.output(tuple(env[node] for node in nodes))
    return Block(f"{block.name}_{suffix}", graph)


def with_given(block: Block, nodes: Sequence[fx.Node]) -> Block:
    """The block that is given these values, and no input that only they needed."""
    graph = copy_graph(block.graph)
    copies = {node.name: node for node in graph.nodes}
    last = arguments_of(graph)[-1]
    for node in (copies[node.name] for node in nodes):
        with graph.inserting_after(last):
            last = graph.create_node("placeholder", f"{node.name}_made", name=f"{node.name}_made")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
    remove_dead(graph)
    for node in arguments_of(graph):
        if not node.users:
            graph.erase_node(node)
    drop_unused_weights(graph)
    return replace(block, graph=graph)


def _call_early(
    graph: fx.Graph, call: fx.Node, block: Block, env: Mapping[fx.Node, fx.Node], program: Program
) -> list[fx.Node]:
    """The results of a call of what was taken out of a block."""
    name, prefix, values, weights = call_parts(call)
    given = {node.name: value for node, value in zip(arguments_of(program.blocks[name].graph), values, strict=True)}
    taken = [env[given[node.name]] for node in arguments_of(block.graph)]
    needed = {key: env[weights[key]] for key in weights_of(block.graph)}
    new = add_node(graph, "call_function", call_block, (block.name, prefix, taken, needed))
    results = results_of(block.graph)
    new.meta.update(call.meta | _types(results))
    parts = []
    for index, result in enumerate(results):
        parts.append(add_node(graph, "call_function", operator.getitem, (new, index)))
        parts[-1].meta.update({key: value for key, value in (call.meta | result.meta).items() if key != WEIGHT})
    return parts


def _types(results: Sequence[fx.Node]) -> dict[str, Any]:
    every = (SPEC, LAYOUT) if all(LAYOUT in node.meta for node in results) else (SPEC,)
    return {key: tuple(node.meta[key] for node in results) for key in every}


def call_with_given(call: fx.Node, block: Block, made: Sequence[fx.Node], rest: Mapping[str, Block]) -> Any:
    """The arguments of a call of `block` for its form in `rest`, `with_given` these values."""
    name, prefix, values, weights = call_parts(call)
    left = {node.name for node in placeholders(rest[name].graph)}
    kept = [value for node, value in zip(arguments_of(block.graph), values, strict=True) if node.name in left]
    return name, prefix, [*kept, *made], {key: weights[key] for key in weights_of(rest[name].graph)}
