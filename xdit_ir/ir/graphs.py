"""What graphs of the IR have in common: operands, results, arguments by name, copies, and removal of what is dead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import (
    LAYOUT,
    SPEC,
    WEIGHT,
    WHERE,
    Block,
    Program,
    call_block,
    called_block,
    qualified,
    where_of,
)

OUTER = ""  # the outer graph among the names of blocks
_set_args: Any = vars(fx.Node)["args"].fset
_set_kwargs: Any = vars(fx.Node)["kwargs"].fset


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes in an argument, however nested, in order; one that occurs twice is listed twice."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node by position; one that is used twice is listed twice."""
    args, kwargs = node.args, node.kwargs
    return nodes_in((args, kwargs)) if args or kwargs else []


def takers(node: fx.Node, is_view: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """What takes a value, also by way of views."""
    for user in node.users:
        if is_view(user):
            yield from takers(user, is_view)
        else:
            yield user


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """What a graph is given: the inputs of an outer graph; the arguments and then the weights of a body."""
    return list(graph.find_nodes(op="placeholder"))


def arguments_of(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders of a body that are no weights."""
    return [node for node in placeholders(graph) if WEIGHT not in node.meta]


def weights_of(graph: fx.Graph) -> dict[str, fx.Node]:
    """The weights of a body by their names."""
    return {str(node.meta[WEIGHT]): node for node in placeholders(graph) if WEIGHT in node.meta}


def results_of(graph: fx.Graph) -> list[fx.Node]:
    """What a graph returns."""
    return operands(graph.output_node())


def with_operands(node: fx.Node, new: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with its operands replaced, by position."""
    if not node.args and not node.kwargs:
        return (), {}
    feed = iter(new)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(feed))
    return args, dict(kwargs)


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by their names in the operator's schema (or Python signature), defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
        bound.apply_defaults()
        return dict(bound.arguments)
    values = {}
    for place, argument in enumerate(schema.arguments):
        if place < len(node.args):
            values[argument.name] = node.args[place]
        else:
            values[argument.name] = node.kwargs.get(
                argument.name, argument.default_value if argument.has_default_value() else None
            )
    return values


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy to edit; metadata dicts are copied, their values shared."""
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = copy_node(result, node, env.__getitem__)
    return result


def add_node(graph: fx.Graph, op: str, target: Any, args: Any = (), kwargs: Any = None, name: str = "") -> fx.Node:
    """`graph.create_node` in half of the time: arguments are given later, as a graph looks through those that a node is
    made with, and by their setters, as setting an attribute of a node files it anew in its graph."""
    new = graph.create_node(op, target, name=name or None)
    if args:
        _set_args(new, args)
    if kwargs:
        _set_kwargs(new, kwargs)
    return new


def copy_node(graph: fx.Graph, node: fx.Node, operand: Callable[[fx.Node], Any]) -> fx.Node:
    """`graph.node_copy`, as quick."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), operand) if node.args or node.kwargs else ((), {})
    new = add_node(graph, node.op, node.target, args, kwargs, node.name)
    new.meta.update(node.meta)
    return new


def map_graphs(program: Program, rewrite: Callable[[fx.Graph], None]) -> Program:
    """Apply an in-place rewrite to copies of the outer graph and every block body (of a `spare` program to these
    themselves); weights that a body no longer uses are no longer given to it."""
    editable = (lambda graph: graph) if program.spare else copy_graph
    outer = editable(program.graph)
    rewrite(outer)
    blocks = {}
    for name, block in program.blocks.items():
        body = editable(block.graph)
        rewrite(body)
        drop_unused_weights(body)
        blocks[name] = replace(block, graph=body)
    fit_calls(outer, blocks)
    return program.replace(graph=outer, blocks=blocks)


def drop_unused_weights(body: fx.Graph) -> None:
    """Erase the weights that a body does not use; its calls must then be made to fit."""
    for node in weights_of(body).values():
        if not node.users:
            body.erase_node(node)


def fit_calls(graph: fx.Graph, blocks: Mapping[str, Block]) -> None:
    """Give to every block the weights that it takes, and no others."""
    needed = {name: weights_of(block.graph) for name, block in blocks.items()}
    for call in graph.find_nodes(op="call_function", target=call_block):
        name, prefix, values, weights = call.args
        if len(weights) != len(needed[name]):
            call.args = (name, prefix, values, {key: weights[key] for key in needed[name]})
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def all_graphs(program: Program) -> Iterator[tuple[str, fx.Graph, int]]:
    """Every graph of a program, the outer one first: its block's name (`OUTER`), and how often it runs in a forward."""
    calls = [called_block(node) for node in program.calls]
    yield OUTER, program.graph, 1
    for name, block in program.blocks.items():
        yield name, block.graph, calls.count(name)


def expand_call(graph: fx.Graph, call: fx.Node, body: fx.Graph, *, prefixed: bool = False) -> dict[fx.Node, fx.Node]:
    """Replace a block call by the operators of the body that it calls, in place; returns the new node of each.

    `prefixed`: names of values begin with the call's prefix.
    """
    prefix, given = str(call.args[1]), iter(operands(call))
    inside: dict[fx.Node, fx.Node] = {}
    made: dict[fx.Node, fx.Node] = {}
    for node in body.nodes:
        if node.op == "placeholder":
            inside[node] = next(given)
        elif node.op != "output":
            args, kwargs = fx.map_arg((node.args, node.kwargs), inside.__getitem__)
            target = qualified(prefix, str(node.target)) if node.op == "get_attr" else node.target
            name = f"{prefix}_{node.name}".replace(".", "_") if prefixed else node.name
            with graph.inserting_before(call):
                inside[node] = made[node] = new = graph.create_node(node.op, target, args, dict(kwargs), name=name)
            where = where_of(node)
            new.meta = node.meta | {WHERE: replace(where, module=where.below(prefix))}
    results = [inside[value] for value in results_of(body)]
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
        graph.erase_node(item)
    graph.erase_node(call)
    return made


def write_relayout(graph: fx.Graph, x: fx.Node, target: Any, layout: Layout, name: str | None = None) -> fx.Node:
    """`x` brought into another layout by `target`, one of `xdit_ir.ir.ops.RELAYOUTS`; of its type and origin."""
    new = graph.create_node("call_function", target, (x,), name=name or f"{x.name}_{target.__name__}")
    new.meta = {key: x.meta[key] for key in (SPEC, WHERE) if key in x.meta} | {LAYOUT: layout}
    return new


def remove_dead(graph: fx.Graph, stays: Callable[[fx.Node], bool] = lambda node: False) -> None:
    """Erase what nothing uses, but for placeholders and what `stays` for its effect."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not stays(node):
            graph.erase_node(node)
