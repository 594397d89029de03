"""`align-samples`: samples that were put together with the same rows at different places get them at the same ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, copy_graph, operands, placeholders, remove_dead, with_operands
from xdit_ir.ir.hoist import descendants
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import BATCH, Mesh
from xdit_ir.ir.partition import Indices, IntArray, Partition
from xdit_ir.ir.program import SPEC, Program, is_block_call
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.row_sources import RowRun, Rows, rows_at, rows_of, sample_taken, samples_of
from xdit_ir.passes.views import VIEWS
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall, as_layouts, same_call
from xdit_ir.sharding.layout_graph import LayoutNode
from xdit_ir.sharding.propagate import Propagation

aten = torch.ops.aten
Orders = tuple[Indices, ...]
FAR = 6  # operators that are compared


@dataclass(frozen=True)
class AlignSamples:
    """Where the samples of a joint stream have their image rows at different places, because their texts differ in
    length, the rows of each sample are put in an order in which the same rows lie at the same places. A patch of the
    stream then has the same image rows of every sample.

    That is done where all that follows treats samples apart and rows alike, in any order: what it gives is then the
    same but for the order of its rows. Both follow from the rules: the stream divided by samples, and in another order,
    goes through these operators and blocks without a change of layout.
    """

    name: ClassVar[str] = "align-samples"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def apply(self, program: Program) -> Program:
        """The program with its streams in order; the same object where they are."""
        touched: set[str] = set()
        for name, orders in [(root.name, orders) for root, orders in _unaligned(program)]:
            root = next((node for node in program.graph.nodes if node.name == name), None)
            if root is None or name in touched:
                continue
            region = _region(program, root, orders)
            if any(is_block_call(node) or node.target in ops.ATTENTIONS for node in region):
                touched |= {value.name for node in region for value in (node, *operands(node))}
                program = _aligned(program, region, orders)
        return program


def _unaligned(program: Program) -> Iterator[tuple[fx.Node, Orders]]:
    """Values put together from samples of which some have the same rows at other places, and orders that mend it."""
    floating = descendants(node for node in placeholders(program.graph) if node.meta[SPEC].dtype.is_floating_point)
    for node in program.graph.nodes:
        samples = samples_of(node) if node in floating else None
        if not samples or len(samples) < 2 or len(node.meta[SPEC].shape) < 3:
            continue
        if all(user.target is aten.select_scatter.default for user in node.users):
            continue  # not yet complete
        orders = _orders([rows_of(one, 0, node.meta[SPEC].shape[1]) for one in samples])
        if orders is not None:
            yield node, orders


def _orders(samples: Sequence[Rows]) -> Orders | None:
    """For each sample the order in which the rows that all have lie where the one with the least padding has them, and
    the others in between as they come; None where they lie so, or all have none."""
    places = [_places(rows) for rows in samples]
    first = max(places, key=len)
    shared = [row for row in first if all(row in other for other in places)]
    wanted = {first[row]: row for row in shared}
    if all(other[row] == first[row] for other in places for row in shared):
        return None
    size, orders = sum(run.length for run in samples[0]), []
    for mine in places:
        taken = {mine[row] for row in shared}
        rest = (place for place in range(size) if place not in taken)
        order = [mine[wanted[place]] if place in wanted else next(rest) for place in range(size)]
        orders.append(Indices.of_runs((place, 1) for place in order))
    return tuple(orders)


Row = tuple[Any, int, int]  # of what, which, and of how many such in this sample


def _places(rows: Rows) -> dict[Row, int]:
    """Where each row lies that is no padding: a row of a value of all samples, or of one that is computed alike. What
    rows are taken for equal only decides about the order."""
    found: dict[Row, int] = {}
    place = 0
    for run in rows:
        if run.source is not None:
            of = run.source if run.sample is not None else _form(run.source, FAR)
            again = next(i for i in itertools.count() if (of, run.start, i) not in found)
            found |= {(of, run.start + i, again): place + i for i in range(run.length)}
        place += run.length
    return found


def _form(node: fx.Node, far: int) -> Any:
    """How a value is computed, from inputs of which types, as far back."""
    if node.op != "call_function" or not far:
        return node.target if node.op == "get_attr" else node.meta.get(SPEC)
    return node.target, node.meta.get(SPEC), tuple(_form(source, far - 1) for source in operands(node))


@dataclass(frozen=True)
class _Dims:
    """Which dims of a value are samples and rows."""

    samples: int
    rows: int


# Of each operand, the result's last; None for an operand without rows.
Region = dict[fx.Node, tuple[_Dims | None, ...]]


def _region(program: Program, root: fx.Node, orders: Orders) -> Region:
    """What is made of a value such that its samples stay apart and its rows may be in any order."""
    shape = root.meta[SPEC].shape
    apart, whole = Mesh.of(**{BATCH: shape[0]}), Layout.whole(len(shape))
    by_samples = _Run.of(program, apart, root, whole.with_dims({0: apart.divide(shape[0], (BATCH,))}))
    by_rows = [
        _Run.of(program, Mesh.of(), root, whole.with_dims({1: Partition(shape[1], (order,))}))
        for order in dict.fromkeys(orders)
        if not order.is_whole(shape[1])
    ]
    region: Region = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and any(source is root or source in region for source in operands(node)):
            dims = _dims(by_samples.moved(node), [run.moved(node) for run in by_rows])
            if dims is not None:
                region[node] = dims
    return region


Moved = tuple[int | None, ...] | None


def _dims(by_samples: Moved, by_rows: Sequence[Moved]) -> tuple[_Dims | None, ...] | None:
    first = by_rows[0]
    if by_samples is None or first is None or first[-1] is None or any(one != first for one in by_rows):
        return None
    pairs = list(zip(by_samples, first, strict=True))
    if any(rows is not None and samples in (None, rows) for samples, rows in pairs):
        return None
    return tuple(None if rows is None or samples is None else _Dims(samples, rows) for samples, rows in pairs)


@dataclass(frozen=True)
class _Run:
    """How a value in one layout, along one of its dims, goes through the program."""

    propagation: Propagation
    wanted: Partition
    steps: dict[fx.Node, LayoutNode]

    @staticmethod
    def of(program: Program, mesh: Mesh, root: fx.Node, layout: Layout) -> _Run:
        propagation = Propagation(program, mesh)
        steps = {step.node: step for step in propagation.forward({root.name: (layout,)}).steps if not step.relayout}
        return _Run(propagation, next(dim for dim in layout.dims if dim is not None), steps)

    def moved(self, node: fx.Node) -> Moved:
        """The dim of each operand and (last) of the result along which they are in that layout; None where one is in
        another, or something has to be changed for it."""
        step = self.steps[node]
        if not self._is_unchanged(step):
            return None
        found = [self._dim(layout) for layout in (*(source.layout for source in step.sources), step.layout)]
        return None if -1 in found else tuple(found)

    def _dim(self, layout: Any) -> int | None:
        """-1: in another layout."""
        found = {self._dim_of(one) for one in as_layouts(layout)}
        return found.pop() if len(found) == 1 else -1

    def _dim_of(self, layout: Layout) -> int | None:
        divided = [dim for dim, part in enumerate(layout.dims) if part is not None]
        if not divided and not layout.partial:
            return None
        same = len(divided) == 1 and layout.dims[divided[0]] == self.wanted and not layout.partial
        return divided[0] if same else -1

    def _is_unchanged(self, step: LayoutNode) -> bool:
        """Whether it is computed by the operators that stand there, none of which is told where its rows are."""
        if step.body is not None:
            return all(map(self._is_unchanged, self.propagation.bodies[step.body].draft.steps))
        if step.relayout:
            return _is_repeated(step)
        if step.fallback:
            return False
        if not step.is_operator or self.propagation.mesh.world_size > 1:
            return True
        call = OpCall(step.node, self.propagation.mesh, tuple(source.layout for source in step.sources))
        local = infer(call).local
        same = [same_call(call), (step.node.target, step.node.args, step.node.kwargs)]
        if step.node.target in VIEWS:
            same.append((aten.reshape.default, (step.node.args[0], list(call.out.shape)), {}))
        return local is None or local(0) in same


def _is_repeated(step: LayoutNode) -> bool:
    """Whether a change of layout puts equal rows in another order."""
    if step.node.target is not aten.expand.default or step.sources[0].relayout:
        return False
    [source] = operands(step.node)
    lengths = (*[1] * (len(step.spec.shape) - len(source.meta[SPEC].shape)), *source.meta[SPEC].shape)
    return all(lengths[dim] == 1 for dim, part in enumerate(step.layout.dims) if part is not None)


def _aligned(program: Program, region: Region, orders: Orders) -> Program:
    """The program in which what goes into the region is put in order, and what comes out of it is put back."""
    graph = copy_graph(program.graph)
    copies = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    back = tuple(Indices.range(0, order.size).map(_inverse(order)) for order in orders)
    made: dict[tuple[fx.Node, _Dims], fx.Node] = {}
    for node in program.graph.nodes:
        inside, sources = region.get(node, ()), operands(node)
        if inside:
            wanted = [None if source in region else dims for source, dims in zip(sources, inside, strict=False)]
        else:
            wanted = [region[source][-1] if source in region else None for source in sources]
        if not any(wanted):
            continue
        emitter, new = Emitter(graph, copies[node]), [copies[source] for source in sources]
        for place, (source, dims) in enumerate(zip(sources, wanted, strict=True)):
            if dims is not None and (source, dims) not in made:
                made[source, dims] = _reordered(emitter, copies[source], dims, orders if inside else back)
            new[place] = new[place] if dims is None else made[source, dims]
        copies[node].args, copies[node].kwargs = with_operands(copies[node], new)
    remove_dead(graph)
    for node in list(graph.nodes):
        _simplify(graph, node)
    remove_dead(graph)
    return program.replace(graph=graph)


def _inverse(order: Indices) -> Callable[[IntArray], IntArray]:
    return lambda places: np.argsort(order.array)[places]


def _reordered(emitter: Emitter, value: fx.Node, dims: _Dims, orders: Orders) -> fx.Node:
    """The value whose samples have their rows in these orders."""
    known = samples_of(value) if dims.samples == 0 else None
    parts = []
    for sample, order in enumerate(orders):
        if known is None or len(known[sample].meta[SPEC].shape) == len(value.meta[SPEC].shape):
            part = emitter.emit(aten.select.int, value, dims.samples, sample)
        else:
            part = known[sample]
        parts.append(_joined(emitter, part, dims.rows - (dims.rows > dims.samples), order))
    return emitter.emit(aten.stack.default, parts, dims.samples)


def _joined(emitter: Emitter, part: fx.Node, dim: int, order: Indices) -> fx.Node:
    """A sample whose rows are in this order, joined from what they come from; padding belongs to what is before it."""
    spec = part.meta[SPEC]
    size = spec.shape[dim]
    rows = rows_of(part, dim, size)
    if len(rows) == 1 or any(run.source is not None and run.source.meta[SPEC].dtype != spec.dtype for run in rows):
        return part if order.is_whole(size) else emitter.emit(ops.take, part, dim, order.runs)
    pieces: list[fx.Node] = []
    ahead: list[RowRun] = []
    for run in rows_at(rows, order.runs):
        if run.source is None and not pieces:
            ahead.append(run)
        elif run.source is None:
            pieces[-1] = _padded(emitter, pieces[-1], dim, run, behind=True)
        else:
            piece = run.source if run.sample is None else emitter.emit(aten.select.int, run.source, 0, run.sample)
            if run.length < piece.meta[SPEC].shape[dim]:
                piece = emitter.emit(aten.slice.Tensor, piece, dim, run.start, run.start + run.length)
            for before in reversed(ahead):
                piece = _padded(emitter, piece, dim, before, behind=False)
            ahead = []
            pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else emitter.emit(aten.cat.default, pieces, dim)


def _padded(emitter: Emitter, x: fx.Node, dim: int, rows: RowRun, *, behind: bool) -> fx.Node:
    amounts = [0] * (2 * (len(x.meta[SPEC].shape) - 1 - dim))
    amounts += [0, rows.length] if behind else [rows.length, 0]
    return emitter.emit(aten.constant_pad_nd.default, x, amounts, rows.fill)


def _simplify(graph: fx.Graph, node: fx.Node) -> None:
    """A sample of what was put together from samples; a slice of rows that were put in order."""
    args: Any = node.args
    found = sample_taken(node)
    if found is not None and found[0].target is aten.stack.default and found[0].args[1:] == (found[1],):
        node.replace_all_uses_with(operands(found[0])[found[2]])
    if node.target is not aten.slice.Tensor or args[0].target is not ops.take:
        return
    given = bound_arguments(node)
    source, dim, runs = args[0].args
    if given["dim"] % len(node.meta[SPEC].shape) != dim or given["step"] != 1:
        return
    start, end, _ = slice(given["start"], given["end"]).indices(args[0].meta[SPEC].shape[dim])
    kept, emitter = Indices(tuple(runs)).at(Indices.range(start, end)).runs, Emitter(graph, node)
    if len(kept) == 1:
        [(first, length)] = kept
        new = emitter.emit(aten.slice.Tensor, source, dim, first, first + length)
    else:
        new = emitter.emit(ops.take, source, dim, kept)
    node.replace_all_uses_with(new)
