"""How to get from one layout to another: which operator it takes, and what each rank sends to whom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from xdit_ir.ir.layout import Layout, part_of
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition, Runs


@dataclass(frozen=True)
class Piece:
    """What one rank sends to another: per dimension the sender's local positions (None: all) and the shape."""

    take: tuple[Runs | None, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Landing:
    """Where a piece goes in its receiver's result of shape `shape`: positions per dimension (None: all)."""

    places: tuple[Runs | None, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RankExchange:
    """One rank's part in a change of layout among `group` (its own place included).

    `sends[i]` of the local value (of shape `held`) goes to `group[i]`, where it lands at `landings[i]`; a tensor of
    shape `shapes[i]` comes from it. The result (of `shape`) has the piece of `group[i]` at the positions `places[i]`
    of each dimension (None: all).
    """

    group: tuple[int, ...]
    held: tuple[int, ...]
    sends: tuple[Piece, ...]
    landings: tuple[Landing, ...]
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[tuple[Runs | None, ...], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Relayout:
    """A planned change of layout: its kind (the operator's name), the mesh dims that talk, and each rank's part."""

    kind: str
    mesh_dims: tuple[str, ...]
    ranks: tuple[RankExchange, ...]

    def sent(self, itemsize: int) -> tuple[int, ...]:
        """Bytes that each rank sends to other ranks."""
        return tuple(
            sum(p.numel for p, peer in zip(x.sends, x.group, strict=True) if peer != rank) * itemsize
            for rank, x in enumerate(self.ranks)
        )


@lru_cache(maxsize=65536)
def kind(mesh: Mesh, source: Layout, target: Layout) -> tuple[str, tuple[str, ...]]:
    """The operator that changes one layout into another (neither with a pending sum), and the mesh dims that talk."""
    moved = _moved(source, target)
    if all(_holds(source.dims[dim], target.dims[dim]) for dim in moved):
        return "shard", ()
    talk = _talk(mesh, source, target)
    if all(not mesh.dividing_dims(target.dims[dim]) & set(talk) for dim in moved):
        return "gather", talk
    if all(_holds(target.dims[dim], source.dims[dim]) for dim in moved):
        return "halo_exchange", talk
    return "all_to_all", talk


def _talk(mesh: Mesh, source: Layout, target: Layout) -> tuple[str, ...]:
    """The fewest mesh dims, inner ones first, such that ranks which differ only there hold all that they need."""
    moved = _moved(source, target)
    talk: frozenset[str] = frozenset().union(*(mesh.dividing_dims(source.dims[dim]) for dim in moved))
    for name in mesh.ordered(talk):
        if all(_reaches(mesh, source.dims[dim], target.dims[dim], talk - {name}) for dim in moved):
            talk -= {name}
    return mesh.ordered(talk)


@lru_cache(maxsize=65536)
def _reaches(mesh: Mesh, source: Partition | None, target: Partition | None, dims: frozenset[str]) -> bool:
    """Whether ranks that differ only in these mesh dims hold together what each of them wants of one dimension."""
    if source is None:
        return True
    for rank in range(mesh.world_size):
        missing = part_of(target, source.size, rank)
        for member in mesh.group(rank, dims):
            missing = missing.without(source.parts[member])
        if missing.size:
            return False
    return True


def _moved(source: Layout, target: Layout) -> list[int]:
    return [dim for dim in range(len(source.dims)) if source.dims[dim] != target.dims[dim]]


@lru_cache(maxsize=8192)
def plan(mesh: Mesh, shape: tuple[int, ...], source: Layout, target: Layout) -> Relayout:
    """How to get a value of this global shape from one layout to another (neither with a pending sum)."""
    moved = _moved(source, target)
    name, talk = kind(mesh, source, target)
    cells = {
        (sender, receiver): [
            _piece(mesh, talk, source.dims[d], target.dims[d], sender, receiver, shape[d]) for d in moved
        ]
        for receiver in range(mesh.world_size)
        for sender in mesh.group(receiver, talk)
    }
    ranks = []
    for rank in range(mesh.world_size):
        group = mesh.group(rank, talk)
        sends = tuple(_send(shape, source, moved, cells[rank, peer], rank) for peer in group)
        shapes = tuple(_send(shape, source, moved, cells[peer, rank], peer).shape for peer in group)
        landings = tuple(
            Landing(_place(target, moved, cells[rank, peer], peer), target.local_shape(shape, peer)) for peer in group
        )
        places = tuple(_place(target, moved, cells[peer, rank], rank) for peer in group)
        held = source.local_shape(shape, rank)
        ranks.append(RankExchange(group, held, sends, landings, shapes, places, target.local_shape(shape, rank)))
    return Relayout(name, talk, tuple(ranks))


@lru_cache(maxsize=8192)
def scatter_plan(mesh: Mesh, shape: tuple[int, ...], source: Layout, target: Layout) -> Relayout:
    """How ranks that hold summands of a value sum it, each its own part: the mesh dims along which `target` has no
    pending sum any more talk, and every piece that comes from a member is a summand of the result."""
    talk, held = mesh.ordered(source.partial - target.partial), source.summed()
    moved, ranks = _moved(held, target), []
    cells = [[part_of(target.dims[d], shape[d], rank) for d in moved] for rank in range(mesh.world_size)]
    for rank in range(mesh.world_size):
        group, own = mesh.group(rank, talk), target.local_shape(shape, rank)
        sends = tuple(_send(shape, held, moved, cells[peer], rank) for peer in group)
        whole: tuple[None, ...] = (None,) * len(shape)
        landings = tuple(Landing(whole, target.local_shape(shape, peer)) for peer in group)
        here = held.local_shape(shape, rank)
        ranks.append(RankExchange(group, here, sends, landings, (own,) * len(group), (whole,) * len(group), own))
    return Relayout("reduce_scatter", talk, tuple(ranks))


@lru_cache(maxsize=65536)
def _holds(source: Partition | None, target: Partition | None) -> bool:
    """Whether every rank already holds what it shall hold of one dimension."""
    if source is None:
        return True
    wants = target.parts if target is not None else tuple(Indices.range(0, source.size) for _ in source.parts)
    pairs = set(zip(source.parts, wants, strict=True))
    return all(want.without(held).size == 0 for held, want in pairs)


@lru_cache(maxsize=65536)
def _piece(
    mesh: Mesh,
    talk: tuple[str, ...],
    source: Partition | None,
    target: Partition | None,
    sender: int,
    receiver: int,
    size: int,
) -> Indices:
    """What `receiver` takes of one dimension from `sender`: each index from exactly one holder, itself if possible."""
    wanted = part_of(target, size, receiver)
    if source is None:
        return wanted
    dims = mesh.dividing_dims(source) & set(talk)
    held, here, there = source.parts[sender], mesh.index(receiver, dims), mesh.index(sender, dims)
    if there != here and not source.tiles(mesh.group(receiver, dims)):
        held = held.without(source.parts[receiver])
        for other in mesh.group(sender, dims):
            if mesh.index(other, dims) < there:
                held = held.without(source.parts[other])
    return held.within(wanted)


def _send(shape: tuple[int, ...], source: Layout, moved: list[int], cell: list[Indices], sender: int) -> Piece:
    take: list[Runs | None] = [None] * len(shape)
    sizes = list(source.local_shape(shape, sender))
    for dim, piece in zip(moved, cell, strict=True):
        held = part_of(source.dims[dim], shape[dim], sender)
        sizes[dim] = piece.size
        if piece != held:
            take[dim] = held.positions(piece).runs
    return Piece(tuple(take), tuple(sizes))


def _place(target: Layout, moved: list[int], cell: list[Indices], receiver: int) -> tuple[Runs | None, ...]:
    places: list[Runs | None] = [None] * len(target.dims)
    for dim, piece in zip(moved, cell, strict=True):
        partition = target.dims[dim]
        places[dim] = piece.runs if partition is None else partition.parts[receiver].positions(piece).runs
    return tuple(places)
