"""Attention of samples packed into one sequence: of each by itself, where a mask is known to tell them apart."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import replace

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import bound_arguments, copy_graph, remove_dead
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.known_integers import Known, known_integers

aten = torch.ops.aten
MOST = 32  # samples and their paddings; more are windows
Lengths = tuple[list[int], list[int]]


def told_apart(program: Program) -> Program | None:
    """The program without masks whose contents are known and that let each sample of queries see all of its own keys,
    and none of another's; None where there is no such mask."""
    known = known_integers(program)
    graphs = {name: _rewritten(block.graph, known) for name, block in program.blocks.items()}
    outer = _rewritten(program.graph, known)
    if outer is None and not any(graphs.values()):
        return None
    blocks = {name: replace(block, graph=graphs[name] or block.graph) for name, block in program.blocks.items()}
    return program.replace(graph=outer or program.graph, blocks=blocks)


def _rewritten(source: fx.Graph, known: Known) -> fx.Graph | None:
    masks = (bound_arguments(node)["mask"] for node in source.nodes if node.target is ops.attention)
    if not any(mask in known for mask in masks):
        return None
    graph, changed = copy_graph(source), False
    for old, node in zip(list(source.nodes), list(graph.nodes), strict=True):
        mask = bound_arguments(old)["mask"] if old.target is ops.attention else None
        lengths = _lengths(known[mask]) if mask in known else None
        if lengths is not None and not bound_arguments(node)["is_causal"]:
            node.replace_all_uses_with(_each(Emitter(graph, node), lengths))
            changed = True
    remove_dead(graph)
    return graph if changed else None


def _lengths(mask: torch.Tensor) -> Lengths | None:
    """How many queries and keys each sample has, by a mask [..., queries, keys]."""
    count, width = mask.shape[-2:]
    if mask.dtype != torch.bool or math.prod(mask.shape) != count * width or not count:
        return None
    rows = mask.reshape(count, width)
    starts = [0, *((rows[1:] != rows[:-1]).any(dim=1).nonzero().flatten() + 1).tolist()]
    seen = rows[starts]
    ends = [0, *seen.sum(dim=1).cumsum(dim=0).tolist()]
    own = torch.zeros_like(seen)
    for row, (start, end) in enumerate(itertools.pairwise(ends)):
        own[row, start:end] = True
    empty = any(start == end for start, end in itertools.pairwise(ends))
    if not 1 < len(starts) <= MOST or empty or ends[-1] != width or not seen.equal(own):
        return None
    return [b - a for a, b in itertools.pairwise([*starts, count])], [b - a for a, b in itertools.pairwise(ends)]


def _each(emitter: Emitter, lengths: Lengths) -> fx.Node:
    """The attention at the emitter's node, sample by sample."""
    given = bound_arguments(emitter.node)
    options = {name: given[name] for name in ("scale", "enable_gqa") if given[name] not in (None, False)}
    dim = len(emitter.node.meta[SPEC].shape) - 2
    sizes = (("q", lengths[0]), ("k", lengths[1]), ("v", lengths[1]))
    parts = [emitter.emit(aten.split_with_sizes.default, given[name], size, dim) for name, size in sizes]
    of_samples = [[emitter.emit(operator.getitem, part, place) for part in parts] for place in range(len(lengths[0]))]
    made = [emitter.emit(ops.attention, *sample, **options) for sample in of_samples]
    return emitter.emit(aten.cat.default, made, dim)
