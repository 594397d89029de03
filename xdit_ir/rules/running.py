"""Sums that run along a dim: ranks with a run of it each sum that, and go on from the sums of the runs before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import LocalCall, Localize, OpCall, OpSharding, Rule, as_layouts, rules_of, same_call, verified
from xdit_ir.rules.labels import Labels, by_argument, handle_empty_parts, labelled, plain

aten = torch.ops.aten


def lengths_of_runs(mesh: Mesh, partition: Partition | None) -> tuple[int, ...]:
    """How long the runs are, in natural order, of which each rank has one or none; none where that is not so."""
    if partition is None or not mesh.tiles(partition) or any(len(part.runs) > 1 for part in partition.parts):
        return ()
    return tuple(length for _, length in sorted({run for part in partition.parts for run in part.runs}))


def _places(partition: Partition, lengths: Sequence[int]) -> Partition | None:
    """Which of these runs each rank has; None where it has something else."""
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    places = {(start, length): place for place, (start, length) in enumerate(zip(starts, lengths, strict=True))}
    if any(len(part.runs) > 1 or not {*part.runs} <= {*places} for part in partition.parts):
        return None
    parts = (Indices.of_runs((places[run], 1) for run in part.runs) for part in partition.parts)
    return Partition(len(lengths), tuple(parts))


def _cumsum(call: OpCall) -> OpSharding:
    dim = call.arguments["dim"]
    runs = call.out.shape and lengths_of_runs(call.mesh, call.layouts[0].dims[dim])
    free = runs and call.out.dtype.is_floating_point
    return labelled(lambda call: _along(call, () if free else (dim,))).forward(call)


def _along(call: OpCall, whole: Sequence[int]) -> Labels:
    names = plain(call.out, whole)
    return by_argument(call, names, self=names)


def _cumsum_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    """A part of the sums takes all that is before it."""
    return labelled(lambda call: _along(call, (call.arguments["dim"],))).demand(call, wanted)


def _run_sums(call: OpCall) -> OpSharding:
    layout, dim, given = call.layouts[0].summed(), call.arguments["dim"], call.arguments
    partition = layout.dims[dim]
    places = None if partition is None else _places(partition, given["lengths"])
    if partition is None or places is None:
        needs = layout.with_dims({dim: None})
        return handle_empty_parts(call, OpSharding((needs,), needs))

    def local(rank: int) -> LocalCall:
        return same_call(call, lengths=(partition.sizes[rank],))

    return handle_empty_parts(call, OpSharding((layout,), layout.with_dims({dim: places}), local))


def _running_sum(call: OpCall) -> Labels:
    dim, partition = call.arguments["dim"], call.layouts[0].dims[call.arguments["dim"]]
    whole = () if partition is None or _places(partition, call.arguments["lengths"]) is not None else (dim,)
    names = plain(call.out, whole)
    return by_argument(call, names, x=names, sums=plain(call.out, (dim,)))


def _from_place(call: OpCall, sharding: OpSharding) -> Localize | None:
    """Each rank is told how many runs are before its own."""
    given, output = call.arguments, as_layouts(sharding.outputs)[0]
    partition = output.dims[given["dim"]]
    places = None if partition is None else _places(partition, given["lengths"])
    if places is None:
        return None
    first = [part.runs[0][0] if part.runs else 0 for part in places.parts]
    tensors = given["x"], given["sums"]
    return lambda rank: (ops.running_sum, (*tensors, given["dim"], given["lengths"], given["dtype"], first[rank]), {})


RULES = {
    **rules_of(Rule(_cumsum, _cumsum_demand), aten.cumsum),
    **rules_of(Rule(_run_sums), ops.run_sums, ops.run_extremes),
    **rules_of(verified(labelled(_running_sum, _from_place)), ops.running_sum),
}
