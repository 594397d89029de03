"""How an output of the model, and the latents, are divided over patches, and what a patch takes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.buffer_ops import Read, Write
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.partition import Indices, Runs
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.pipefusion.latents import PatchedDim
from xdit_ir.pipefusion.pipeline_program import PatchStage


@dataclass(frozen=True)
class PatchCut:
    """How an output (and the latents) is divided over patches: `parts[p]` of dimension `dim` belong to patch p. What is
    at a position of latents is by `shift` further on in the output."""

    dim: int
    parts: tuple[Indices, ...]
    shift: int = 0

    @property
    def size(self) -> int:
        """Positions of all patches."""
        return sum(part.size for part in self.parts)

    def meeting(self, wanted: Indices) -> tuple[int, ...]:
        """The patches that have something of what is wanted."""
        return tuple(p for p, part in enumerate(self.parts) if part.within(wanted).size)

    def joined(self, patches: Sequence[int]) -> Indices:
        """What these patches have, in order of position."""
        runs = sorted(run for patch in patches for run in self.parts[patch].runs)
        return Indices.of_runs(runs)

    def assembled(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole of what the patches have."""
        order = np.argsort(np.concatenate([part.array for part in self.parts]))
        return ops.take(torch.cat(list(parts), self.dim), self.dim, Indices.of_array(order).runs)


def slot_of(value: fx.Node) -> str:
    """The slot in which the parts of an output are collected; empty if it is no such thing."""
    target = value.target
    return target.slot if isinstance(target, Read) and not target.summed else ""


def write_to(program: Program, slot: str) -> fx.Node:
    """The node by which a program fills a slot."""
    write: fx.Node
    [write] = (n for n in program.graph.nodes if isinstance(n.target, Write) and n.target.slot == slot)
    return write


def cut_of(value: fx.Node, parts: Sequence[PatchStage]) -> PatchCut | None:
    """How the parts of the patches lie in an output, if along one dimension and none twice."""
    read = value.target
    if not isinstance(read, Read) or read.summed:
        return None
    shape = value.meta[SPEC].shape
    writes = [target for part in parts if isinstance(target := write_to(part.program, read.slot).target, Write)]
    taken = (read.places, *(write.places for write in writes))
    dims = {dim for places in taken for dim, runs in enumerate(places) if runs is not None}
    if len(dims) != 1 or shape != writes[0].shape:
        return None
    [dim] = dims
    buffer = _along(read, dim, shape)
    if buffer.size != shape[dim]:
        return None
    cut = PatchCut(dim, tuple(buffer.positions(_along(write, dim, shape)) for write in writes))
    return cut if cut.size == cut.joined(range(len(parts))).size == shape[dim] else None


def _along(slot: Read | Write, dim: int, shape: Sequence[int]) -> Indices:
    """Which positions of one dimension of a buffer, in order."""
    runs = slot.places[dim]
    return Indices(((0, shape[dim]),) if runs is None else runs)


def cut_like(divided: PatchedDim, mesh: Mesh) -> PatchCut:
    """The parts of an input that patches have."""
    dim, partition, shift = divided
    first = [
        next(rank for rank in range(mesh.world_size) if mesh.index(rank, (TIME,)) == p)
        for p in range(mesh.size((TIME,)))
    ]
    parts = tuple(partition.parts[rank] for rank in first)
    return PatchCut(dim, parts, shift)


def narrowed(node: fx.Node, cut: PatchCut) -> tuple[int, ...] | None:
    """The patches that have what a program takes of an input; its `take`s then are of what those have together."""
    takes = _takes(node, cut.dim)
    if takes is None:
        return None
    runs: set[tuple[int, int]] = {run for take in takes for run in _runs(take)}
    wanted = Indices.of_runs(sorted(runs))
    patches = cut.meeting(wanted)
    held = cut.joined(patches)
    for take in takes:
        take.args = (take.args[0], cut.dim, held.positions(Indices(_runs(take))).runs)
    return patches


def _runs(take: fx.Node) -> Runs:
    runs: Any = take.args[2]
    return tuple(runs)


def _takes(node: fx.Node, dim: int) -> list[fx.Node] | None:
    """The first `take`s along a dimension; None if something else uses the value before."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.target is not ops.take:
            return None
        if user.args[1] == dim:
            found.append(user)
            continue
        further = _takes(user, dim)
        if further is None:
            return None
        found += further
    return found
