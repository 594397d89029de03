"""Run a program on one device, node by node: the reference meaning of the IR."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import CONSTANT, Program, is_block_call

State = Callable[[str], torch.Tensor]
# Sees the name of the block call (empty: outer graph), a node of its body, and the value.
Observer = Callable[[str, fx.Node, Any], None]


def model_state(program: Program, model: nn.Module) -> State:
    """Look up parameters, buffers and constants by qualified name, by reference, at every call."""
    device = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)
    constants = {f"{CONSTANT}.{name}": constant_on(program, name, device) for name in program.constants}

    def lookup(name: str) -> torch.Tensor:
        if name in constants:
            return constants[name]
        found: Any = model
        try:
            for part in name.split("."):
                found = getattr(found, part) if isinstance(found, nn.Module) else _entry(found, part)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise MismatchError(f"the model has no parameter or buffer {name!r} that its program uses") from error
        tensor: torch.Tensor = found
        return tensor

    return lookup


def constant_on(program: Program, name: str, device: torch.device | None) -> torch.Tensor:
    """A constant follows the model: what was on the device of the trace (or stood in for meta) is on `device`."""
    value = program.constants[name]
    return value.to(device=device) if program.device.type == "meta" or value.device == program.device else value


def _entry(container: Any, part: str) -> Any:
    """An entry of a list, tuple or dict that a module holds."""
    return container[int(part)] if isinstance(container, (list, tuple)) else container[part]


class Interpreter:
    """Runs a program's graphs with `state` as weights, on `device`; `observe` sees every value."""

    def __init__(self, program: Program, state: State, device: torch.device, observe: Observer | None = None) -> None:
        self.program, self.state, self.device, self.observe = program, state, device, observe

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs of the outer graph for its placeholders' values."""
        outputs: tuple[torch.Tensor, ...] = self._graph(self.program.graph, inputs, "", "")
        return outputs

    def _graph(self, graph: fx.Graph, inputs: Sequence[Any], prefix: str, site: str) -> Any:
        env: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        for node in graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            env[node] = self._node(node, env, feed, prefix)
            if self.observe is not None:
                self.observe(site, node, env[node])
        raise AssertionError("a graph ends with an output")

    def _node(self, node: fx.Node, env: Mapping[fx.Node, Any], feed: Any, prefix: str) -> Any:
        if node.op == "placeholder":
            return next(feed)
        if node.op == "get_attr":
            return self.state(str(node.target))
        args: Any = fx.map_arg(node.args, env.__getitem__)
        if is_block_call(node):
            name, call_prefix, values, weights = args
            return self._graph(self.program.blocks[name].graph, [*values, *weights.values()], call_prefix, node.name)
        kwargs = dict(fx.map_arg(node.kwargs, env.__getitem__))
        return execute(self.program, node, args, kwargs, self.device)


def execute(program: Program, node: fx.Node, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """Run one operator; where it names the device of the trace it means the running one."""
    if kwargs.get("device") == program.device:
        kwargs = {**kwargs, "device": device}
    return args[0][args[1]] if node.target is operator.getitem else node.target(*args, **kwargs)  # type: ignore[operator]
