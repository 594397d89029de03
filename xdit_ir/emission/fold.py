"""What a rank computes from constants alone, on another device than its own, is computed before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.collective_ops import Communicate
from xdit_ir.ir.draws import is_pure
from xdit_ir.ir.graphs import arguments_of, copy_graph, operands, remove_dead
from xdit_ir.ir.program import CONSTANT, WEIGHT, Program, call_parts, called_block, is_block_call

_MOVE = torch.ops.aten._to_copy.default


def fold_constants(program: Program) -> Program:
    """The program in which such values are constants, in blocks too: tables that its model makes, or keeps, on the CPU
    and moves to the GPU at every call."""
    fold = _Fold(program)
    graph = fold.graph(program.graph)
    calls = [node for node in graph.nodes if is_block_call(node)]
    if graph is program.graph and any(map(fold.is_table, (x for call in calls for x in call_parts(call).values))):
        graph = copy_graph(graph)
        calls = [node for node in graph.nodes if is_block_call(node)]
    blocks = {}
    for name, block in program.blocks.items():
        body = fold.given(block.graph, [call for call in calls if called_block(call) == name])
        blocks[name] = replace(block, graph=fold.graph(body))
    if not fold.made and all(block.graph is program.blocks[name].graph for name, block in blocks.items()):
        return program
    if graph is not program.graph:
        remove_dead(graph, _meets)
    return program.replace(graph=graph, blocks=blocks, constants={**program.constants, **fold.made})


def _meets(node: fx.Node) -> bool:
    """Whether ranks may meet there: it stays where this one needs nothing of it."""
    return isinstance(node.target, Communicate) or is_block_call(node)


class _Fold:
    """`made` are new constants, by name; some are tables on another device, by that device and the name of each."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made: dict[str, torch.Tensor] = {}
        self._copies: dict[tuple[str, torch.device], str] = {}

    def given(self, source: fx.Graph, calls: Sequence[fx.Node]) -> fx.Graph:
        """A copy of a body that names the tables which all its calls give it; the calls no longer do. Where each gives
        another one, for the body to move it, they give it moved."""
        parts = [call_parts(call) for call in calls]
        tables = {
            place: values
            for place, values in enumerate(zip(*(one.values for one in parts), strict=True))
            if all(self.is_table(value) for value in values)
        }
        if not tables:
            return source
        body = copy_graph(source)
        inside = dict(enumerate(arguments_of(body)))
        shared = {place for place, values in tables.items() if len({str(value.target) for value in values}) == 1}
        for place in shared:
            _name_constant(body, inside[place], str(tables[place][0].target))
            body.erase_node(inside[place])
        moved = {place: device for place in {*tables} - shared if (device := _moved_to(inside[place])) is not None}
        for call, (block, prefix, values, weights) in zip(calls, parts, strict=True):
            given = [self._moved(call, x, moved[place]) if place in moved else x for place, x in enumerate(values)]
            call.args = (block, prefix, [x for place, x in enumerate(given) if place not in shared], weights)
        return body if shared else source

    def is_table(self, node: fx.Node) -> bool:
        """Whether a constant that lies on another device stands for a value."""
        return _is_constant(node) and self._held(node).device != self.program.device

    def _held(self, node: fx.Node) -> torch.Tensor:
        name = str(node.target).removeprefix(f"{CONSTANT}.")
        return self.made[name] if name in self.made else self.program.constants[name]

    def _moved(self, call: fx.Node, table: fx.Node, device: torch.device) -> fx.Node:
        """The table on a device, before a call."""
        key = str(table.target), device
        if key not in self._copies:
            self._copies[key] = self._name(f"{key[0].removeprefix(f'{CONSTANT}.')}_moved")
            self.made[self._copies[key]] = self._held(table).to(device)
        with call.graph.inserting_before(call):
            constant = call.graph.get_attr(f"{CONSTANT}.{self._copies[key]}")
        constant.meta = dict(table.meta)
        return constant

    def graph(self, source: fx.Graph) -> fx.Graph:
        """A copy of a graph with what can be folded as constants; itself, if nothing can be."""
        values = self._values(source)
        if not values:
            return source
        graph = copy_graph(source)
        for old, new in zip(source.nodes, list(graph.nodes), strict=True):
            value = values.get(old)
            if isinstance(value, torch.Tensor) and any(user not in values for user in old.users):
                name = self._name(f"{new.name}_folded")
                self.made[name] = value
                _name_constant(graph, new, f"{CONSTANT}.{name}")
        remove_dead(graph, _meets)
        return graph

    def _values(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """Of every operator that can be folded."""
        known: dict[fx.Node, Any] = {}
        elsewhere: set[fx.Node] = set()
        for node in graph.nodes:
            if _is_constant(node):
                known[node] = self._held(node)
            elif self._can_fold(node, known, elsewhere):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
            made = known.get(node)
            tensors = (one for one in (made if isinstance(made, (tuple, list)) else [made]) if one is not None)
            if any(one.device != self.program.device for one in tensors):
                elsewhere.add(node)
        return {node: value for node, value in known.items() if node.op != "get_attr"}

    def _can_fold(self, node: fx.Node, known: Mapping[fx.Node, Any], elsewhere: set[fx.Node]) -> bool:
        """Whether an operator works on known values, and takes or makes some on another device."""
        known_all = node.op == "call_function" and all(source in known for source in operands(node))
        if not known_all or not is_pure(node.target):
            return False
        device = None if (given := node.kwargs.get("device")) is None else torch.device(str(given))
        if device is not None and device.type == "meta":  # the running device, which is not known here
            return False
        made = device is not None and device.type != self.program.device.type
        return made or any(source in elsewhere for source in operands(node))

    def _name(self, wanted: str) -> str:
        """This, or with a number, where there is no such constant yet."""
        taken = {**self.program.constants, **self.made}
        names = (f"{wanted}{count or ''}" for count in range(len(taken) + 1))
        return next(name for name in names if name not in taken)


def _name_constant(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Let a constant stand for a node."""
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        constant = graph.get_attr(name)
    constant.meta = {key: value for key, value in node.meta.items() if key != WEIGHT}
    node.replace_all_uses_with(constant)


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(f"{CONSTANT}.")


def _moved_to(argument: fx.Node) -> torch.device | None:
    """Where a body moves one of its arguments, if it does nothing else with it."""
    targets = {str(user.kwargs.get("device")) if user.target is _MOVE else "None" for user in argument.users}
    return torch.device(targets.pop()) if len(targets) == 1 and not targets & {"None", "meta"} else None
