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


def latents(program: Program, mesh: Mesh) -> frozenset[str]:
    """The inputs that are divided over time just like an output, so that a scheduler can work patch by patch; every
    patch has a part of them, but for the first one, which may have enough to do with what goes with it. Where none is,
    the codes of which an output has the scores, that is one dim more."""
    shapes, scores = set(), set()
    for value in results_of(program.graph):
        while ops.is_relayout(value.target) and not is_divided_over_time(value, mesh):
            value = operands(value)[0]
        cut, shape = _patch_dims(value.meta[LAYOUT], mesh), value.meta[SPEC].shape
        shapes.add(cut)
        for dim in range(len(shape)):
            if all(d != dim for d, _ in cut):
                scores.add((without(shape, dim), tuple((d - (d > dim), one) for d, one in cut)))
    found, codes = set(), set()
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        cuts = {_patch_dims(cut.meta[LAYOUT], mesh) for cut in _cuts(node)}
        cuts = {cut for cut in cuts if cut and _is_shared(cut, mesh)}
        if node.meta[SPEC].dtype.is_floating_point and cuts & shapes:
            found.add(node.name)
        elif _is_code(node) and any((node.meta[SPEC].shape, cut) in scores for cut in cuts):
            codes.add(node.name)
    return frozenset(found or codes)


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
        cut = dict(_time_dims(value.meta[LAYOUT], mesh))
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


def _is_shared(cut: tuple[tuple[int, Partition | None], ...], mesh: Mesh) -> bool:
    later = [rank for rank in range(mesh.world_size) if mesh.index(rank, (TIME,))]
    return all(dim is not None and all(dim.sizes[rank] for rank in later) for _, dim in cut)


def _time_dims(layout: Layout, mesh: Mesh) -> tuple[tuple[int, Partition | None], ...]:
    return tuple((d, dim) for d, dim in enumerate(layout.dims) if TIME in mesh.dividing_dims(dim))


def _patch_dims(layout: Layout, mesh: Mesh) -> tuple[tuple[int, Partition | None], ...]:
    """The same, with what the ranks of a patch have together."""
    return tuple(
        (d, dim if dim is None else mesh.gathered(dim, mesh.dividing_dims(dim) - {TIME}))
        for d, dim in _time_dims(layout, mesh)
    )
