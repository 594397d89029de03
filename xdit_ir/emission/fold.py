"""What a rank computes from constants alone, on another device than its own, is computed before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import arguments_of, copy_graph, operands, remove_dead
from xdit_ir.ir.program import CONSTANT, SPEC, WEIGHT, Program, call_parts, called_block, is_block_call


def fold_constants(program: Program) -> Program:
    """The program in which such values are constants, in blocks too: tables that its model makes, or keeps, on the CPU
    and moves to the GPU at every call."""
    fold = _Fold(program)
    graph = fold.graph(program.graph)
    calls = [node for node in graph.nodes if is_block_call(node)]
    blocks = {}
    for name, block in program.blocks.items():
        body = fold.given(block.graph, [call for call in calls if called_block(call) == name])
        blocks[name] = replace(block, graph=fold.graph(body))
    if not fold.made:
        return program
    if graph is not program.graph:
        remove_dead(graph)
    return program.replace(graph=graph, blocks=blocks, constants={**program.constants, **fold.made})


class _Fold:
    """`made` are new constants, by name."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made: dict[str, torch.Tensor] = {}

    def given(self, source: fx.Graph, calls: Sequence[fx.Node]) -> fx.Graph:
        """A copy of a body that names the new constants which all its calls give it; the calls no longer do."""
        parts = [call_parts(call) for call in calls]
        shared = {
            place: values[0]
            for place, values in enumerate(zip(*(one.values for one in parts), strict=True))
            if len(set(values)) == 1 and str(values[0].target).removeprefix(f"{CONSTANT}.") in self.made
        }
        if not shared:
            return source
        body = copy_graph(source)
        for place, placeholder in enumerate(arguments_of(body)):
            if place in shared:
                _name_constant(body, placeholder, str(shared[place].target))
                body.erase_node(placeholder)
        for call, (block, prefix, values, weights) in zip(calls, parts, strict=True):
            kept = [value for place, value in enumerate(values) if place not in shared]
            call.args = (block, prefix, kept, weights)
        return body

    def graph(self, source: fx.Graph) -> fx.Graph:
        """A copy of a graph with what can be folded as constants; itself, if nothing can be."""
        values = self._values(source)
        if not values:
            return source
        graph = copy_graph(source)
        for old, new in zip(source.nodes, list(graph.nodes), strict=True):
            value = values.get(old)
            if isinstance(value, torch.Tensor) and any(user not in values for user in old.users):
                name = self._name(new)
                self.made[name] = value
                _name_constant(graph, new, f"{CONSTANT}.{name}")
        remove_dead(graph)
        return graph

    def _values(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """Of every operator that can be folded."""
        known: dict[fx.Node, Any] = {}
        elsewhere: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(f"{CONSTANT}."):
                name = str(node.target).removeprefix(f"{CONSTANT}.")
                known[node] = self.made[name] if name in self.made else self.program.constants[name]
            elif self._can_fold(node, known, elsewhere):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
            if isinstance(known.get(node), torch.Tensor) and known[node].device != self.program.device:
                elsewhere.add(node)
        return {node: value for node, value in known.items() if node.op != "get_attr"}

    def _can_fold(self, node: fx.Node, known: Mapping[fx.Node, Any], elsewhere: set[fx.Node]) -> bool:
        """Whether an operator works on known values, and takes or makes some on another device."""
        if not _is_pure(node) or not all(source in known for source in operands(node)):
            return False
        device = None if (given := node.kwargs.get("device")) is None else torch.device(str(given))
        if device is not None and device.type == "meta":  # the running device, which is not known here
            return False
        made = device is not None and device.type != self.program.device.type
        return made or any(source in elsewhere for source in operands(node))

    def _name(self, node: fx.Node) -> str:
        taken = {**self.program.constants, **self.made}
        names = (f"{node.name}_folded{count or ''}" for count in range(len(taken) + 1))
        return next(name for name in names if name not in taken)


def _name_constant(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Let a constant stand for a node."""
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        constant = graph.get_attr(name)
    constant.meta = {key: value for key, value in node.meta.items() if key != WEIGHT}
    node.replace_all_uses_with(constant)


def _is_pure(node: fx.Node) -> bool:
    """Whether an operator on tensors gives the same whenever it is called, and a tensor."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return not is_random(target) and not isinstance(node.meta[SPEC], tuple)
