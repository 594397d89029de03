"""When two programs are the same, and where they differ first.

Equal are: names of values, their operators, arguments, types, layouts, origins and order; blocks by name; weights,
constants (bit by bit), signature, mesh and token streams. Inputs, and references to parameters, may stand anywhere
before their users. Lists and tuples differ, since some operators' arguments must be hashable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.program import LAYOUT, SCOPE, SPEC, STAGE, WEIGHT, WHERE, Program, Where, is_weight
from xdit_ir.sharding.layout_graph import FALLBACK
from xdit_ir.text.attachments import digest

# The graphs are compared last, since what surrounds them says more about why they differ.
SURROUNDINGS = tuple(item.name for item in dataclasses.fields(Program) if item.name not in ("graph", "blocks"))
USUAL = {WHERE: Where(), FALLBACK: ""}


def difference(one: Program, other: Program) -> str | None:
    """Where two programs differ first, in words; None if they are the same."""
    return next(_differences(one, other), None)


def equal(one: Program, other: Program) -> bool:
    """Whether two programs are the same."""
    return difference(one, other) is None


def _differences(one: Program, other: Program) -> Iterator[str]:
    for name in SURROUNDINGS:
        left, right = _plain(getattr(one, name)), _plain(getattr(other, name))
        if left != right:
            yield f"{name}: {left!r} and {right!r}"
    if list(one.blocks) != list(other.blocks):
        yield f"blocks: {list(one.blocks)} and {list(other.blocks)}"
        return
    yield from _graphs("the outer graph", one.graph, other.graph)
    for name, block in one.blocks.items():
        yield from _graphs(f"block {name}", block.graph, other.blocks[name].graph)


def _graphs(place: str, one: fx.Graph, other: fx.Graph) -> Iterator[str]:
    left, right = _rows(one), _rows(other)
    for a, b in zip(left, right, strict=False):
        if a != b:
            yield f"{place}: {a} and {b}"
    if len(left) != len(right):
        yield f"{place}: {len(left)} and {len(right)} nodes"
    references = [{n.name: _reference(n) for n in g.nodes if is_weight(n)} for g in (one, other)]
    if references[0] != references[1]:
        yield f"{place}: references {references[0]} and {references[1]}"


def _rows(graph: fx.Graph) -> list[Any]:
    rows = [_row(node) for node in graph.nodes if not is_weight(node)]
    return sorted(rows, key=lambda row: row[0] != "placeholder")


def _row(node: fx.Node) -> Any:
    about = {key: node.meta.get(key, USUAL.get(key)) for key in (SPEC, LAYOUT, WHERE, STAGE, SCOPE, FALLBACK)}
    if node.op == "output":
        del about[SPEC], about[LAYOUT]
    target = None if node.op == "placeholder" else node.target
    return node.op, node.name if node.op != "output" else "", target, _plain(node.args), _plain(node.kwargs), about


def _reference(node: fx.Node) -> Any:
    return node.meta.get(WEIGHT, node.target), *(node.meta.get(key) for key in (SPEC, LAYOUT, STAGE, SCOPE))


def _plain(value: Any) -> Any:
    """A value that compares by contents."""
    if isinstance(value, fx.Node):
        return ("node", value.name)
    if isinstance(value, fx.Graph):
        return _rows(value)
    if isinstance(value, torch.Tensor):
        return ("tensor", digest(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return ["list", *map(_plain, value)]
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(_plain(getattr(value, item.name)) for item in dataclasses.fields(value)))
    return (type(value), repr(value)) if isinstance(value, (bool, int, float, complex)) else value  # nan is nan
