"""Where samples have the same rows at different places, and orders of their rows in which they have not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import operands, placeholders
from xdit_ir.ir.hoist import descendants
from xdit_ir.ir.partition import Indices
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.row_sources import Rows, rows_of, samples_of

aten = torch.ops.aten
Orders = tuple[Indices, ...]
Row = tuple[Any, int, int]  # of what, which, and of how many such in this sample
FAR = 6  # operators that are compared


def unaligned(program: Program) -> Iterator[tuple[fx.Node, Orders]]:
    """Values put together from samples of which some have the same rows at other places, and orders that mend it."""
    floating = descendants(node for node in placeholders(program.graph) if node.meta[SPEC].dtype.is_floating_point)
    for node in program.graph.nodes:
        samples = samples_of(node) if node in floating else None
        if not samples or len(samples) < 2 or len(node.meta[SPEC].shape) < 3:
            continue
        if all(user.target is aten.select_scatter.default for user in node.users):
            continue  # not yet complete
        orders = _orders([rows_of(one, 0, node.meta[SPEC].shape[1]) for one in samples])
        if orders is not None:
            yield node, orders


def _orders(samples: Sequence[Rows]) -> Orders | None:
    """For each sample the order in which the rows that all have lie where the one with the least padding has them, and
    the others in between as they come; None where they lie so, or all have none."""
    places = [_places(rows) for rows in samples]
    first = max(places, key=len)
    shared = [row for row in first if all(row in other for other in places)]
    wanted = {first[row]: row for row in shared}
    if all(other[row] == first[row] for other in places for row in shared):
        return None
    size, orders = sum(run.length for run in samples[0]), []
    for mine in places:
        taken = {mine[row] for row in shared}
        rest = (place for place in range(size) if place not in taken)
        order = [mine[wanted[place]] if place in wanted else next(rest) for place in range(size)]
        orders.append(Indices.of_runs((place, 1) for place in order))
    return tuple(orders)


def _places(rows: Rows) -> dict[Row, int]:
    """Where each row lies that is no padding: a row of a value of all samples, or of one that is computed alike. What
    rows are taken for equal only decides about the order."""
    found: dict[Row, int] = {}
    place = 0
    for run in rows:
        if run.source is not None:
            of = run.source if run.sample is not None else _form(run.source, FAR)
            again = next(i for i in itertools.count() if (of, run.start, i) not in found)
            found |= {(of, run.start + i, again): place + i for i in range(run.length)}
        place += run.length
    return found


def _form(node: fx.Node, far: int) -> Any:
    """How a value is computed, from inputs of which types, as far back."""
    if node.op != "call_function" or not far:
        return node.target if node.op == "get_attr" else node.meta.get(SPEC)
    return node.target, node.meta.get(SPEC), tuple(_form(source, far - 1) for source in operands(node))
