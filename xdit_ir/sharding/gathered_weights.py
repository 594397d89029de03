"""Weights that ranks hold in parts: how much of them is gathered, and how much of that is there at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.program import SPEC, STORED, Program


class GatheredWeights(NamedTuple):
    """Bytes that are gathered in a forward, and of these the most that are there at a time."""

    total: int
    most: int


NONE_GATHERED = GatheredWeights(0, 0)


def gathers_weights(node: fx.Node) -> bool:
    """Whether a node gathers stored weights."""
    return node.target is ops.gather and str(node.all_input_nodes[0].target).startswith(f"{STORED}.")


def gathered_weights(program: Program) -> GatheredWeights:
    """Those of a program with layouts."""
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    changes: list[tuple[int, int]] = []
    for node in filter(gathers_weights, place):
        size = node.meta[SPEC].nbytes
        changes += [(place[node], size), (max(map(place.__getitem__, _users(node))) + 1, -size)]
    held, most = 0, 0
    for _, size in sorted(changes):
        held += size
        most = max(most, held)
    return GatheredWeights(sum(size for _, size in changes if size > 0), most)


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """What uses a value, or views of it."""
    for user in node.users:
        yield user
        if user.target is ops.unpack:
            yield from user.users
