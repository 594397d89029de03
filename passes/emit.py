"""Adds operators to a graph where another one stands, with types, layouts and origin."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands, write_relayout
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, STAGE, WHERE, TensorSpec
from xdit_ir.ir.relayout import kind
from xdit_ir.passes.views import PERMUTES, VIEWS, order_of
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall, Outputs

aten = torch.ops.aten


@dataclass(frozen=True)
class Emitter:
    """Adds operators that have the origin of `node`, before that, or before another node.

    Their types are what the operators give, their layouts what the rules infer on `mesh`, that of a divided program.
    """

    graph: fx.Graph
    node: fx.Node
    mesh: Mesh | None = None
    before: fx.Node | None = None

    def emit(
        self, target: Any, *args: Any, name: str | None = None, spec: TensorSpec | None = None, **kwargs: Any
    ) -> fx.Node:
        """One operator, called with these arguments; `spec`: its type, where finding that out takes long.

        Raises:
            VerifyError: it cannot take an operand in the layout that this has.
        """
        with self._here():
            new = self.graph.create_node("call_function", target, args, kwargs, name=name)
        new.meta = {SPEC: spec or type_of(new)}
        new.meta |= {key: self.node.meta[key] for key in (WHERE, STAGE) if key in self.node.meta}
        if self.mesh is not None:
            new.meta[LAYOUT] = layout_of(new, self.mesh)
        return new

    def relayout(self, x: fx.Node, wanted: Layout, name: str | None = None) -> fx.Node:
        """The value in another layout, sums that are pending added up first; as it is where it has that one."""
        assert self.mesh is not None
        have: Layout = x.meta[LAYOUT]
        with self._here():
            if have.partial and not wanted.partial:
                x = write_relayout(self.graph, x, ops.all_reduce, have.summed())
            if x.meta[LAYOUT] == wanted:
                return x
            change = kind(self.mesh, x.meta[LAYOUT], wanted)[0]
            return write_relayout(self.graph, x, ops.RELAYOUTS[change], wanted, name)

    def _here(self) -> Any:
        return self.graph.inserting_before(self.before or self.node)

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A view, unless it has that shape already; a view of a view is one, but for how these are divided."""
        while self.mesh is None and x.op == "call_function" and x.target in VIEWS and isinstance(x.args[0], fx.Node):
            x = x.args[0]
        return x if x.meta[SPEC].shape == tuple(shape) else self.emit(aten.reshape.default, x, list(shape))

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """Dims in another order; a permute of a permute is one."""
        if x.op == "call_function" and x.target in PERMUTES:
            before, source = order_of(x, len(order)), x.args[0]
            assert isinstance(source, fx.Node)
            return self.permute(source, [before[d] for d in order])
        return x if list(order) == list(range(len(order))) else self.emit(aten.permute.default, x, list(order))

    def expand(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Broadcast dims of length 1."""
        return x if x.meta[SPEC].shape == tuple(shape) else self.emit(aten.expand.default, x, list(shape))

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Another dtype."""
        return x if x.meta[SPEC].dtype == dtype else self.emit(aten._to_copy.default, x, dtype=dtype)


def type_of(node: fx.Node) -> Any:
    types: Any = fx.map_arg((node.args, node.kwargs), lambda source: source.meta[SPEC])
    args, kwargs = types
    try:
        return _result_type(node.target, *args, **kwargs)
    except TypeError:  # an argument that cannot be a key
        return _result_type.__wrapped__(node.target, *args, **kwargs)


@lru_cache(maxsize=4096, typed=True)
def _result_type(target: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operator gives for operands of these types, found by running it on tensors without data."""

    def empty(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return type(value)(map(empty, value)) if isinstance(value, (list, tuple)) else value

    result = target(*map(empty, args), **{name: empty(value) for name, value in kwargs.items()})
    if isinstance(result, torch.Tensor):
        return TensorSpec(tuple(result.shape), result.dtype)
    return tuple(TensorSpec(tuple(one.shape), one.dtype) for one in result)


def layout_of(node: fx.Node, mesh: Mesh) -> Outputs:
    """What the rules infer for a node from the layouts of its operands; arguments and weights are whole.

    Raises:
        VerifyError: its operator cannot take an operand in the layout that this has.
    """
    sources = operands(node)
    if node.op != "call_function":
        return Layout.whole(len(node.meta[SPEC].shape))
    if node.target is operator.getitem:
        one: Layout = sources[0].meta[LAYOUT][node.args[1]]
        return one
    have = tuple(source.meta[LAYOUT] for source in sources)
    ruling = infer(OpCall(node, mesh, have))
    for source, layout, need in zip(sources, have, ruling.inputs, strict=True):
        if layout != need:
            raise VerifyError(f"{node.target} cannot take {source.name} in the layout that it has; change that first")
    return ruling.outputs
