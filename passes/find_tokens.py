"""`find-tokens`: where do the token streams begin that become the queries of attention?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import all_graphs, bound_arguments, operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.program import SPEC, Program, TokenAxis
from xdit_ir.passes.streams import leading_values
from xdit_ir.rules.views import groups
from xdit_ir.sharding.assignment import Assignment
from xdit_ir.sharding.branches import Branches
from xdit_ir.sharding.cost import program_flops
from xdit_ir.sharding.propagate import Propagation

PROBE = Mesh.of(ulysses=2)
aten = torch.ops.aten
PADS = (aten.pad.default, aten.constant_pad_nd.default)
JOINS = (aten.cat, aten.concat, aten.concatenate)
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
SLICE = aten.slice.Tensor


@dataclass(frozen=True)
class FindTokens:
    """Cut every candidate dimension in two on a probe mesh, follow the rules, and keep those that reach a query.

    Candidates are the dimensions of what flows from the prologue into block calls, and those of the inputs that no
    such stream divides. The best is first: the one that leaves the slowest rank the fewest FLOPs. Last come streams
    that reach no query, but whose work can be divided nevertheless. Where streams are `known`, of a program that is the
    same but for sizes, they are taken over if the best of them is one here too. Nothing is looked for in a program of
    many small parts, which are shared out (`share-branches`).
    """

    name: ClassVar[str] = "find-tokens"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})

    known: Streams | None = field(default=None, repr=False)

    def apply(self, program: Program) -> Program:
        """The program with `tokens` filled in."""
        if Branches.of(program).are_fine:
            return program.replace(tokens=())
        search = _Search(program)
        axes = search.among(self.known) if self.known is not None else []
        return program.replace(tokens=tuple(_detailed(program, axis) for axis in axes or search.all()))


@dataclass(frozen=True)
class Streams:
    """The token streams of a program, for others that are the same but for sizes: the best first, by the place of the
    value among the leading ones, the dim, and whether it is a context; `short` are dims too short to be divided."""

    axes: tuple[tuple[int, int, bool], ...]
    short: frozenset[tuple[int, int]]

    @staticmethod
    def of(analysed: Program) -> Streams:
        """Those that were found."""
        leading = leading_values(analysed.graph)
        places = {node.name: place for place, node in enumerate(leading)}
        axes = ((places[axis.value], axis.dim, axis.is_context) for axis in analysed.tokens)
        return Streams(tuple(axes), _short(leading))


def _short(leading: Sequence[fx.Node]) -> frozenset[tuple[int, int]]:
    shapes = enumerate(node.meta[SPEC].shape for node in leading)
    return frozenset((place, dim) for place, shape in shapes for dim, size in enumerate(shape) if size < 2)


class _Search:
    """For the streams of one program."""

    def __init__(self, program: Program) -> None:
        self._leading = leading_values(program.graph)
        self._probe, self._whole = Propagation(program, PROBE), program_flops(program, None)[0]

    def all(self) -> list[TokenAxis]:
        """Every one, the best first."""
        found: list[tuple[bool, int, int, TokenAxis]] = []
        reaching: list[Assignment] = []
        for node in self._leading:
            if node.op == "placeholder" and any(_has_divided(one, node) for one in reaching):
                continue
            for dim, size in enumerate(node.meta[SPEC].shape):
                axis, tried = _probed(self._probe, node, dim) if size > 1 else (None, None)
                if axis is None or tried is None or max(tried.flops()) >= self._whole:
                    continue
                found.append((axis.is_context, max(tried.flops()), len(found), axis))
                if not axis.is_context:
                    reaching.append(tried)
        return [axis for *_, axis in sorted(found)]

    def among(self, known: Streams) -> list[TokenAxis]:
        """The known ones; none of them if the best is no stream here, or other dims are short."""
        if not known.axes or known.short != _short(self._leading):
            return []
        found = [(self._leading[place], dim, is_context) for place, dim, is_context in known.axes]
        axes = [TokenAxis(node.name, dim, node.meta[SPEC].shape[dim], is_context=late) for node, dim, late in found]
        axis, tried = _probed(self._probe, *found[0][:2])
        return axes if axis == axes[0] and tried is not None and max(tried.flops()) < self._whole else []


def _probed(probe: Propagation, node: fx.Node, dim: int) -> tuple[TokenAxis, Assignment | None]:
    """The stream and what it divides; nothing where it reaches no query and is no dim that could be tokens."""
    shape = node.meta[SPEC].shape
    cut = Layout.whole(len(shape)).with_dims({dim: PROBE.divide(shape[dim], SEQUENCE)})
    axis = TokenAxis(node.name, dim, shape[dim])
    tried = probe.attempt({node.name: (cut,)})
    if tried.attention_mesh_dims("queries"):
        return axis, tried
    axis = replace(axis, is_context=True)
    if node.op == "placeholder":
        samples = dim == 0 and tried.attention_mesh_dims("batch")  # of another dim: windows of tokens
        features = tried.sums_up() or dim == len(shape) - 1 > 0 or samples
        return axis, None if features and not tried.divides_space() else tried
    inner = 0 < dim < len(shape) - 1
    return axis, probe.attempt({node.name: (cut, Layout.whole(len(shape)))}) if inner else None


def _has_divided(attempt: Assignment, node: fx.Node) -> bool:
    layout = attempt.layout(node.name)
    return layout is not None and not layout.is_whole


def divides(attempt: Assignment, name: str, dim: int) -> bool:
    """Whether a dim of the value of this name is divided, or nothing is left of the value."""
    layout = attempt.layout(name)
    return layout is None or layout.dims[dim] is not None


def _detailed(program: Program, axis: TokenAxis) -> TokenAxis:
    segments = {*segments_of(program, axis.size), *_slices_of(program, axis.size)}
    return replace(axis, units=units_of(program, axis.size), segments=tuple(sorted(segments)))


def _calls_of(program: Program, targets: Sequence[Any]) -> Iterator[fx.Node]:
    """The calls of these operators in all graphs of a program."""
    for graph in program.graphs:
        for target in targets:
            yield from graph.find_nodes(op="call_function", target=target)


def units_of(program: Program, size: int) -> tuple[int, ...]:
    """Inner factors of the views that split or make a dimension of this size."""
    found: set[int] = set()
    for node in _calls_of(program, RESHAPES):
        shapes = operands(node)[0].meta[SPEC].shape, node.meta[SPEC].shape
        if 0 in shapes[0]:
            continue
        for pair in groups(*shapes):
            sides = [[shape[d] for d in dims] for shape, dims in zip(shapes, pair, strict=True)]
            for one, many in (sides, reversed(sides)):
                if [n for n in one if n != 1] == [size]:
                    found |= {math.prod(many[i:]) for i in range(1, len(many))}
    return tuple(sorted(unit for unit in found if 1 < unit < size))


def segments_of(program: Program, size: int) -> tuple[tuple[int, ...], ...]:
    """Ways in which joins and splits cut a dimension of this size."""
    return tuple(sorted(sizes for sizes in _parts_of(program, size) if len(sizes) < 4))


def borders_of(program: Program, size: int) -> set[int]:
    """Where joins, splits and slices cut a dimension of this size."""
    every = [*_parts_of(program, size), *_slices_of(program, size)]
    return {border for sizes in every for border in itertools.accumulate(sizes)} - {size}


def _parts_of(program: Program, size: int) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    for _, graph, _ in all_graphs(program):
        for node in graph.nodes:
            packet = getattr(node.target, "overloadpacket", None)
            if packet in (*JOINS, aten.split, aten.split_with_sizes) and not node.kwargs:
                dim = 0 if packet is aten.split else joined_dim(node)
                many = node.meta[SPEC] if packet not in JOINS else [s.meta[SPEC] for s in operands(node)]
                sizes = tuple(spec.shape[dim] for spec in many)
                if sum(sizes) == size:
                    found.add(sizes)
    return found


def joined_dim(node: fx.Node) -> int:
    """The dim along which a join or a split works."""
    return node.args[-1] if isinstance(node.args[-1], int) else 0


def _slices_of(program: Program, size: int) -> set[tuple[int, ...]]:
    """How slices cut a dimension of this size, where views make rows of what is taken: the rest may be padding."""
    nodes = _calls_of(program, (SLICE,))
    found = (one for one in map(_taken, nodes) if one is not None and sum(one) == size)
    return {tuple(filter(None, one)) for one in found if units_of(program, one[1])}


def parts_outside(program: Program, size: int) -> set[tuple[int, ...]]:
    """How slices and pads of the outer graph cut a dimension of this size: what is taken, or was there before."""
    found = (one for node in program.graph.nodes for one in (_taken(node), _padded(node)))
    return {tuple(filter(None, one)) for one in found if one is not None and sum(one) == size}


def _taken(node: fx.Node) -> tuple[int, int, int] | None:
    """Before, in and behind what a slice takes of a dimension."""
    if node.target is not SLICE:
        return None
    given = bound_arguments(node)
    size, taken = (value.meta[SPEC].shape[given["dim"]] for value in (operands(node)[0], node))
    start = given["start"] or 0
    start = max(start + size, 0) if start < 0 else start
    return (start, taken, size - start - taken) if given["step"] == 1 and 0 < taken < size else None


def _padded(node: fx.Node) -> tuple[int, int, int] | None:
    """Before, of and behind what a pad makes longer, if that is one dimension."""
    if node.target not in PADS:
        return None
    widths: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    places = [at for at in range(0, len(widths), 2) if widths[at] or widths[at + 1]]
    if len(places) != 1 or min(widths) < 0:
        return None
    [at] = places
    shape = operands(node)[0].meta[SPEC].shape
    return widths[at], shape[len(shape) - 1 - at // 2], widths[at + 1]
