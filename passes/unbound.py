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
    for (_, dim), places in taken.items():
        first = next(iter(places.values()))[0]
        given: Any = first.args[0]  # where that was selected too, it is a part by now
        size = given.meta[SPEC].shape[dim]
        if len(places) < max(FEWEST, size / 2):
            continue
        emitter = Emitter(graph, first)
        every = emitter.emit(aten.unbind.int, given, dim)
        parts = {place: emitter.emit(operator.getitem, every, place) for place in places}
        for place, group in places.items():
            parts[place].meta[SPEC] = group[0].meta[SPEC]
            for node in group:
                node.replace_all_uses_with(parts[place])
                graph.erase_node(node)
