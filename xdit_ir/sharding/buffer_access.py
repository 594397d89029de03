"""Changes of layout over time: which part of a buffer each patch writes, and what it reads."""

from __future__ import annotations

import math

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.buffer_ops import Places, Read, Write
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout, part_of
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC
from xdit_ir.ir.relayout import kind
from xdit_ir.rules.base import dividing_dims_of


def over_time(node: fx.Node, mesh: Mesh) -> bool:
    """Whether a node changes a layout in a way that needs other patches."""
    if not ops.communicates(node.target):
        return False
    have, want = operands(node)[0].meta[LAYOUT], node.meta[LAYOUT]
    return TIME in (have.partial - want.partial if node.target in ops.SUMS else kind(mesh, have, want)[1])


def is_divided_over_time(node: fx.Node, mesh: Mesh) -> bool:
    """Whether a value is divided over time (or has a sum over time pending)."""
    return TIME in dividing_dims_of(node, mesh)


def buffer_layout(mesh: Mesh, source: Layout) -> Layout:
    """What the buffer of a value holds: the parts of all patches."""
    dims = (None if dim is None else mesh.gathered(dim, (TIME,)) for dim in source.dims)
    return Layout(tuple(dims))


def write_of(source: fx.Node, layout: Layout | None, mesh: Mesh, rank: int) -> Write:
    """How a patch publishes a value to a buffer of this layout; without a layout: to its slot of a pending sum."""
    have, shape, patch = source.meta[LAYOUT], source.meta[SPEC].shape, mesh.index(rank, (TIME,))
    if layout is None:
        slots = mesh.size((TIME,))
        local = have.local_shape(shape, rank)
        return Write(source.name, patch, (slots, *local), (((patch, 1),), *(None for _ in local)))
    return Write(source.name, patch, layout.local_shape(shape, rank), _places(layout, have, shape, rank))


def read_of(node: fx.Node, layout: Layout | None, mesh: Mesh, rank: int) -> Read:
    """How a change of layout reads the buffer of its operand."""
    source = operands(node)[0]
    have, shape, patch = source.meta[LAYOUT], source.meta[SPEC].shape, mesh.index(rank, (TIME,))
    members = mesh.group(rank, (TIME,))
    if layout is None:
        return Read(source.name, patch, tuple(range(len(members))), (None,) * len(shape), summed=True)
    writers = (place for place, member in enumerate(members) if math.prod(have.local_shape(shape, member)))
    return Read(source.name, patch, tuple(writers), _places(layout, node.meta[LAYOUT], shape, rank))


def _places(layout: Layout, wanted: Layout, shape: tuple[int, ...], rank: int) -> Places:
    """Where in a rank's part of `layout` the parts of `wanted` lie; None: all of it, in order."""
    places = []
    for size, held, want in zip(shape, layout.dims, wanted.dims, strict=True):
        here, there = part_of(held, size, rank), part_of(want, size, rank)
        places.append(None if here == there else here.positions(there).runs)
    return tuple(places)


def before_time(mesh: Mesh, source: Layout, target: Layout) -> Layout:
    """A layout on the way from one to another: ranks have talked, patches have not.

    Every rank holds what the target wants, for this patch or another one, of that which its group holds at this patch.
    """
    dims = []
    for have, want in zip(source.dims, target.dims, strict=True):
        if have == want or have is None:
            dims.append(want)
            continue
        joined = mesh.gathered(have, mesh.dividing_dims(have) - {TIME}) if mesh.dividing_dims(have) else have
        parts = []
        for rank in range(mesh.world_size):
            mine, held = part_of(joined, have.size, rank), Indices(())
            for member in (rank, *mesh.group(rank, (TIME,))):
                held = held.concat(part_of(want, have.size, member).within(mine).without(held))
            parts.append(held)
        dims.append(Partition(have.size, tuple(parts)))
    return Layout(tuple(dims))
