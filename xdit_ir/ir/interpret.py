"""Run a program on one device, node by node: the reference meaning of the IR."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.named_tensors import constants_on, find_tensor
from xdit_ir.ir.program import CONSTANT, Program, call_parts, is_block_call
from xdit_ir.ir.stored import Filling, bytes_of, room_on

State = Callable[[str], torch.Tensor]
# Sees the name of the block call (empty: outer graph), a node of its body, and the value.
Observer = Callable[[str, fx.Node, Any], None]
Steps = Generator[Any, Any, Any]


def model_state(program: Program, model: nn.Module) -> State:
    """Look up parameters, buffers and constants by qualified name, by reference, at every call."""
    device = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)
    constants = constants_on(program, (f"{CONSTANT}.{name}" for name in program.constants), device)
    return lambda name: constants[name] if name in constants else find_tensor(model, name)


@dataclass(eq=False)
class GraphRun:
    """A run of a graph: the name of the block call (empty: outer graph), its prefix, arguments to come, and values."""

    site: str
    prefix: str
    feed: Iterator[Any]
    env: dict[fx.Node, Any] = field(default_factory=dict)


class Interpreter:
    """Runs a program's graphs with `state` as weights, on `device`; `observe` sees every value, of which those are let
    go of that nothing uses any more. Runs are generators, so that a subclass may stop where it must wait for others.
    """

    def __init__(self, program: Program, state: State, device: torch.device, observe: Observer | None = None) -> None:
        self.program, self.state, self.device, self.observe = program, state, device, observe
        self._used_last = functools.cache(used_last)

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs of the outer graph for its placeholders' values."""
        try:
            next(self.graph(self.program.graph, inputs))
        except StopIteration as stop:
            outputs: tuple[torch.Tensor, ...] = stop.value
            return outputs
        raise AssertionError("on one device nothing waits")

    def graph(self, graph: fx.Graph, inputs: Sequence[Any], prefix: str = "", site: str = "") -> Steps:
        """Run one graph; returns what it returns."""
        frame, used_last = GraphRun(site, prefix, iter(inputs)), self._used_last(graph)
        for node in graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], frame.env.__getitem__)
            frame.env[node] = yield from self.node(node, frame)
            if self.observe is not None:
                self.observe(site, node, frame.env[node])
            for done in used_last[node]:
                del frame.env[done]
        raise AssertionError("a graph ends with an output")

    def node(self, node: fx.Node, frame: GraphRun) -> Steps:
        """The value of one node."""
        if node.op == "placeholder":
            return next(frame.feed)
        if node.op == "get_attr":
            return self._state(str(node.target))
        if is_block_call(node):
            name, prefix, *_ = call_parts(node)
            given = [frame.env[value] for value in operands(node)]
            return (yield from self.graph(self.program.blocks[name].graph, given, prefix, node.name))
        args, kwargs = fx.map_arg((node.args, node.kwargs), frame.env.__getitem__)
        return (yield from self.operator(node, args, dict(kwargs), frame.prefix))

    def _state(self, name: str) -> torch.Tensor:
        stored = self.program.stored.get(name)
        if stored is None:
            return self.state(name)
        parts = Filling([stored], self.program.state, room_on(self.device))
        for member in parts.wanted:
            parts.fill(member, functools.partial(bytes_of(self.state(member)).narrow, 0))
        return parts.done()[stored]

    def operator(self, node: fx.Node, args: Any, kwargs: dict[str, Any], prefix: str) -> Steps:
        """The result of an operator; where it names the device of the trace it means the running one."""
        yield from ()
        if kwargs.get("device") == self.program.device:
            kwargs["device"] = self.device
        return args[0][args[1]] if node.target is operator.getitem else node.target(*args, **kwargs)  # type: ignore[operator]


def used_last(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What no node behind a node uses, among its operands and itself."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last |= dict.fromkeys((node, *node.all_input_nodes), node)
    result: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    for value, user in last.items():
        result[user].append(value)
    return result
