"""The structure of a body in code, apart from the numbers in it."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.collective_ops import Communicate
from xdit_ir.ir.fixed_call import FixedCall
from xdit_ir.ir.graphs import all_graphs, copy_node
from xdit_ir.ir.program import SPEC, WEIGHT, Program

STRUCTURE = "structure"  # of a module that is a body: its `Structure.key`
_PLAIN = (bool, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
NodeKey = Callable[[fx.Node, Mapping[fx.Node, int], list[int]], Hashable]
_FUNCTIONS = (torch._ops.OpOverload, types.FunctionType, types.BuiltinFunctionType)


@dataclass(frozen=True, eq=False)
class Structure:
    """A body as a graph of functions: two with equal `key` differ in nothing but their `numbers`, which are the sizes
    of what they are given and all integers in arguments, in the order of nodes."""

    graph: fx.Graph
    key: Hashable
    numbers: tuple[int, ...]

    @staticmethod
    def of(module: fx.GraphModule) -> Structure | None:
        """That of a body; None if something in it cannot be compared."""
        graph = _flat(module)
        numbers: list[int] = []
        key = None if graph is None else _graph_key(graph, numbers)
        return None if graph is None or key is None else Structure(graph, key, tuple(numbers))


def program_key(program: Program) -> Hashable:
    """The same for a program, also for that of a rank; None if something in it cannot be compared."""
    numbers: list[int] = []
    keys = {name: _graph_key(graph, numbers, _program_node) for name, graph, _ in all_graphs(program)}
    return None if None in keys.values() else tuple(keys.items())


def sizes_of(placeholder: fx.Node) -> tuple[int, ...]:
    """The sizes of what a body is given there, where they are known."""
    return placeholder.meta[SPEC].shape if SPEC in placeholder.meta else ()


def is_value(placeholder: fx.Node) -> bool:
    """Whether what a body is given there belongs to a call, and not to a layer or to the machine."""
    return SPEC in placeholder.meta and WEIGHT not in placeholder.meta


def map_numbers(value: Any, give: Callable[[Any], Any]) -> Any:
    """A nested argument with what `give` makes of each integer in it, symbolic ones too, in order."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return give(value)
    if isinstance(value, list):
        return [map_numbers(one, give) for one in value]
    if isinstance(value, tuple):
        return tuple(map_numbers(one, give) for one in value)
    if isinstance(value, dict):
        return {key: map_numbers(one, give) for key, one in value.items()}
    return value


def _flat(module: fx.GraphModule) -> fx.Graph | None:
    """The graph of a body with functions in the place of its modules; None if some are more than that."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        if node.op != "call_module":
            env[node] = copy_node(graph, node, env.__getitem__)
            continue
        called = module.get_submodule(str(node.target))
        if not isinstance(called, FixedCall):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = graph.call_function(called.function, args, {**kwargs, **called.fixed})
    return graph


def _graph_key(graph: fx.Graph, numbers: list[int], key: NodeKey | None = None) -> Hashable:
    order = {node: place for place, node in enumerate(graph.nodes)}
    key = key or _key
    try:
        return tuple(key(node, order, numbers) for node in graph.nodes)
    except TypeError:
        return None


def _program_node(node: fx.Node, order: Mapping[fx.Node, int], numbers: list[int]) -> Hashable:
    """As `_key`; of a communication all but sizes, which no code depends on here."""
    if not isinstance(node.target, Communicate):
        return _key(node, order, numbers)
    target = type(node.target), node.target.__name__, node.target.mesh_dims, node.target.group
    return target, _pattern((node.args, node.kwargs), order, numbers)


def _key(node: fx.Node, order: Mapping[fx.Node, int], numbers: list[int]) -> Hashable:
    """All of a node but its numbers; raises `TypeError` for what cannot be compared."""
    if node.op == "placeholder":
        spec = node.meta.get(SPEC)
        if isinstance(spec, tuple):
            raise TypeError(f"{node.name} is several values")
        numbers += sizes_of(node)
        return None if spec is None else (spec.dtype, len(spec.shape), is_value(node))
    if node.op == "call_function" and not isinstance(node.target, _FUNCTIONS):
        raise TypeError(f"{node.target} is known by identity only")
    if node.op == "get_attr" and not node.args and not node.kwargs:  # most nodes of a program
        return node.op, ((), ())
    return node.target if node.op == "call_function" else node.op, _pattern((node.args, node.kwargs), order, numbers)


def _pattern(value: Any, order: Mapping[fx.Node, int], numbers: list[int]) -> Hashable:
    if type(value) is int:
        numbers.append(value)
        return int
    if isinstance(value, fx.Node):
        return fx.Node, order[value]
    if isinstance(value, tuple | list):
        return tuple(_pattern(one, order, numbers) for one in value)
    if isinstance(value, dict):
        return tuple((key, _pattern(one, order, numbers)) for key, one in value.items())
    if not isinstance(value, _PLAIN):
        raise TypeError(f"{value!r} cannot be compared")
    return type(value), repr(value)
