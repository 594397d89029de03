"""The graph that is being written, and where in the model: nodes with their types and origins."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from xdit_ir.capture.failures import Opaque
from xdit_ir.capture.operators import IDENTITY, aten
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import Frame, View, spec_of
from xdit_ir.errors import TraceError
from xdit_ir.ir.graphs import add_node
from xdit_ir.ir.program import CONSTANT, SPEC, WHERE, Where, qualified


class GraphWriter:
    """Appends nodes to the graph of `frame`; `path` are the modules that are running, the innermost last."""

    def __init__(self) -> None:
        self.frame = Frame("")
        self.path = [""]

    def where(self) -> Where:
        """The place in the model that is running."""
        return Where(self.path[-1], source_line())

    def opaque(self, text: str, *, selects: bool = False) -> Opaque:
        """An error that blames the module that is running."""
        return Opaque(text, qualified(self.frame.prefix, self.path[-1]).rstrip("."), selects=selects)

    def emit(self, op: str, target: Any, args: Any, kwargs: Any, spec: Any, where: Where, name: str = "") -> fx.Node:
        """Append a node with its metadata to the current graph."""
        node = add_node(self.frame.graph, op, target, args, kwargs, name)
        node.meta.clear()
        node.meta[SPEC] = spec
        node.meta[WHERE] = where
        return node

    def call(self, func: Any, args: Any, kwargs: Any, spec: Any) -> fx.Node:
        """Append an operator call whose arguments are nodes and literals."""
        kwargs = {key: item for key, item in kwargs.items() if not (key == "pin_memory" and not item)}
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise TraceError(
                f"{source_line()}: draws from a torch.Generator of its own; draw outside, and pass the noise"
            )
        name = func._schema.name.rpartition("::")[2].strip("_")
        return self.emit("call_function", func, args, kwargs, spec, self.where(), name)

    def item(self, node: fx.Node, index: int, spec: Any) -> fx.Node:
        """Append the selection of one result of a node."""
        return self.emit("call_function", operator.getitem, (node, index), {}, spec, self.where())

    def relative(self, names: list[str]) -> str | None:
        """One of an object's names, relative to the frame's prefix; constants have none."""
        prefix = f"{self.frame.prefix}." if self.frame.prefix else ""
        for name in names:
            if name.startswith((prefix, f"{CONSTANT}.")):
                return name if name.startswith(f"{CONSTANT}.") else name[len(prefix) :]
        return None

    def view_node(self, source: fx.Node, view: View) -> fx.Node:
        """Append what a view computes from its source's contents."""
        if view.func in IDENTITY:
            return source
        args = (source, *view.args[1:])
        if view.func is aten.reshape.default:
            args = (source, list(view.result.shape))
        if view.index is None:
            return self.call(view.func, args, view.kwargs, spec_of(view.result))
        return self.item(self.call(view.func, args, view.kwargs, view.pieces), view.index, spec_of(view.result))

    def replay(self, node: fx.Node, chain: tuple[View, ...]) -> fx.Node:
        """Append a chain of views of a base's contents."""
        for view in chain:
            node = self.view_node(node, view)
        return node
