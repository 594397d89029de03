"""Which inputs are the latents: those that are divided over time just like an output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands, results_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TokenAxis, is_weight
from xdit_ir.sharding.buffer_access import is_divided_over_time

aten = torch.ops.aten


class PatchedDim(NamedTuple):
    """A dim that is divided over patches: the positions that each virtual rank's patch has of it, which are by `shift`
    further on in the output."""

    dim: int
    partition: Partition
    shift: int = 0


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


def where_latents_join(program: Program, axis: TokenAxis) -> TokenAxis | None:
    """A stream that begins without latents (a text, of which there is a token for each of theirs), where they have come
    to it: the first value behind its own that has its tokens in the same dim and is made of floating-point inputs."""
    behind: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name == axis.value or any(source in behind for source in operands(node)):
            behind.add(node)
            shape = getattr(node.meta.get(SPEC), "shape", ())
            if shape[axis.dim : axis.dim + 1] == (axis.size,) and inputs_of(program, node.name):
                return replace(axis, value=node.name)
    return None


def _is_code(node: fx.Node) -> bool:
    """Whether an input is integers that are looked up in a table: discrete latents, or a text."""
    looked_up = (user for user in _users(node) if user.target is not ops.shard)
    return not node.meta[SPEC].dtype.is_floating_point and any(map(_looks_up, looked_up))


def _looks_up(user: fx.Node) -> bool:
    """Whether it is an `embedding`, or a weight indexed by numbers."""
    if getattr(user.target, "overloadpacket", None) is aten.index:
        return is_weight(user.args[0]) and len(user.args[1]) == 1  # type: ignore[arg-type]
    return getattr(user.target, "overloadpacket", None) is aten.embedding


def _users(node: fx.Node) -> Iterator[fx.Node]:
    yield from node.users
    for cut in _cuts(node):
        yield from cut.users


def latents(program: Program, mesh: Mesh) -> dict[str, PatchedDim]:
    """The inputs that are divided over time just like an output, so that a scheduler can work patch by patch, and how;
    every patch has a part of them, but for the first one, which may have enough to do with what goes with it. Where
    none is, those whose other dims are an output's and of which that has more or less rows (a text that is joined in
    front of them, or a reference left out); else the codes of which an output has the scores, that is one dim more."""
    outputs = {value: cut for value in results_of(program.graph) if (cut := _output_cut(value, mesh)) is not None}
    scores = set(itertools.chain.from_iterable(_codes_of(value, cut) for value, cut in outputs.items()))
    same, more, codes = dict[str, PatchedDim](), dict[str, PatchedDim](), dict[str, PatchedDim]()
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        for shard in _cuts(node):
            mine = _patch_dim(shard.meta[LAYOUT], mesh)
            if mine is None or not all(mine.partition.sizes[rank] for rank in _later(mesh)):
                continue
            if not node.meta[SPEC].dtype.is_floating_point:
                if _is_code(node) and (node.meta[SPEC].shape, mine) in scores:
                    codes[node.name] = mine
                continue
            if mine in outputs.values():
                same[node.name] = mine
            for value, cut in outputs.items():
                alike = without(node.meta[SPEC].shape, mine.dim) == without(value.meta[SPEC].shape, cut.dim)
                shift = _shift(mine, cut, mesh) if alike else None
                if shift is not None:
                    more[node.name] = mine._replace(shift=shift)
    return same or more or codes


def _later(mesh: Mesh) -> list[int]:
    """The virtual ranks of all patches but the first."""
    return [rank for rank in range(mesh.world_size) if mesh.index(rank, (TIME,))]


def _output_cut(value: fx.Node, mesh: Mesh) -> PatchedDim | None:
    while ops.is_relayout(value.target) and not is_divided_over_time(value, mesh):
        value = operands(value)[0]
    return _patch_dim(value.meta[LAYOUT], mesh)


def _codes_of(value: fx.Node, cut: PatchedDim) -> Iterator[tuple[tuple[int, ...], PatchedDim]]:
    """Shape and division of what an output may have the scores of, along each of its other dims."""
    shape = value.meta[SPEC].shape
    for dim in range(len(shape)):
        if dim != cut.dim:
            yield without(shape, dim), cut._replace(dim=cut.dim - (cut.dim > dim))


def _shift(mine: PatchedDim, output: PatchedDim, mesh: Mesh) -> int | None:
    """By how much the rows of an input are further on in an output that has others besides: each with the same patch,
    and of every later patch some."""
    own, there = mine.partition, output.partition
    if mine.dim != output.dim:
        return None
    firsts = {there.parts[rank].runs[0][0] - own.parts[rank].runs[0][0] for rank in _later(mesh) if there.sizes[rank]}
    for shift in sorted({0, there.size - own.size, *firsts}, key=abs):
        meet = [part.select(-shift, there.size - shift)[0] for part in own.parts]
        inside = all(part.within(whole).size == part.size for part, whole in zip(meet, there.parts, strict=True))
        if inside and all(meet[rank].size for rank in _later(mesh)):
            return shift
    return None


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


def _patch_dim(layout: Layout, mesh: Mesh) -> PatchedDim | None:
    """The dim that is divided over time, with what the ranks of a patch have together, in natural order."""
    for d, dim in enumerate(layout.dims):
        dividing = mesh.dividing_dims(dim)
        together = mesh.gathered(dim, dividing - {TIME}) if dim is not None and TIME in dividing else None
        if together is not None:
            return PatchedDim(d, together.map(together.size, lambda part: Indices.of_runs(sorted(part.runs))))
    return None
