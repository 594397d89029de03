"""Largest and smallest elements: without their places; and the one of a tensor, as scales are made of it, by rows."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments, operands, with_operands
from xdit_ir.ir.program import SPEC
from xdit_ir.passes.emit import Emitter
from xdit_ir.rules.reductions import is_extreme

aten = torch.ops.aten
AMONG: dict[Any, Any] = {aten.max: aten.amax.default, aten.min: aten.amin.default}


def extreme_without_place(graph: fx.Graph, node: fx.Node) -> bool:
    """Largest or smallest elements, of everything or of a dim, where nobody asks for their places: ranks then compare
    those of parts."""
    target = AMONG.get(getattr(node.target, "overloadpacket", None))
    given = bound_arguments(node) if target is not None else {}
    if target is None or "other" in given or not isinstance(given.get("dim", 0), int):
        return False
    taken = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if "dim" in given and len(taken) < len(node.users):
        return False
    dims = [given["dim"]] if "dim" in given else []
    new = Emitter(graph, node).emit(target, given["self"], dims, given.get("keepdim", False))
    for user in taken or [node]:
        user.replace_all_uses_with(new)
    return True


def extreme_of_rows(graph: fx.Graph, node: fx.Node) -> bool:
    """Take it of the extremes of all rows, whose features every rank has; or where it was taken already."""
    if not is_extreme(node):
        return False
    found = _by_rows(graph, node)
    same = next((one for one in _extremes_before(graph, found) if _computes_same(one, found)), found)
    if same is node:
        return False
    node.replace_all_uses_with(same)
    return True


def _by_rows(graph: fx.Graph, node: fx.Node) -> fx.Node:
    given: dict[str, Any] = bound_arguments(node)
    shape = given["self"].meta[SPEC].shape
    long = [dim for dim, size in enumerate(shape) if size > 1]
    if len(long) < 2:
        return node
    emitter = Emitter(graph, node)
    rows = emitter.emit(node.target, given["self"], [long[-1]], True)
    return emitter.emit(node.target, rows, given["dim"], given["keepdim"])


def _extremes_before(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    for one in graph.nodes:
        if one is node:
            return
        if is_extreme(one) and one.users:
            yield one


def _computes_same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two operators are the same down to the same values."""
    if one is other:
        return True
    if one.op != "call_function" or one.target is not other.target or one.meta[SPEC] != other.meta[SPEC]:
        return False
    left, right = operands(one), operands(other)
    if len(left) != len(right) or with_operands(one, right) != (other.args, other.kwargs):
        return False
    return all(map(_computes_same, left, right))
