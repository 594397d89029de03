"""`select-on-device`: selections by masks without asking the device how many they select."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, map_graphs
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten


@dataclass(frozen=True)
class SelectOnDevice:
    """`x[mask]` makes the host wait, although a program knows how many it gives: it takes the first so many places of
    a stable sort instead. `x[mask] = y` becomes a `where`, if all places get the same, or a `masked_scatter`.
    """

    name: ClassVar[str] = "select-on-device"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    def apply(self, program: Program) -> Program:
        """The program with such selections as operators that the device does alone."""
        return map_graphs(program, _rewrite)


def _rewrite(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        found = None
        if node.target in (aten.index.Tensor, aten.index_put.default):
            found = _ByMask.of(graph, node)
        if found is not None:
            node.replace_all_uses_with(found.read() if node.target is aten.index.Tensor else found.written())
            graph.erase_node(node)


@dataclass(frozen=True)
class _ByMask:
    """A selection from `x` by a `mask` of some neighbouring dims of it, the first of which is `dim`."""

    node: fx.Node
    emitter: Emitter
    x: fx.Node
    mask: fx.Node
    dim: int

    @staticmethod
    def of(graph: fx.Graph, node: fx.Node) -> _ByMask | None:
        """That of an operator; None if it selects by anything else."""
        given = bound_arguments(node)
        x, indices = given["self"], list(given["indices"])
        places = [place for place, index in enumerate(indices) if index is not None]
        if len(places) != 1 or given.get("accumulate"):
            return None
        mask = indices[places[0]]
        return _ByMask(node, Emitter(graph, node), x, mask, places[0]) if mask.meta[SPEC].dtype is torch.bool else None

    def read(self) -> fx.Node:
        """`x[mask]`."""
        emitter, shape, inner = self.emitter, list(self.x.meta[SPEC].shape), self.mask.meta[SPEC].shape
        count = self.node.meta[SPEC].shape[self.dim]
        flat = emitter.reshape(self.mask, [math.prod(inner)])
        unselected = emitter.emit(aten.logical_not.default, flat)
        order = emitter.emit(aten.argsort.stable, unselected, stable=True, dim=0)
        first = emitter.emit(aten.slice.Tensor, order, 0, 0, count)
        rows = emitter.reshape(self.x, [*shape[: self.dim], math.prod(inner), *shape[self.dim + len(inner) :]])
        return emitter.emit(aten.index_select.default, rows, self.dim, first)

    def written(self) -> fx.Node:
        """`x` with `x[mask] = y`."""
        emitter, shape, value = self.emitter, list(self.x.meta[SPEC].shape), self._value()
        before, inner, behind = (
            self.dim,
            self.mask.meta[SPEC].shape,
            len(shape) - self.dim - len(self.mask.meta[SPEC].shape),
        )
        wide = emitter.expand(emitter.reshape(self.mask, [1] * before + list(inner) + [1] * behind), shape)
        given = list(value.meta[SPEC].shape)
        rows = given[-1 - behind] if len(given) > behind else 1
        if rows == 1:
            leading = given[: -1 - behind] if len(given) > behind else []
            return emitter.emit(
                aten.where.self, wide, emitter.reshape(value, self._apart(leading, given, behind)), self.x
            )
        filled = emitter.expand(value, [*shape[:before], rows, *shape[len(shape) - behind :]])
        return emitter.emit(aten.masked_scatter.default, self.x, wide, emitter.emit(aten.clone.default, filled))

    def _apart(self, leading: list[int], given: list[int], behind: int) -> list[int]:
        """The shape of a value that all places get, with a dim of length 1 for each dim of the mask."""
        return [*leading, *[1] * len(self.mask.meta[SPEC].shape), *(given[len(given) - behind :] if behind else [])]

    def _value(self) -> fx.Node:
        value: Any = bound_arguments(self.node)["values"]
        assert isinstance(value, fx.Node)
        return value
