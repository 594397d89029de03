"""Ranks in rows and columns, for images whose parts then have shorter borders."""

from __future__ import annotations

import math

from xdit_ir.ir.mesh import RING, SEQUENCE, ULYSSES, Mesh
from xdit_ir.ir.program import Program, Seeding
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.shard_tokens import ShardTokens
from xdit_ir.passes.share_branches import ShareBranches
from xdit_ir.sharding.machine import Machine


def in_a_grid(program: Program, mesh: Mesh, machine: Machine) -> Mesh:
    """The ranks of a mesh that divides tokens only as a grid, as square as they allow, where rows and columns of images
    over a side of it each cost less than either over all ranks; the mesh itself where not, and for a prime number."""
    count = mesh.size(SEQUENCE)
    side = max(size for size in range(1, math.isqrt(count) + 1) if count % size == 0)
    if side == 1 or count != mesh.world_size:
        return mesh
    grid = Mesh.of(**{RING: side, ULYSSES: count // side})
    seeding = run_passes(program, [ShareBranches(grid, machine), ShardTokens(grid, machine)]).seeding
    return grid if seeding is not None and _has_rows_and_columns(seeding) else mesh


def _has_rows_and_columns(seeding: Seeding) -> bool:
    layouts = (layout for each in seeding.seeds.values() for layout in each)
    return any(sum(dim is not None for dim in layout.dims) > 1 for layout in layouts)
