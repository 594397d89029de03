"""Tensors divided over ranks in any way: what tests of exchanges are given."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import strategies as st

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition

MESHES = [Mesh.of(ulysses=2), Mesh.of(ulysses=3), Mesh.of(ring=2, ulysses=2)]


@st.composite
def partitions(
    draw: st.DrawFn, mesh: Mesh, size: int, kinds: tuple[str, ...] = ("whole", "even", "any")
) -> Partition | None:
    """Whole, even, or any disjoint cover of the dimension, in any order."""
    kind = draw(st.sampled_from(kinds))
    if kind == "whole":
        return None
    if kind == "even":
        return mesh.divide(size, ("ring", "ulysses"))
    order = draw(st.permutations(range(size)))
    cuts = sorted(draw(st.integers(0, size)) for _ in range(mesh.world_size - 1))
    bounds = [0, *cuts, size]
    parts = [np.array(order[a:b], dtype=np.int64) for a, b in itertools.pairwise(bounds)]
    return Partition(size, tuple(Indices.of_array(part) for part in parts))


def local(value: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """What a rank has of it."""
    for dim, partition in enumerate(layout.dims):
        if partition is not None:
            value = value.index_select(dim, torch.from_numpy(partition.parts[rank].array))
    return value
