"""Loops that take the rows of a value one by one take it apart once, so that ranks bring its parts together once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.program import SPEC
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten
FEWEST = 8  # rows; fewer are brought from where they are, one by one


def unbind_selected(graph: fx.Graph) -> None:
    """Where most places of a dim are selected, each for itself, `unbind` gives them."""
    taken: dict[tuple[fx.Node, int], dict[int, list[fx.Node]]] = {}
    for node in graph.nodes:
        if node.target is aten.select.int:
            args: Any = node.args
            source, dim, place = args
            shape = source.meta[SPEC].shape
            taken.setdefault((source, dim % len(shape)), {}).setdefault(place % shape[dim], []).append(node)
    for (source, dim), places in taken.items():
        size = source.meta[SPEC].shape[dim]
        if len(places) < max(FEWEST, size / 2):
            continue
        first = next(node for node in graph.nodes if node.target is aten.select.int and node.args[0] is source)
        emitter = Emitter(graph, first)
        every = emitter.emit(aten.unbind.int, source, dim)
        for place, nodes in places.items():
            part = emitter.emit(operator.getitem, every, place)
            part.meta[SPEC] = nodes[0].meta[SPEC]
            for node in nodes:
                node.replace_all_uses_with(part)
                graph.erase_node(node)
