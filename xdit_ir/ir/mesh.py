"""The mesh of ranks: named dims, outer to inner. `DIMS` is the one place that says which there are."""

from __future__ import annotations

import difflib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.partition import Indices, Partition, even_pieces


@dataclass(frozen=True)
class MeshDim:
    """A mesh dim: its name, its letter in the short form of degrees (`u2`), what it divides, and that for people."""

    name: str
    letter: str
    divides: str
    says: str


# Along these queries meet the keys of other ranks by keys that travel, and by an exchange of tokens for heads.
RING, ULYSSES = "ring", "ulysses"
# Outer to inner.
DIMS = (
    MeshDim("cfg", "c", "batch", "the batch, conditional and unconditional"),
    MeshDim("pipefusion", "p", "time", "stages of a pipeline; in layouts: patches"),
    MeshDim(RING, "r", "tokens", "tokens; keys and values travel"),
    MeshDim(ULYSSES, "u", "tokens", "tokens; exchanged for heads around attention"),
    MeshDim("tensor", "t", "features", "heads and features, and with them weights; sums travel"),
)
MESH_DIMS = tuple(dim.name for dim in DIMS)
(BATCH,) = (dim.name for dim in DIMS if dim.divides == "batch")
# In layouts this mesh dim counts patches, which one rank computes one after the other.
(TIME,) = (dim.name for dim in DIMS if dim.divides == "time")
SEQUENCE = tuple(dim.name for dim in DIMS if dim.divides == "tokens")
FEATURES = tuple(dim.name for dim in DIMS if dim.divides == "features")


@dataclass(frozen=True)
class Mesh:
    """Mesh dims with their sizes, outer to inner. Those of `DIMS` that are not named are there with size 1, each behind
    the one that precedes it in `DIMS`.

    Raises:
        ParallelizeError: a name stands there twice or is none, or a size is no positive integer.
    """

    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.names, self.sizes)
        sizes = dict(zip(self.names, self.sizes, strict=True))
        names = list(self.names)
        for place, name in enumerate(MESH_DIMS):
            if name not in sizes:
                names.insert(names.index(MESH_DIMS[place - 1]) + 1 if place else 0, name)
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "sizes", tuple(sizes.get(name, 1) for name in names))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.names, self.sizes))

    @staticmethod
    def of(**degrees: int) -> Mesh:
        """The mesh of these degrees, in the order of `DIMS`.

        Raises:
            ParallelizeError: there is no such degree, or it is no positive integer; names the nearest legal one.
        """
        check_degree_names(degrees)
        return Mesh(MESH_DIMS, tuple(degrees.get(name, 1) for name in MESH_DIMS))

    @cached_property
    def degrees(self) -> Mapping[str, int]:
        """Sizes by name, outer to inner."""
        return dict(zip(self.names, self.sizes, strict=True))

    def resized(self, name: str, size: int) -> Mesh:
        """The same mesh with another size of one dim."""
        self._known((name,))
        return Mesh(self.names, tuple({**self.degrees, name: size}.values()))

    def size(self, dims: Collection[str]) -> int:
        """Product of the sizes of these mesh dims."""
        self._known(dims)
        return math.prod(size for name, size in self.degrees.items() if name in dims)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    def ordered(self, dims: Collection[str]) -> tuple[str, ...]:
        """These mesh dims, outer to inner."""
        return tuple(name for name in self.names if name in dims)

    def dims_of_a_call(self, *, paired: bool, along: Collection[str] = ()) -> tuple[str, ...]:
        """The mesh dims along which ranks run the same call, or those of them that are `along`, if any is; `paired`:
        the parts of `cfg` run different ones. Stages run calls of their own."""
        found = (name for name in self.names if name != TIME and not (paired and name == BATCH))
        return tuple(name for name in found if not along or name in along)

    @cached_property
    def _places(self) -> tuple[tuple[int, ...], ...]:
        return tuple(itertools.product(*map(range, self.sizes)))

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank is along every mesh dim."""
        return dict(zip(self.names, self._places[rank], strict=True))

    def rank_at(self, coordinate: Mapping[str, int]) -> int:
        """The inverse of `coordinate`; mesh dims that are not named count as 0."""
        self._known(coordinate)
        rank = 0
        for name, size in self.degrees.items():
            at = coordinate.get(name, 0)
            if not 0 <= at < size:
                raise IndexError(f"{name}={at}, but the mesh has {name}={size}")
            rank = rank * size + at
        return rank

    def index(self, rank: int, dims: Collection[str]) -> int:
        """Position of a rank inside its group over these mesh dims (row-major in mesh order)."""
        place = 0
        for name, size, at in zip(self.names, self.sizes, self._places[rank], strict=True):
            if name in dims:
                place = place * size + at
        return place

    def _known(self, dims: Collection[str]) -> None:
        if unknown := [name for name in dims if name not in self.degrees]:
            raise ParallelizeError(f"the mesh has no dim {unknown[0]!r}; it has {', '.join(self.names)}")

    def group(self, rank: int, dims: Collection[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` at most in these mesh dims, in rank order."""
        return _groups(self, frozenset(dims))[rank]

    def dividing_dims(self, partition: Partition | None) -> frozenset[str]:
        """The mesh dims along which parts differ."""
        return frozenset() if partition is None else _varies(self, partition)

    def key_gather_dims(self, queries: Partition | None, keys: Partition | None) -> frozenset[str]:
        """The mesh dims along which keys must be brought together, for every rank that has queries to have all keys."""
        found = self.dividing_dims(keys)
        for name in self.ordered(found):
            if keys is not None and _finds_all(self, queries, keys, found - {name}):
                found -= {name}
        return found

    def divide(self, size: int, dims: Collection[str], unit: int = 1, segments: Sequence[int] = ()) -> Partition:
        """A dimension divided evenly (within segments, in whole units) over these mesh dims."""
        pieces = even_pieces(size, self.size(dims), unit, segments)
        return Partition(size, tuple(pieces[self.index(rank, dims)] for rank in range(self.world_size)))

    def refine(self, partition: Partition, dims: Collection[str]) -> Partition:
        """Every part divided further, evenly, over those of these mesh dims along which the parts are equal."""
        return _refined(self, partition, frozenset(dims) - self.dividing_dims(partition))

    def covers(self, partition: Partition) -> bool:
        """Whether each index is held somewhere along the mesh dims that divide it."""
        return _covers(self, partition)

    def tiles(self, partition: Partition) -> bool:
        """Whether each index is held exactly once along the mesh dims that divide it: no halo, nothing left out."""
        return _tiles(self, partition)

    def apart(self, partition: Partition) -> Partition | None:
        """The partition with each index held once: where the runs of neighbours overlap, up to the middle of that; None
        where ranks have other than one run each."""
        return partition if self.tiles(partition) else _apart(self, partition)

    def gathered(self, partition: Partition, dims: Collection[str]) -> Partition | None:
        """What every rank holds after gathering over these mesh dims, parts in group order; None if that is whole."""
        return _gathered(self, partition, frozenset(dims))


def check_degree_names(given: Mapping[str, object], options: Iterable[str] = ()) -> None:
    """Raise `ParallelizeError` for a name that is no degree; names the nearest of them, and of the `options` that a
    call takes besides."""
    for name, value in given.items():
        if name not in MESH_DIMS:
            near = difflib.get_close_matches(name, [*MESH_DIMS, *options], n=1)
            hint = f"did you mean {near[0]}={value!r}? " if near else ""
            what = "parallel degree, nor another option" if options else "parallel degree"
            raise ParallelizeError(f"{name}={value!r} is no {what}; {hint}there are {', '.join(MESH_DIMS)}")


def _nearest(size: object) -> int:
    """The positive integer that is meant by a size of another kind, such as '2' or 2.0; 1 where none is."""
    try:
        number = float(size)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 1
    return max(1, int(number)) if number.is_integer() else 1


def _check(names: Sequence[str], sizes: Sequence[int]) -> None:
    if len(names) != len(sizes):
        raise ParallelizeError(f"a mesh has a size for each of its dims; got the dims {names} and the sizes {sizes}")
    for name, size in zip(names, sizes, strict=True):
        if not isinstance(name, str) or not name.isidentifier():
            raise ParallelizeError(f"{name!r} is no name of a mesh dim; legal are letters, digits and _, as in 'ring'")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            nearest = f"the nearest legal one is {name}={_nearest(size)}"
            raise ParallelizeError(f"{name}={size!r} is not a positive integer; {nearest}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ParallelizeError(f"the mesh dims {', '.join(names)} name {twice[0]} twice; each may stand there once")


def _finds_all(mesh: Mesh, queries: Partition | None, keys: Partition, dims: frozenset[str]) -> bool:
    held = _gathered(mesh, keys, dims)
    return held is None or all(
        part.size == keys.size or (queries is not None and not queries.parts[rank].size)
        for rank, part in enumerate(held.parts)
    )


@lru_cache(maxsize=1024)
def _groups(mesh: Mesh, dims: frozenset[str]) -> tuple[tuple[int, ...], ...]:
    mesh._known(dims)
    fixed = [name for name in mesh.names if name not in dims]
    keys = [tuple(at[name] for name in fixed) for at in map(mesh.coordinate, range(mesh.world_size))]
    members: dict[tuple[int, ...], list[int]] = {}
    for rank, key in enumerate(keys):
        members.setdefault(key, []).append(rank)
    found = {key: tuple(group) for key, group in members.items()}
    return tuple(found[key] for key in keys)


@lru_cache(maxsize=1 << 12)
def _refined(mesh: Mesh, partition: Partition, dims: frozenset[str]) -> Partition:
    count = mesh.size(dims)
    cuts = {part: even_pieces(part.size, count) for part in set(partition.parts)}
    parts = (part.at(cuts[part][mesh.index(rank, dims)]) for rank, part in enumerate(partition.parts))
    return Partition(partition.size, tuple(parts))


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
def _covers(mesh: Mesh, partition: Partition) -> bool:
    return all(partition.covers(group) for group in set(_groups(mesh, mesh.dividing_dims(partition))))


@lru_cache(maxsize=4096)
def _tiles(mesh: Mesh, partition: Partition) -> bool:
    return all(partition.tiles(group) for group in set(_groups(mesh, mesh.dividing_dims(partition))))


@lru_cache(maxsize=4096)
def _apart(mesh: Mesh, partition: Partition) -> Partition | None:
    runs = sorted({part.runs for part in partition.parts if part.runs})
    if any(len(one) > 1 for one in runs):
        return None
    edges = [(start, start + length) for ((start, length),) in runs]
    pairs = list(itertools.pairwise(edges))
    if not all(a < b <= end < stop for (a, end), (b, stop) in pairs):
        return None
    cuts = [0, *((end + start) // 2 for (_, end), (start, _) in pairs), partition.size]
    own = {one: Indices.range(*cut) for one, cut in zip(runs, itertools.pairwise(cuts), strict=True)}
    found = partition.map(partition.size, lambda part: own.get(part.runs, part))
    return found if mesh.tiles(found) else None


@lru_cache(maxsize=4096)
def _varies(mesh: Mesh, partition: Partition) -> frozenset[str]:
    found = set()
    for name, size in mesh.degrees.items():
        if size == 1:
            continue
        for rank in range(mesh.world_size):
            first = mesh.group(rank, (name,))[0]
            if partition.parts[rank] != partition.parts[first]:
                found.add(name)
                break
    return frozenset(found)
