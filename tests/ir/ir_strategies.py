"""Random meshes, partitions and layouts, and the shards of a tensor by its layout."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition, even_pieces

Draw = Callable[[st.SearchStrategy[Any]], Any]
# Set to look for bugs with so many times the examples, other ones at every run, not made smaller.
SEARCH = int(os.environ.get("XDIT_IR_SEARCH", "0"))


def examples(count: int) -> settings:
    """Settings of every property test here: deterministic, and as many examples as are worth their time."""
    return settings(
        max_examples=count * (SEARCH or 1),
        derandomize=not SEARCH,
        deadline=None,
        database=None,
        phases=[Phase.generate] if SEARCH else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def of(values: Sequence[int]) -> Indices:
    """Indices from a list."""
    return Indices.of_array(torch.tensor(values, dtype=torch.int64).numpy())


MESHES = [
    Mesh.of(cfg=cfg, ring=ring, ulysses=ulysses)
    for cfg, ring, ulysses in itertools.product((1, 2, 3), repeat=3)
    if cfg * ring * ulysses <= 8
]


def meshes(most: int = 6) -> st.SearchStrategy[Mesh]:
    """Meshes of up to `most` ranks; that of one rank is for shrinking."""
    return st.sampled_from([mesh for mesh in MESHES if mesh.world_size <= most])


@st.composite
def mesh_dims(draw: Draw, mesh: Mesh) -> tuple[str, ...]:
    """Some of the mesh dims that have more than one rank."""
    names = [name for name, size in mesh.degrees.items() if size > 1]
    return tuple(name for name in names if draw(st.booleans()))


def _cuts(draw: Draw, size: int, count: int) -> list[int]:
    inner = sorted(draw(st.lists(st.integers(0, size), min_size=count - 1, max_size=count - 1)))
    return [0, *inner, size]


@st.composite
def pieces(draw: Draw, size: int, count: int, kinds: str) -> list[Indices]:
    """One part per place of a group: even, uneven, in units, within segments, shuffled, overlapping (halo)."""
    kind = draw(st.sampled_from(kinds.split()))
    if kind == "uneven":
        return [Indices.range(a, b) for a, b in pairwise(_cuts(draw, size, count))]
    if kind == "unit":
        return even_pieces(size, count, unit=draw(st.integers(1, 3)))
    if kind == "segments":
        first = draw(st.integers(0, size))
        return even_pieces(size, count, segments=(first, size - first)) if size else even_pieces(0, count)
    if kind == "shuffled":
        order = draw(st.permutations(range(size)))
        return [of(order[a:b]) for a, b in pairwise(_cuts(draw, size, count))]
    if kind == "halo":
        reach = draw(st.integers(0, 2))
        parts = even_pieces(size, count)
        runs = [part.runs[0] if part.runs else (0, 0) for part in parts]
        return [Indices.range(max(a - reach, 0), min(a + n + reach, size)) for a, n in runs]
    return even_pieces(size, count)


KINDS = "even even uneven unit segments shuffled halo"


@st.composite
def partitions(draw: Draw, mesh: Mesh, size: int, dims: tuple[str, ...], kinds: str = KINDS) -> Partition:
    """A partition over these mesh dims; without any, a permutation of the whole."""
    if not dims:
        order = of(draw(st.permutations(range(size))))
        return Partition(size, (order,) * mesh.world_size)
    parts = draw(pieces(size, mesh.size(dims), kinds))
    return Partition(size, tuple(parts[mesh.index(rank, dims)] for rank in range(mesh.world_size)))


def layouts(
    draw: Draw, mesh: Mesh, shape: Sequence[int], pool: dict[Any, Partition] | None = None, kinds: str = KINDS
) -> Layout:
    """A layout in which a mesh dim divides at most one tensor dim; equal sizes get partitions from the pool."""
    placed = {
        name: draw(st.integers(-1, len(shape) - 1)) if shape else -1 for name, size in mesh.degrees.items() if size > 1
    }
    pool = {} if pool is None else pool
    result: list[Partition | None] = []
    for dim, size in enumerate(shape):
        names = tuple(name for name, place in placed.items() if place == dim)
        if not names and draw(st.integers(0, 9)):
            result.append(None)
            continue
        key = (size, names)
        if key not in pool or not draw(st.integers(0, 3)):
            pool[key] = draw(partitions(mesh, size, names, kinds))
        result.append(pool[key])
    return Layout(tuple(result))


def shard(value: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """What a rank holds of a value."""
    for dim, partition in enumerate(layout.dims):
        if partition is not None:
            value = value.index_select(dim, torch.from_numpy(partition.parts[rank].array))
    return value
