"""Padding and cropping: ranks with the first or the last element of a dim have what is added next to it, too."""

from __future__ import annotations

import numpy as np
import torch

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, rules_of, same_call, verified
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


def _pad_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    changes: dict[int, Partition | None] = {}
    for dim, (before, _) in _amounts(call).items():
        partition, size = wanted.dims[dim], call.specs[0].shape[dim]
        if partition is not None:
            changes[dim] = partition.map(
                size,
                lambda part, a=before, n=size: part.select(a, a + n)[0],  # type: ignore[misc]
            )
    return (wanted.with_dims(changes),)


RULES = rules_of(verified(Rule(_pad, _pad_demand)), aten.constant_pad_nd, aten.pad, *EDGES)
