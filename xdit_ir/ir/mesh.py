"""The mesh of ranks: named dimensions, outer to inner `cfg, pipefusion, ring, ulysses`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from xdit_ir.ir.partition import Indices, Partition, even_pieces

MESH_DIMS = ("cfg", "pipefusion", "ring", "ulysses")
# In layouts this mesh dim counts patches, which one rank computes one after the other.
TIME = "pipefusion"
# The mesh dims that divide tokens.
SEQUENCE = ("ring", "ulysses")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh dimensions, in the order of `MESH_DIMS`."""

    sizes: tuple[int, ...]

    @staticmethod
    def of(cfg: int = 1, pipefusion: int = 1, ring: int = 1, ulysses: int = 1) -> Mesh:
        """A mesh by name of its dimensions."""
        return Mesh((cfg, pipefusion, ring, ulysses))

    def size(self, dims: Collection[str]) -> int:
        """Product of the sizes of these mesh dims."""
        return math.prod(size for name, size in zip(MESH_DIMS, self.sizes, strict=True) if name in dims)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    @cached_property
    def coordinates(self) -> tuple[tuple[int, ...], ...]:
        """Coordinates of every rank."""
        return tuple(tuple(int(i) for i in np.unravel_index(rank, self.sizes)) for rank in range(self.world_size))

    def index(self, rank: int, dims: Collection[str]) -> int:
        """Position of a rank inside its group over these mesh dims (row-major in mesh order)."""
        place = 0
        for name, size, at in zip(MESH_DIMS, self.sizes, self.coordinates[rank], strict=True):
            if name in dims:
                place = place * size + at
        return place

    def group(self, rank: int, dims: Collection[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` at most in these mesh dims, in rank order."""
        return _groups(self, frozenset(dims))[rank]

    def dividing_dims(self, partition: Partition | None) -> frozenset[str]:
        """The mesh dims along which parts differ."""
        return frozenset() if partition is None else _varies(self, partition)

    def key_gather_dims(self, queries: Partition | None, keys: Partition | None) -> frozenset[str]:
        """The mesh dims along which keys must be brought together, for every rank that has queries to have all keys."""
        found = self.dividing_dims(keys)
        for name in MESH_DIMS:
            if keys is not None and name in found and _finds_all(self, queries, keys, found - {name}):
                found -= {name}
        return found

    def divide(self, size: int, dims: Collection[str], unit: int = 1, segments: Sequence[int] = ()) -> Partition:
        """A dimension divided evenly (within segments, in whole units) over these mesh dims."""
        pieces = even_pieces(size, self.size(dims), unit, segments)
        return Partition(size, tuple(pieces[self.index(rank, dims)] for rank in range(self.world_size)))

    def refine(self, partition: Partition, dims: Collection[str]) -> Partition:
        """Every part divided further, evenly, over those of these mesh dims along which the parts are equal."""
        rest = frozenset(dims) - self.dividing_dims(partition)
        count = self.size(rest)
        cuts = {part: even_pieces(part.size, count) for part in set(partition.parts)}
        parts = (part.at(cuts[part][self.index(rank, rest)]) for rank, part in enumerate(partition.parts))
        return Partition(partition.size, tuple(parts))

    def tiles(self, partition: Partition) -> bool:
        """Whether each index is held exactly once along the mesh dims that divide it: no halo, nothing left out."""
        return _tiles(self, partition)

    def gathered(self, partition: Partition, dims: Collection[str]) -> Partition | None:
        """What every rank holds after gathering over these mesh dims, parts in group order; None if that is whole."""
        return _gathered(self, partition, frozenset(dims))


def _finds_all(mesh: Mesh, queries: Partition | None, keys: Partition, dims: frozenset[str]) -> bool:
    held = _gathered(mesh, keys, dims)
    return held is None or all(
        part.size == keys.size or (queries is not None and not queries.parts[rank].size)
        for rank, part in enumerate(held.parts)
    )


@lru_cache(maxsize=1024)
def _groups(mesh: Mesh, dims: frozenset[str]) -> tuple[tuple[int, ...], ...]:
    fixed = [axis for axis, name in enumerate(MESH_DIMS) if name not in dims]
    keys = [tuple(place[axis] for axis in fixed) for place in mesh.coordinates]
    return tuple(tuple(other for other, there in enumerate(keys) if there == here) for here in keys)


@lru_cache(maxsize=4096)
def _gathered(mesh: Mesh, partition: Partition, dims: frozenset[str]) -> Partition | None:
    joined: dict[tuple[int, ...], Indices] = {}
    for group in set(_groups(mesh, dims)):
        held = Indices(())
        for part in dict.fromkeys(partition.parts[member] for member in group):
            held = held.concat(part.without(held))
        joined[group] = held
    result = Partition(partition.size, tuple(joined[group] for group in _groups(mesh, dims)))
    return None if result.is_whole else result


@lru_cache(maxsize=4096)
def _tiles(mesh: Mesh, partition: Partition) -> bool:
    return all(partition.tiles(group) for group in set(_groups(mesh, mesh.dividing_dims(partition))))


@lru_cache(maxsize=4096)
def _varies(mesh: Mesh, partition: Partition) -> frozenset[str]:
    found = set()
    for axis, name in enumerate(MESH_DIMS):
        if mesh.sizes[axis] == 1:
            continue
        for rank in range(mesh.world_size):
            first = mesh.group(rank, (name,))[0]
            if partition.parts[rank] != partition.parts[first]:
                found.add(name)
                break
    return frozenset(found)
