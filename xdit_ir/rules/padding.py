"""Padding and cropping: ranks with the first or the last element of a dim have what is added next to it, too; of a dim
that is padded around, they fetch what is at its other end, and add nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments, operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import SPEC
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, rules_of, same_call, verified
from xdit_ir.rules.intervals import Interval, interval
from xdit_ir.rules.labels import handle_empty_parts

aten = torch.ops.aten
EDGES = {
    getattr(aten, f"{kind}_pad{n}d"): mode
    for kind, mode in (("reflection", "reflect"), ("replication", "replicate"))
    for n in (1, 2, 3)
}


def _name(call: OpCall) -> str:
    """Of the argument that says by how much."""
    return "pad" if "pad" in call.arguments else "padding"


def _amounts(call: OpCall) -> dict[int, tuple[int, int]]:
    """What is added before and after each dim that is padded at all."""
    flat = list(call.arguments[_name(call)])
    pairs = zip(flat[::2], flat[1::2], strict=True)
    ndim = len(call.out.shape)
    return {ndim - 1 - i: (before, after) for i, (before, after) in enumerate(pairs) if before or after}


def _mode(call: OpCall) -> str:
    """What is added: a constant, copies of the edge, mirrored elements, or those of the other end."""
    packet = getattr(call.node.target, "overloadpacket", None)
    return EDGES.get(packet) or str(call.arguments.get("mode", "constant"))


def _reach(mode: str, amount: int) -> int:
    """How many elements at the edge a rank must have to pad by this much."""
    return {"constant": 1, "replicate": 1, "reflect": amount + 1}[mode]


def _local_amounts(part: Indices, size: int, amounts: tuple[int, int], mode: str) -> tuple[int, int] | None:
    """What a rank adds to (negative: drops from) its part at either end; None where that is not what all add."""
    found = []
    for amount, order, edge in zip(amounts, (1, -1), (0, size - 1), strict=True):
        own = part.array[::order]
        if amount < 0:
            dropped = abs(own - edge) < -amount
            count = int(dropped.sum())
            if not dropped[:count].all():
                return None
            found.append(-count)
            continue
        nearest = edge + order * np.arange(_reach(mode, amount))
        at_end = own.size >= nearest.size and bool((own[: nearest.size] == nearest).all())
        if amount and edge in own and not at_end:
            return None
        found.append(amount if amount and at_end else 0)
    return found[0], found[1]


def _around(size: int, amounts: tuple[int, int], result: Interval) -> Indices | None:
    """What a rank needs to make one run of a dim that is padded around; None: some of it twice."""
    first, stop = (edge - amounts[0] for edge in result)
    pieces = ((max(first, low), min(stop, low + size), low) for low in (-size, 0, size))
    runs = Indices.of_runs((begin - low, end - begin) for begin, end, low in pieces)
    return runs if stop - first <= size else None


def _made_around(size: int, amounts: tuple[int, int], part: Indices) -> Interval | None:
    """The run of the result that a rank makes of its part, with what it may have of the other end; all that is added
    at an end that it has. None: the part is no such run."""
    before, after = amounts
    if len(part.runs) == 1:
        start, stop = interval(part)
        return (start + before if start else 0), stop + before + (after if stop == size else 0)
    front = part.runs[0][1] if len(part.runs) == 2 else 0
    for first in (before - front, size + before - front):  # what comes first is added in front, or had
        result = (first, first + part.size)
        if first >= 0 and result[1] <= size + before + after and _around(size, amounts, result) == part:
            return result
    return None


def _needed_around(partition: Partition, amounts: tuple[int, int]) -> tuple[Partition, Partition] | None:
    """What ranks need, and what they make of it; None: the dim must be whole."""
    size, needs, gives = partition.size, [], []
    for part in partition.parts:
        made = _made_around(size, amounts, part) if part.runs and min(amounts) >= 0 else (0, 0)
        need = None if made is None else _around(size, amounts, made)
        if made is None or need is None or not part.runs:
            return None
        needs.append(need)
        gives.append(Indices.range(*made))
    return Partition(size, tuple(needs)), Partition(size + sum(amounts), tuple(gives))


def _divided(partition: Partition, amounts: tuple[int, int], mode: str) -> Partition | None:
    """The parts of the result; None: the dim must be whole."""
    if mode not in ("constant", "replicate", "reflect") or (mode != "constant" and min(amounts) < 0):
        return None
    size, (before, after), parts = partition.size, amounts, []
    for part in partition.parts:
        own = _local_amounts(part, size, amounts, mode)
        if own is None:
            return None
        kept = part.select(max(-before, 0), size + min(after, 0))[0].shift(max(before, 0))
        front, back = Indices.range(0, max(own[0], 0)), Indices.range(size + before, size + before + max(own[1], 0))
        parts.append(front.concat(kept).concat(back))
    return Partition(size + before + after, tuple(parts))


def _pad(call: OpCall) -> OpSharding:
    """Constants, copies of the edge and mirrored elements are added locally; the other kinds need the dim whole."""
    layout, name, amounts, mode = call.layouts[0].summed(), _name(call), _amounts(call), _mode(call)
    if mode == "circular":
        return _pad_around(call, layout, amounts)
    gives = {dim: _divided(p, by, mode) for dim, by in amounts.items() if (p := layout.dims[dim]) is not None}
    needs = layout.with_dims({dim: None for dim, partition in gives.items() if partition is None})
    output = needs.with_dims(gives)
    if not any(gives.values()):
        return handle_empty_parts(call, OpSharding((needs,), output))

    def local(rank: int) -> LocalCall:
        flat = [0] * len(call.arguments[name])  # of zeros too: kernels want a certain number
        for dim, by in amounts.items():
            partition = needs.dims[dim]
            at = 2 * (len(output.dims) - 1 - dim)
            own = by if partition is None else _local_amounts(partition.parts[rank], partition.size, by, mode)
            flat[at : at + 2] = own or by
        return same_call(call, **{name: flat})

    return handle_empty_parts(call, OpSharding((needs,), output, local))


def _pad_around(call: OpCall, layout: Layout, amounts: dict[int, tuple[int, int]]) -> OpSharding:
    """Dims that are divided are padded by what is fetched."""
    pairs = {dim: _needed_around(p, by) for dim, by in amounts.items() if (p := layout.dims[dim]) is not None}
    needs = layout.with_dims({dim: None if pair is None else pair[0] for dim, pair in pairs.items()})
    output = needs.with_dims({dim: None if pair is None else pair[1] for dim, pair in pairs.items()})
    flat = list(call.arguments[_name(call)])
    for dim, pair in pairs.items():
        if pair is not None:
            at = 2 * (len(output.dims) - 1 - dim)
            flat[at : at + 2] = 0, 0
    local = same_call(call, **{_name(call): flat}) if any(flat) else (aten.alias.default, (call.arguments["self"],), {})
    return OpSharding((needs,), output, (lambda _: local) if any(pairs.values()) else None)


def _pad_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    changes: dict[int, Partition | None] = {}
    for dim, (before, after) in _amounts(call).items():
        partition, size = wanted.dims[dim], call.specs[0].shape[dim]
        if partition is not None and _mode(call) == "circular":
            parts = [
                _around(size, (before, after), interval(part)) if len(part.runs) == 1 else None
                for part in partition.parts
            ]
            known = tuple(part for part in parts if part is not None)
            if len(known) < len(parts):
                return None
            changes[dim] = Partition(size, known)
        elif partition is not None:
            changes[dim] = Partition(size, tuple(_cut_from(part, size, (before, after)) for part in partition.parts))
    return (wanted.with_dims(changes),)


def _cut_from(part: Indices, size: int, amounts: tuple[int, int]) -> Indices:
    """What a rank needs of a dim of this size to make a part of the result. What is dropped at an end comes with what
    is next to it, as someone has to have it."""
    before, after = amounts
    own, first, last = part.select(before, before + size)[0], max(-before, 0), size + min(after, 0)
    front = Indices.range(0, first if before < 0 and first in own.array else 0)
    back = Indices.range(last, size if after < 0 and last - 1 in own.array else last)
    return front.concat(own).concat(back)


def added_before(node: fx.Node, dim: int) -> int | None:
    """How many elements were added in front of an operator's operand along a dim; None where it was not padded."""
    source = operands(node)[0]
    packet = getattr(source.target, "overloadpacket", None)
    if packet not in (aten.constant_pad_nd, aten.pad, *EDGES):
        return None
    given = bound_arguments(source)
    flat, at = list(given["pad" if "pad" in given else "padding"]), 2 * (len(source.meta[SPEC].shape) - 1 - dim)
    return flat[at] if any(flat[at : at + 2]) else None


RULES = rules_of(verified(Rule(_pad, _pad_demand)), aten.constant_pad_nd, aten.pad, *EDGES)
