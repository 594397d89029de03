"""What a rank computes from constants alone, on another device than its own, is computed before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import copy_graph, operands, remove_dead
from xdit_ir.ir.program import CONSTANT, SPEC, Program


def fold_constants(program: Program) -> Program:
    """The program in which such values are constants: tables that its model makes, or keeps, on the CPU and moves to
    the GPU at every call."""
    fold = _Fold(program)
    graph = fold.graph(program.graph)
    blocks = {name: replace(block, graph=fold.graph(block.graph)) for name, block in program.blocks.items()}
    if not fold.made:
        return program
    return program.replace(graph=graph, blocks=blocks, constants={**program.constants, **fold.made})


class _Fold:
    """`made` are new constants, by name."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made: dict[str, torch.Tensor] = {}

    def graph(self, source: fx.Graph) -> fx.Graph:
        """A copy of a graph with what can be folded as constants; the graph itself where there is nothing."""
        values = self._values(source)
        if not values:
            return source
        graph = copy_graph(source)
        for old, new in zip(source.nodes, list(graph.nodes), strict=True):
            value = values.get(old)
            if isinstance(value, torch.Tensor) and any(user not in values for user in old.users):
                name = self._name(new)
                self.made[name] = value
                with graph.inserting_before(new):
                    constant = graph.get_attr(f"{CONSTANT}.{name}")
                constant.meta = dict(new.meta)
                new.replace_all_uses_with(constant)
        remove_dead(graph)
        return graph

    def _values(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """Of every operator that can be folded."""
        known: dict[fx.Node, Any] = {}
        elsewhere: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(f"{CONSTANT}."):
                known[node] = self.program.constants[str(node.target).removeprefix(f"{CONSTANT}.")]
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
        device = node.kwargs.get("device")
        made = device is not None and torch.device(str(device)).type != self.program.device.type
        return made or any(source in elsewhere for source in operands(node))

    def _name(self, node: fx.Node) -> str:
        taken = {**self.program.constants, **self.made}
        names = (f"{node.name}_folded{count or ''}" for count in range(len(taken) + 1))
        return next(name for name in names if name not in taken)


def _is_pure(node: fx.Node) -> bool:
    """Whether an operator on tensors gives the same whenever it is called, and a tensor."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not isinstance(node.meta[SPEC], tuple)
