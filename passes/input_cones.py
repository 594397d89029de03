"""Values that follow from a program's inputs alone, whatever its weights: as a graph that can be run on the inputs."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xdit_ir.capture.predicates import evaluate
from xdit_ir.ir.draws import is_pure
from xdit_ir.ir.graphs import arguments_of, copy_node, operands, placeholders, results_of
from xdit_ir.ir.guards import Predicate
from xdit_ir.ir.hoist import ancestors
from xdit_ir.ir.program import CONSTANT, SPEC, Program, call_parts, is_block_call
from xdit_ir.passes.emit import type_of

Flags = tuple[bool, ...]


class InputCones:
    """The graph of what has been asked for, with values of blocks as they are in one call; `add` computes more there.
    Of the inputs only those are used whose contents while the program was traced are known: `inputs`, by path."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, fx.Graph()
        guards = {one.path: one.value for one in program.signature.guards if isinstance(one.value, torch.Tensor)}
        self.inputs: Mapping[str, torch.Tensor] = {**program.contents, **guards}
        constants = {f"{CONSTANT}.{name}": value for name, value in program.constants.items()}
        self._constants = {name: value for name, value in constants.items() if not value.is_meta}
        leaves = (leaf.path for leaf in program.signature.leaves if leaf.spec is not None)
        self._paths = dict(zip(placeholders(program.graph), leaves, strict=False))
        self._given: dict[fx.Node, str] = {}
        self._made: dict[Hashable, fx.Node] = {}
        self._bodies: dict[tuple[str, Flags], set[fx.Node]] = {}
        self._free = set[fx.Node]()
        self._follow(program.graph, [path in self.inputs for path in self._paths.values()], self._free)

    def find(self, node: fx.Node, call: fx.Node | None = None) -> fx.Node | None:
        """The value of a node of the outer graph, or of the block that `call` calls; None where weights are behind it,
        or something that cannot be computed beside the program."""
        return self._value(node, call) if node in (self._free if call is None else self._free_in(call)) else None

    def add(self, target: Any, *args: Any) -> fx.Node:
        """What an operator makes of values of the graph."""
        new = self.graph.call_function(target, args)
        new.meta[SPEC] = type_of(new)
        return new

    def predicate(self, result: fx.Node, value: torch.Tensor, reason: str) -> Predicate:
        """That a value of the graph is `value`."""
        graph, copies, paths = fx.Graph(), dict[fx.Node, fx.Node](), []
        needed = ancestors([result])
        for node in self.graph.nodes:
            if node in needed:
                copies[node] = copy_node(graph, node, copies.__getitem__)
                paths += [self._given[node]] if node in self._given else []
        graph.output(copies[result])
        names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        constants = {name: value for name, value in self._constants.items() if name in names}
        return Predicate(graph, tuple(paths), constants, value, reason)

    def contents(self, result: fx.Node, inputs: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """A value of the graph for the inputs of the trace, or for others."""
        with torch.no_grad():
            return evaluate(self.predicate(result, torch.empty(0), ""), inputs or self.inputs).cpu()

    def _free_in(self, call: fx.Node) -> set[fx.Node]:
        name, _, values, _ = call_parts(call)
        flags = tuple(value in self._free for value in values)
        if (name, flags) not in self._bodies:
            self._bodies[name, flags] = set()
            self._follow(self.program.blocks[name].graph, flags, self._bodies[name, flags])
        return self._bodies[name, flags]

    def _follow(self, graph: fx.Graph, arguments: Sequence[bool], found: set[fx.Node]) -> None:
        """Adds what follows from those of the arguments that may be used."""
        found |= {node for node, free in zip(arguments_of(graph), arguments, strict=True) if free}
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) in self._constants:
                found.add(node)
            elif node.op == "call_function" and (result := self._result(node)) is not None:
                found |= {node} if result[1] in self._free_in(result[0]) else set()
            elif node.op == "call_function" and not is_block_call(node) and is_pure(node.target):
                found |= {node} if all(source in found for source in operands(node)) else set()

    def _result(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The block call of which a value is a result, and that result in the body."""
        if node.target is not operator.getitem or not is_block_call(call := operands(node)[0]):
            return None
        place: Any = node.args[1]
        return call, results_of(self.program.blocks[call_parts(call).block].graph)[place]

    def _value(self, node: fx.Node, call: fx.Node | None) -> fx.Node:
        key = self._key(node, call)
        if key not in self._made:
            self._made[key] = self._written(node, call)
        return self._made[key]

    def _key(self, node: fx.Node, call: fx.Node | None) -> Hashable:
        """Equal for calls that give a block the same of what a value of it follows from."""
        if call is None:
            return node
        arguments = arguments_of(self.program.blocks[call_parts(call).block].graph)
        needed = ancestors([node])
        given = zip(arguments, call_parts(call).values, strict=True)
        return node, tuple(self._value(value, None) for argument, value in given if argument in needed)

    def _written(self, node: fx.Node, call: fx.Node | None) -> fx.Node:
        if node.op == "placeholder" and call is not None:
            body = self.program.blocks[call_parts(call).block].graph
            return self._value(call_parts(call).values[arguments_of(body).index(node)], None)
        if (found := self._result(node)) is not None:
            return self._value(found[1], found[0])
        new = copy_node(self.graph, node, lambda source: self._value(source, call))
        if node.op == "placeholder":
            self._given[new] = self._paths[node]
        return new
