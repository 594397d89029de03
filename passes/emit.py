"""Adds operators to a graph where another one stands, with types and origin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, TensorSpec
from xdit_ir.passes.views import PERMUTES, VIEWS, order_of

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Emitter:
    """Adds operators before `node`; what is not said about their results is as of that one.

    Before layouts are known, `layout` is left out; `permute` knows that of its result if it knows that of its operand.
    """

    graph: fx.Graph
    node: fx.Node

    def emit(
        self,
        target: Any,
        args: tuple[Any, ...],
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
        layout: Layout | None = None,
    ) -> fx.Node:
        """One operator."""
        with self.graph.inserting_before(self.node):
            new = self.graph.create_node("call_function", target, args, kwargs, name=name)
        new.meta = {SPEC: TensorSpec(tuple(shape), dtype or self.node.meta[SPEC].dtype)}
        if WHERE in self.node.meta:
            new.meta[WHERE] = self.node.meta[WHERE]
        if layout is not None:
            new.meta[LAYOUT] = layout
        return new

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A view, unless it has that shape already; a view of a view is one."""
        while x.op == "call_function" and x.target in VIEWS and isinstance(x.args[0], fx.Node):
            x = x.args[0]
        spec = x.meta[SPEC]
        if spec.shape == tuple(shape):
            return x
        return self.emit(aten.reshape.default, (x, list(shape)), shape, dtype=spec.dtype)

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """Dims in another order; a permute of a permute is one."""
        if x.op == "call_function" and x.target in PERMUTES:
            before, source = order_of(x, len(order)), x.args[0]
            assert isinstance(source, fx.Node)
            return self.permute(source, [before[d] for d in order])
        if list(order) == list(range(len(order))):
            return x
        spec, layout = x.meta[SPEC], x.meta.get(LAYOUT)
        return self.emit(
            aten.permute.default,
            (x, list(order)),
            [spec.shape[d] for d in order],
            dtype=spec.dtype,
            layout=None if layout is None else layout.permuted(order),
        )

    def expand(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Broadcast dims of length 1."""
        spec = x.meta[SPEC]
        if spec.shape == tuple(shape):
            return x
        return self.emit(aten.expand.default, (x, list(shape)), shape, dtype=spec.dtype)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Another dtype."""
        spec = x.meta[SPEC]
        if spec.dtype == dtype:
            return x
        return self.emit(aten._to_copy.default, (x,), spec.shape, dtype=dtype, kwargs={"dtype": dtype})

    def plus(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """The sum of two values that broadcast."""
        left, right = a.meta[SPEC], b.meta[SPEC]
        sizes = itertools.zip_longest(reversed(left.shape), reversed(right.shape), fillvalue=1)
        shape = [m if n == 1 else n for n, m in sizes][::-1]
        return self.emit(aten.add.Tensor, (a, b), shape, dtype=torch.promote_types(left.dtype, right.dtype))
