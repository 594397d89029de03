"""Layouts: how every dimension of a value is divided over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition


@dataclass(frozen=True)
class Layout:
    """One entry per tensor dimension: None (every rank holds it whole, in order) or its `Partition`.

    `partial` names the mesh dims along which the ranks hold summands whose sum is the value. A partition that leaves
    everything whole is the same as None and becomes None.
    """

    dims: tuple[Partition | None, ...]
    partial: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if any(dim is not None and dim.is_whole for dim in self.dims):
            dims = tuple(None if dim is None or dim.is_whole else dim for dim in self.dims)
            object.__setattr__(self, "dims", dims)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dims, self.partial))

    @staticmethod
    @cache
    def whole(ndim: int) -> Layout:
        """Replicated."""
        return Layout((None,) * ndim)

    @cached_property
    def is_whole(self) -> bool:
        """Whether every rank holds the whole value."""
        return not self.partial and all(dim is None for dim in self.dims)

    def summed(self) -> Layout:
        """The same without a pending sum."""
        return replace(self, partial=frozenset()) if self.partial else self

    def permuted(self, order: Sequence[int]) -> Layout:
        """That of the value with its dimensions in another order."""
        return replace(self, dims=tuple(self.dims[dim] for dim in order))

    def with_dims(self, changes: dict[int, Partition | None]) -> Layout:
        """The same with some dimensions (negative ones count from the end) replaced."""
        dims = list(self.dims)
        for dim, partition in changes.items():
            dims[dim] = partition
        return replace(self, dims=tuple(dims))

    def dividing_dims(self, mesh: Mesh) -> frozenset[str]:
        """The mesh dims along which the ranks hold different data."""
        return self.partial.union(*(mesh.dividing_dims(dim) for dim in self.dims))

    def local_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Shape on one rank of a value of this global shape."""
        return tuple(size if dim is None else dim.sizes[rank] for size, dim in zip(shape, self.dims, strict=True))


def key_gather_dims(mesh: Mesh, queries: Layout, keys: Layout) -> frozenset[str]:
    """The mesh dims along which an attention must bring keys together, by the layouts of its queries and keys."""
    return mesh.key_gather_dims(queries.dims[-2], keys.dims[-2])


def part_of(partition: Partition | None, size: int, rank: int) -> Indices:
    """What a rank holds of a dimension of this size; without a partition: all of it."""
    return Indices.range(0, size) if partition is None else partition.parts[rank]
