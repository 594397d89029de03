"""Tiles of an attention: which queries and keys each rank of a grid has, and what computing them takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partial_attention import lse_columns
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec
from xdit_ir.ir.relayout import kind
from xdit_ir.sharding.cost import relayout_sent, ring_bytes, ring_dims
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
            yield self.mask, self.mask_layout(self.mask, grid)

    def mask_layout(self, mask: fx.Node, grid: Grid) -> Layout:
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
    ranks = range(mesh.world_size)
    places = [mesh.index(rank, attention.dims) for rank in ranks]
    for rows in range(2, count // 2 + 1):
        if count % rows == 0:
            yield from _arranged(attention, mesh, [divmod(places[rank], count // rows) for rank in ranks])
            yield from _arranged(attention, mesh, [divmod(places[rank], rows)[::-1] for rank in ranks])


def _arranged(attention: Untiled, mesh: Mesh, at: Sequence[tuple[int, ...]]) -> Iterator[Grid]:
    """The grid in which each rank of a group has this row and column; none where a row would have no keys."""
    ranks = range(mesh.world_size)
    groups = [mesh.group(rank, attention.dims) for rank in ranks]
    across, along = (
        tuple(tuple(peer for peer in groups[rank] if at[peer][axis] == at[rank][axis]) for rank in ranks)
        for axis in (1, 0)
    )
    q: Partition
    k: Partition
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


def seconds_as_it_is(node: fx.Node, mesh: Mesh, machine: Machine) -> float:
    """Time in which the keys are gathered, or travel around a ring beside the work, until the results are there."""
    q, k, v, *_ = operands(node)
    seconds = _gathering(node, (k, v), mesh, machine)
    work = _work(node, _sizes(q), [k.meta[SPEC].shape[-2]] * mesh.world_size, mesh, machine)
    if node.target is not ops.ring_attention:
        return seconds + work
    dims = ring_dims(node, mesh)
    passing = machine.around(mesh, dims, ring_bytes(node, mesh))
    result = max(node.meta[SPEC].on(node.meta[LAYOUT], rank).nbytes for rank in range(mesh.world_size))
    return seconds + max(work, passing) + (mesh.size(dims) - 1) * machine.joining(result)


def seconds_in_tiles(one: Untiled, grid: Grid, mesh: Mesh, machine: Machine) -> float:
    """Time of all exchanges, one after the other, of a tile, and of the merge."""
    seconds = _gathering(one.node, (one.k, one.v), mesh, machine)
    seconds += sum(_joining(x, grid.along, machine) for x in dict.fromkeys((one.k, one.v)))
    seconds += _joining(one.q, grid.across, machine)
    if one.mask is not None:
        seconds += _exchange(one.mask, one.mask_layout(one.mask, grid), mesh, machine)
    seconds += _work(one.node, grid.queries.sizes, grid.keys.sizes, mesh, machine)
    row = [_row_bytes(one.node, rank) for rank in range(mesh.world_size)]
    own = _sizes(one.q)
    sent = [each * (all_of - mine) for each, all_of, mine in zip(row, grid.queries.sizes, own, strict=True)]
    merged = len(grid.parts) * max(each * mine for each, mine in zip(row, own, strict=True))
    return seconds + machine.among(grid.across, sent) + machine.joining(merged / 2)


def _gathering(node: fx.Node, keys: Sequence[fx.Node], mesh: Mesh, machine: Machine) -> float:
    """Time of such gathers among these keys and values as are for this attention only."""
    gathers = [x for x in dict.fromkeys(keys) if x.target is ops.gather and list(x.users) == [node]]
    return sum(_exchange(operands(x)[0], x.meta[LAYOUT], mesh, machine) for x in gathers)


def _joining(x: fx.Node, groups: Groups, machine: Machine) -> float:
    """Time in which ranks gather the parts of their groups."""
    held = [x.meta[SPEC].on(x.meta[LAYOUT], rank).nbytes for rank in range(len(groups))]
    return machine.among(groups, [(len(group) - 1) * size for group, size in zip(groups, held, strict=True)])


def _exchange(x: fx.Node, wanted: Layout, mesh: Mesh, machine: Machine) -> float:
    """Time of bringing a value into another layout."""
    have: Layout = x.meta[LAYOUT]
    change, dims = kind(mesh, have, wanted)
    if change == ops.shard.__name__:
        return 0.0
    sent = relayout_sent(ops.RELAYOUTS[change], x.meta[SPEC], have, wanted, mesh)
    return machine.among([mesh.group(rank, dims) for rank in range(mesh.world_size)], sent)


def _sizes(x: fx.Node) -> Sequence[int]:
    """How many queries every rank has."""
    partition: Partition = x.meta[LAYOUT].dims[-2]
    return partition.sizes


def _row_bytes(node: fx.Node, rank: int) -> int:
    """Bytes that a rank has of the result of one query, and of its log-sum-exp, of all batches and heads."""
    spec: TensorSpec = node.meta[SPEC]
    layout: Layout = node.meta[LAYOUT]
    *lead, _, width = layout.local_shape(spec.shape, rank)
    return math.prod(lead) * (width + lse_columns(spec.dtype)) * spec.dtype.itemsize


def _work(node: fx.Node, queries: Sequence[int], keys: Sequence[int], mesh: Mesh, machine: Machine) -> float:
    """Time of the slowest rank, which has so many queries and keys."""
    q, out, layout = operands(node)[0].meta[SPEC], node.meta[SPEC], node.meta[LAYOUT]
    lead = [math.prod(layout.local_shape(out.shape, rank)[:-2]) for rank in range(mesh.world_size)]
    flops = max(2 * a * b * c * (q.shape[-1] + out.shape[-1]) for a, b, c in zip(lead, queries, keys, strict=True))
    return machine.attention_seconds(flops, q.shape[-1], q.dtype)
