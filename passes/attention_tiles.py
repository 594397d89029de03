"""Tiles of an attention: which queries and keys each rank of a grid has, and what computing them takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout, kind
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partial_attention import lse_columns
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec
from xdit_ir.sharding.cost import relayout_bytes, relayout_sent, ring_bytes, ring_dims, talking_dims
from xdit_ir.sharding.machine import Machine

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Untiled:
    """An attention with what it can be made of: keys and values that are divided over the mesh dims `dims`, as queries
    are."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    dims: tuple[str, ...]

    def operands(self, grid: Grid) -> Iterator[tuple[fx.Node, Layout]]:
        """Each operand with the layout in which a tile takes it."""
        yield self.q, self.q.meta[LAYOUT].with_dims({-2: grid.queries})
        yield from ((x, x.meta[LAYOUT].with_dims({-2: grid.keys})) for x in (self.k, self.v))
        if self.mask is not None:
            yield self.mask, self._mask_layout(self.mask, grid)

    def _mask_layout(self, mask: fx.Node, grid: Grid) -> Layout:
        """Like batch, heads and queries; all columns, in their natural order."""
        shape, full = mask.meta[SPEC].shape, self.node.meta[SPEC].shape
        wanted, offset = (*self.q.meta[LAYOUT].dims[:-2], grid.queries, None), len(full) - len(shape)
        sizes = (*full[:-1], 0)
        return Layout(tuple(wanted[d + offset] if size == sizes[d + offset] else None for d, size in enumerate(shape)))

    def tile_spec(self, grid: Grid) -> TensorSpec:
        """The type of what all tiles give."""
        *lead, queries, width = self.node.meta[SPEC].shape
        dtype = self.node.meta[SPEC].dtype
        return TensorSpec((*lead, len(grid.parts) * queries, width + lse_columns(dtype)), dtype)


@dataclass(frozen=True)
class Grid:
    """The ranks of a group as rows and columns of a grid: `across[rank]` are those whose queries a rank gathers,
    `along[rank]` those whose keys. `parts`: the keys of each row; `home`: the rows of partial results, part by part,
    that the owner of some queries merges."""

    across: Groups
    along: Groups
    queries: Partition
    keys: Partition
    parts: tuple[Indices, ...]
    home: Partition


def grids(attention: Untiled, mesh: Mesh) -> Iterator[Grid]:
    """All ways to arrange the ranks that share keys in several rows and columns; those that gather keys lie side by
    side, or apart."""
    count = mesh.size(attention.dims)
    for rows in range(2, count // 2 + 1):
        columns, rest = divmod(count, rows)
        if rest:
            continue
        yield from _arranged(attention, mesh, lambda at, width=columns: divmod(at, width))  # type: ignore[misc]
        yield from _arranged(attention, mesh, lambda at, height=rows: divmod(at, height)[::-1])  # type: ignore[misc]


def _arranged(attention: Untiled, mesh: Mesh, place: Callable[[int], tuple[int, int]]) -> Iterator[Grid]:
    """The grid in which the ranks of a group have these rows and columns; none where a row would have no keys."""
    ranks, dims = range(mesh.world_size), attention.dims
    at = [place(mesh.index(rank, dims)) for rank in ranks]
    groups = [mesh.group(rank, dims) for rank in ranks]
    across, along = (
        tuple(tuple(peer for peer in groups[rank] if at[peer][axis] == at[rank][axis]) for rank in ranks)
        for axis in (1, 0)
    )
    q, k = (x.meta[LAYOUT].dims[-2] for x in (attention.q, attention.k))
    queries, keys = _joined(q, across), _joined(k, along)
    first = {row: rank for rank, (row, _) in reversed(list(enumerate(at)))}
    parts = tuple(keys.parts[first[row]] for row in sorted(first))
    if all(part.size for part in parts):
        every = Indices.range(0, len(parts))
        home = Partition(len(parts) * q.size, tuple(every.outer(part, q.size) for part in q.parts))
        yield Grid(across, along, queries, keys, parts, home)


def _joined(partition: Partition, groups: Groups) -> Partition:
    """What ranks have that gather the parts of these groups, in their order."""
    runs = {group: [run for rank in group for run in partition.parts[rank].runs] for group in set(groups)}
    return Partition(partition.size, tuple(Indices.of_runs(runs[group]) for group in groups))


def seconds_as_it_is(attention: Untiled, mesh: Mesh, machine: Machine) -> float:
    """Time in which the keys are gathered, or travel around a ring beside the work, until the results are there."""
    node, given = attention.node, attention.node.all_input_nodes
    gathers = [x for x in given if x.target is ops.gather and x.args[0] in (attention.k, attention.v)]
    seconds = sum(_exchange(talking_dims(x, mesh), relayout_bytes(x, mesh), mesh, machine) for x in gathers)
    k = attention.k.meta[SPEC].shape[-2]
    keys = [k] * mesh.world_size
    if node.target is not ops.ring_attention:
        return seconds + _work(attention, _sizes(attention.q), keys, mesh, machine)
    dims = ring_dims(node, mesh)
    passing = machine.around(mesh, dims, ring_bytes(node, mesh))
    result = max(node.meta[SPEC].on(node.meta[LAYOUT], rank).nbytes for rank in range(mesh.world_size))
    work = max(_work(attention, _sizes(attention.q), keys, mesh, machine), passing)
    return seconds + work + (mesh.size(dims) - 1) * machine.joining(result)


def seconds_in_tiles(attention: Untiled, grid: Grid, mesh: Mesh, machine: Machine) -> float:
    """Time of all exchanges, one after the other, of a tile, and of the merge."""
    ranks, q = range(mesh.world_size), attention.q.meta[LAYOUT].dims[-2]
    seconds = 0.0
    for x, groups in ((attention.q, grid.across), *((x, grid.along) for x in {attention.k: 0, attention.v: 0})):
        held = [x.meta[SPEC].on(x.meta[LAYOUT], rank).nbytes for rank in ranks]
        seconds += machine.among(groups, [(len(groups[rank]) - 1) * held[rank] for rank in ranks])
    if attention.mask is not None:
        mask, wanted = list(attention.operands(grid))[-1]
        seconds += _relayout(mask, wanted, mesh, machine)
    seconds += _work(attention, grid.queries.sizes, grid.keys.sizes, mesh, machine)
    row = [_row_bytes(attention, rank) for rank in ranks]
    sent = [row[rank] * (grid.queries.sizes[rank] - q.sizes[rank]) for rank in ranks]
    merged = max(len(grid.parts) * row[rank] * q.sizes[rank] for rank in ranks)
    return seconds + machine.among(grid.across, sent) + machine.joining(merged / 2)


def _sizes(x: fx.Node) -> tuple[int, ...]:
    layout: Layout = x.meta[LAYOUT]
    partition = layout.dims[-2]
    assert partition is not None
    return partition.sizes


def _row_bytes(attention: Untiled, rank: int) -> int:
    """Bytes that a rank has of the result of one query, and of its log-sum-exp, of all batches and heads."""
    spec, layout = attention.node.meta[SPEC], attention.node.meta[LAYOUT]
    *lead, _, width = layout.local_shape(spec.shape, rank)
    return math.prod(lead) * (width + lse_columns(spec.dtype)) * spec.dtype.itemsize


def _work(
    attention: Untiled, queries: tuple[int, ...], keys: tuple[int, ...] | list[int], mesh: Mesh, machine: Machine
) -> float:
    """Time of the slowest rank, which has so many queries and keys."""
    spec, layout = attention.q.meta[SPEC], attention.q.meta[LAYOUT]
    widths = spec.shape[-1] + attention.node.meta[SPEC].shape[-1]
    lead = [math.prod(layout.local_shape(spec.shape, rank)[:-2]) for rank in range(mesh.world_size)]
    flops = max(2 * a * b * c * widths for a, b, c in zip(lead, queries, keys, strict=True))
    return machine.attention_seconds(flops, spec.shape[-1], spec.dtype)


def _exchange(dims: tuple[str, ...], sent: tuple[int, ...], mesh: Mesh, machine: Machine) -> float:
    return machine.start(mesh, dims) + machine.sending(mesh, dims, sent)


def _relayout(x: fx.Node, wanted: Layout, mesh: Mesh, machine: Machine) -> float:
    """Time of bringing a value into another layout."""
    have: Layout = x.meta[LAYOUT]
    change, dims = kind(mesh, have, wanted)
    if change == ops.shard.__name__:
        return 0.0
    return _exchange(dims, relayout_sent(ops.RELAYOUTS[change], x.meta[SPEC], have, wanted, mesh), mesh, machine)
