"""Which inputs are the latents: those that are divided over time just like an output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands, results_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.partition import Partition
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.sharding.buffer_access import is_divided_over_time

aten = torch.ops.aten
PatchedDim = tuple[int, Partition]
"""A dim that is divided over patches, and the positions that each virtual rank's patch has of it."""


def inputs_of(program: Program, value: str) -> frozenset[str]:
    """Names of the floating-point inputs that an outer value is made from; where there are none, of its codes."""
    start = next(node for node in program.graph.nodes if node.name == value)
    seen, todo = {start}, [start]
    while todo:
        fresh = [source for source in operands(todo.pop()) if source not in seen]
        seen.update(fresh)
        todo += fresh
    inputs = [node for node in seen if node.op == "placeholder"]
    floating = frozenset(node.name for node in inputs if node.meta[SPEC].dtype.is_floating_point)
    return floating or frozenset(node.name for node in inputs if _is_code(node))


def _is_code(node: fx.Node) -> bool:
    """Whether an input is integers that are only looked up in tables: discrete latents, or a text."""
    looked_up = (user for user in _users(node) if user.target is not ops.shard)
    found = {getattr(user.target, "overloadpacket", None) for user in looked_up}
    return not node.meta[SPEC].dtype.is_floating_point and found == {aten.embedding}


def _users(node: fx.Node) -> Iterator[fx.Node]:
    yield from node.users
    for cut in _cuts(node):
        yield from cut.users


def latents(program: Program, mesh: Mesh) -> dict[str, PatchedDim]:
    """The inputs that are divided over time just like an output, so that a scheduler can work patch by patch, and how;
    every patch has a part of them, but for the first one, which may have enough to do with what goes with it. Where
    none is, those of which an output has more, all with the first patch (a text that is joined in front of them); else
    the codes of which an output has the scores, that is one dim more."""
    outputs, scores = [_output_cut(value, mesh) for value in results_of(program.graph)], set()
    for value, cut in zip(results_of(program.graph), outputs, strict=True):
        shape = value.meta[SPEC].shape
        for dim in range(len(shape)):
            if cut is not None and dim != cut[0]:
                scores.add((without(shape, dim), (cut[0] - (cut[0] > dim), cut[1])))
    found: list[dict[str, PatchedDim]] = [{}, {}, {}]
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        cuts = (_patch_dim(cut.meta[LAYOUT], mesh) for cut in _cuts(node))
        for mine in (cut for cut in cuts if cut is not None and _is_shared(cut, mesh)):
            if not node.meta[SPEC].dtype.is_floating_point:
                matches = False, False, _is_code(node) and (node.meta[SPEC].shape, mine) in scores
            else:
                matches = mine in outputs, any(one and _is_joined(mine, one, mesh) for one in outputs), False
            for kind, is_match in zip(found, matches, strict=True):
                if is_match:
                    kind[node.name] = mine
    return next((kind for kind in found if kind), {})


def _output_cut(value: fx.Node, mesh: Mesh) -> PatchedDim | None:
    while ops.is_relayout(value.target) and not is_divided_over_time(value, mesh):
        value = operands(value)[0]
    return _patch_dim(value.meta[LAYOUT], mesh)


def _is_joined(mine: PatchedDim, output: PatchedDim, mesh: Mesh) -> bool:
    """Whether an output has the same rows of an input with every patch, and more with the first one."""
    (dim, own), (out_dim, whole) = mine, output
    later = [rank for rank in range(mesh.world_size) if mesh.index(rank, (TIME,))]
    same = all(own.sizes[rank] == whole.sizes[rank] for rank in later)
    return same and dim == out_dim and own.size < whole.size


def without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    """A shape without one dim."""
    return (*shape[:dim], *shape[dim + 1 :])


def output_seeds(program: Program, mesh: Mesh) -> dict[str, Layout]:
    """Inputs that could be divided over time like an output is, and how: of its shape, and not yet divided."""
    known = latents(program, mesh)
    found: dict[str, Layout] = {}
    for value in results_of(program.graph):
        while ops.is_relayout(value.target) and not is_divided_over_time(value, mesh):
            value = operands(value)[0]
        cut = {d: dim for d, dim in enumerate(value.meta[LAYOUT].dims) if TIME in mesh.dividing_dims(dim)}
        for node in program.graph.nodes:
            if node.op != "placeholder" or not cut or node.name in known:
                continue
            spec = node.meta[SPEC]
            if spec.shape == value.meta[SPEC].shape and spec.dtype.is_floating_point:
                found[node.name] = Layout.whole(len(spec.shape)).with_dims(cut)
    return found


def _cuts(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if user.target is ops.shard:
            yield user
            yield from _cuts(user)


def _is_shared(cut: PatchedDim, mesh: Mesh) -> bool:
    later = [rank for rank in range(mesh.world_size) if mesh.index(rank, (TIME,))]
    return all(cut[1].sizes[rank] for rank in later)


def _patch_dim(layout: Layout, mesh: Mesh) -> PatchedDim | None:
    """The dim that is divided over time, with what the ranks of a patch have together."""
    for d, dim in enumerate(layout.dims):
        dividing = mesh.dividing_dims(dim)
        together = mesh.gathered(dim, dividing - {TIME}) if dim is not None and TIME in dividing else None
        if together is not None:
            return d, together
    return None
