"""`align-samples`: samples that were put together with the same rows at different places get them at the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, copy_graph, operands, remove_dead, with_operands
from xdit_ir.ir.partition import Indices, IntArray
from xdit_ir.ir.program import SPEC, Program, is_block_call
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.row_sources import RowRun, rows_at, rows_of, sample_taken, samples_of
from xdit_ir.passes.sample_orders import Orders, unaligned
from xdit_ir.passes.sample_region import Region, RowDims, region_of

aten = torch.ops.aten


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
        for name, orders in [(root.name, orders) for root, orders in unaligned(program)]:
            root = next((node for node in program.graph.nodes if node.name == name), None)
            if root is None or name in touched:
                continue
            region = region_of(program, root, orders)
            if any(is_block_call(node) or node.target in ops.ATTENTIONS for node in region):
                touched |= {value.name for node in region for value in (node, *operands(node))}
                program = _aligned(program, region, orders)
        return program


def _aligned(program: Program, region: Region, orders: Orders) -> Program:
    """The program in which what goes into the region is put in order, and what comes out of it is put back."""
    graph = copy_graph(program.graph)
    copies = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    back = tuple(Indices.range(0, order.size).map(_inverse(order)) for order in orders)
    made: dict[tuple[fx.Node, RowDims], fx.Node] = {}
    for node in program.graph.nodes:
        sources = operands(node)
        have = [region[source][-1] if source in region else None for source in sources]
        want = region[node][:-1] if node in region else [None] * len(sources)
        if list(want) == have:
            continue
        emitter, new = Emitter(graph, copies[node]), [copies[source] for source in sources]
        for place, (source, here, there) in enumerate(zip(sources, have, want, strict=True)):
            if (dims := there or here) is None or here == there:
                continue
            if (source, dims) not in made:
                made[source, dims] = _reordered(emitter, copies[source], dims, orders if there else back)
            new[place] = made[source, dims]
        copies[node].args, copies[node].kwargs = with_operands(copies[node], new)
    remove_dead(graph)
    for node in list(graph.nodes):
        _simplify(graph, node)
    remove_dead(graph)
    return program.replace(graph=graph)


def _inverse(order: Indices) -> Callable[[IntArray], IntArray]:
    return lambda places: np.argsort(order.array)[places]


def _reordered(emitter: Emitter, value: fx.Node, dims: RowDims, orders: Orders) -> fx.Node:
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
