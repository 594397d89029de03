"""`find-tokens`: where do the token streams begin that become the queries of attention?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from xdit_ir import ops
from xdit_ir.cost import program_flops
from xdit_ir.layout import Layout
from xdit_ir.mesh import Mesh
from xdit_ir.program import SPEC, Program, TokenAxis, is_block_call
from xdit_ir.propagate import Propagation
from xdit_ir.rules.base import operands
from xdit_ir.rules.views import groups

PROBE = Mesh.of(ulysses=2)
aten = torch.ops.aten


@dataclass(frozen=True)
class FindTokens:
    """Cut every candidate dimension in two on a probe mesh, follow the rules, and keep those that reach a query.

    Candidates are the dimensions of what flows from the prologue into block calls, and of the inputs of a program
    that has attentions elsewhere. The best is first: the one that leaves the slowest rank the fewest FLOPs. Last come
    streams that reach no query, but whose work before the blocks can be divided and gathered.
    """

    name: str = "find-tokens"

    def apply(self, program: Program) -> Program:
        """The program with `tokens` filled in."""
        probe = Propagation(program, PROBE)
        whole = program_flops(program, None)[0]
        found: list[tuple[bool, int, int, TokenAxis]] = []
        for node in _candidates(program.graph):
            ndim = len(node.meta[SPEC].shape)
            for dim, size in enumerate(node.meta[SPEC].shape):
                if size < 2:
                    continue
                cut = Layout.whole(ndim).with_dims({dim: PROBE.divide(size, ("ulysses",))})
                axis = TokenAxis(node.name, dim, size)
                tried = probe.attempt({node.name: (cut,)})
                if "ulysses" not in tried.attention_mesh_dims(keys=False):
                    if not 0 < dim < ndim - 1:
                        continue
                    axis = replace(axis, gathered=True)
                    tried = probe.attempt({node.name: (cut, Layout.whole(ndim))})
                work = max(tried.flops())
                if work < whole:
                    found.append((axis.gathered, work, len(found), axis))
        axes = [_detailed(program, axis) for *_, axis in sorted(found)]
        return program.replace(tokens=tuple(axes))


def _detailed(program: Program, axis: TokenAxis) -> TokenAxis:
    return replace(axis, units=_units(program, axis.size), segments=_segments(program, axis.size))


def _candidates(graph: fx.Graph) -> list[fx.Node]:
    """Floating-point values that enter block calls and do not come out of one, and the inputs, if there are
    attentions outside of blocks."""
    after: set[fx.Node] = set()
    entering: dict[fx.Node, None] = {}
    for node in graph.nodes:
        sources = operands(node)
        if is_block_call(node):
            entering |= dict.fromkeys(source for source in sources if source not in after)
        if is_block_call(node) or any(source in after for source in sources):
            after.add(node)
    chosen = list(entering)
    if any(node.target is ops.attention for node in graph.nodes):
        chosen += [node for node in graph.nodes if node.op == "placeholder" and node not in entering]
    return [node for node in chosen if node.meta[SPEC].dtype.is_floating_point and node.op != "get_attr"]


def _graphs(program: Program) -> Iterator[fx.Graph]:
    yield program.graph
    yield from (block.graph for block in program.blocks.values())


def _units(program: Program, size: int) -> tuple[int, ...]:
    """Inner factors of the views that split or make a dimension of this size."""
    found: set[int] = set()
    for graph in _graphs(program):
        for node in graph.nodes:
            if node.target not in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
                continue
            shapes = operands(node)[0].meta[SPEC].shape, node.meta[SPEC].shape
            if 0 in shapes[0]:
                continue
            for pair in groups(*shapes):
                sides = [[shape[d] for d in dims] for shape, dims in zip(shapes, pair, strict=True)]
                for one, many in (sides, reversed(sides)):
                    if [n for n in one if n != 1] == [size]:
                        found |= {math.prod(many[i:]) for i in range(1, len(many))}
    return tuple(sorted(unit for unit in found if 1 < unit < size))


def _segments(program: Program, size: int) -> tuple[tuple[int, ...], ...]:
    """Ways in which joins and splits cut a dimension of this size."""
    found: set[tuple[int, ...]] = set()
    for graph in _graphs(program):
        for node in graph.nodes:
            packet = getattr(node.target, "overloadpacket", None)
            if packet in (aten.cat, aten.split, aten.split_with_sizes) and not node.kwargs:
                dim = node.args[-1] if isinstance(node.args[-1], int) and packet is not aten.split else 0
                many = node.meta[SPEC] if packet is not aten.cat else [s.meta[SPEC] for s in operands(node)]
                sizes = tuple(spec.shape[dim] for spec in many)
                if sum(sizes) == size and len(sizes) < 4:
                    found.add(sizes)
    return tuple(sorted(found))
