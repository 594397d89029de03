"""What is left of a program when some rows of an input are not there: asked of the rules, as of a rank without them.

Two ranks are imagined: the first has the rows that are kept, and all of everything else; the second has the other rows.
Where the rules let the first rank go without an exchange, it needs nothing of these rows, and its program is the one
without them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs, bound_arguments, operands
from xdit_ir.ir.layout import Layout, part_of
from xdit_ir.ir.mesh import ULYSSES, Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall, OpSharding
from xdit_ir.rules.norms import divided_statistics
from xdit_ir.rules.reductions import share_of_mean
from xdit_ir.sharding.propagate import Propagation
from xdit_ir.sharding.specialize import Specialize

aten = torch.ops.aten
KEPT, IDLE = 0, 1  # the ranks


@dataclass(frozen=True)
class LiveMesh(Mesh):
    """Two ranks, of which the first takes all of whatever is to be divided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.world_size == 2, "rows are kept or not"

    def __hash__(self) -> int:
        return super().__hash__()

    def divide(self, size: int, dims: Collection[str], unit: int = 1, segments: Sequence[int] = ()) -> Partition:
        """All for the first rank."""
        every = Indices.range(0, size)
        return Partition(size, (every, Indices(()) if self.size(dims) > 1 else every))

    def refine(self, partition: Partition, dims: Collection[str]) -> Partition:
        """The same, of what both have."""
        if self.size(dims) == 1 or self.dividing_dims(partition):
            return partition
        return Partition(partition.size, (partition.parts[KEPT], Indices(())))


MESH = LiveMesh((ULYSSES,), (2,))


def without_rows(program: Program, name: str, dim: int, kept: int) -> Program:
    """The program on `MESH`: of the input of this name the first rank has the first rows, the other one the rest."""
    node = next(node for node in program.graph.nodes if node.name == name)
    size = node.meta[SPEC].shape[dim]
    rows = Partition(size, (Indices.range(0, kept), Indices.range(kept, size)))
    cut = Layout.whole(len(node.meta[SPEC].shape)).with_dims({dim: rows})
    return Propagation(program, MESH, _infer).run({name: (cut,)}).replace(mesh=MESH)


def _infer(call: OpCall) -> OpSharding:
    """By the rules; masks of attention are cut along the keys that each rank has."""
    ruling = infer(call)
    if call.node.target not in ops.ATTENTIONS or len(call.specs) < 4:
        return ruling
    keys, shape = ruling.inputs[1].dims[-2], call.specs[3].shape
    if keys is None or shape[-1] != keys.size:
        return ruling
    cut = ruling.inputs[3].with_dims({-1: keys} | ({-2: None} if len(shape) > 1 else {}))
    return replace(ruling, inputs=(*ruling.inputs[:3], cut, *ruling.inputs[4:]))


def is_own(change: fx.Node) -> bool:
    """Whether a change of layout brings the first rank nothing that it does not have, sums aside."""
    have, want = operands(change)[0].meta[LAYOUT], change.meta[LAYOUT]
    triples = zip(have.dims, want.dims, change.meta[SPEC].shape, strict=True)
    return all(part_of(b, size, KEPT).without(part_of(a, size, KEPT)).size == 0 for a, b, size in triples)


def idle_part(partition: Partition | None) -> Indices:
    """What only the other rank has of a dimension."""
    return Indices(()) if partition is None else partition.parts[IDLE].without(partition.parts[KEPT])


def mixes_statistics(node: fx.Node) -> bool:
    """Whether a norm takes statistics also of what only the other rank has."""
    sources = operands(node)
    if not sources or not isinstance(layout := sources[0].meta[LAYOUT], Layout):
        return False
    return bool(divided_statistics(node, layout, MESH)) and any(idle_part(one).size for one in layout.dims)


def kept_program(program: Program, divided: Program) -> Program:
    """The first rank's program, as one for a single device like `program`. Sums are taken to be its own summands."""
    for _, graph, _ in all_graphs(divided):
        for node in graph.nodes:
            if ops.is_relayout(node.target):
                node.target = ops.shard
    masks = {(name, node.name): cut for name, graph, _ in all_graphs(divided) for node, cut in _mask_cuts(graph)}
    made = Specialize(KEPT).apply(divided)
    for name, graph, _ in all_graphs(made):
        for node in list(graph.nodes):
            _tidy(graph, node, masks.get((name, node.name), ()))
    return made.replace(mesh=None, facts=program.facts, tokens=())


Cut = tuple[int, Indices]


def _mask_cuts(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[Cut, ...]]]:
    """For each attention what the first rank takes of a mask that it has whole."""
    for node in graph.nodes:
        if node.target in ops.ATTENTIONS and len(given := operands(node)) > 3:
            have, shape = given[3].meta[LAYOUT], given[3].meta[SPEC].shape
            wanted = {-1: given[1].meta[LAYOUT].dims[-2], -2: given[0].meta[LAYOUT].dims[-2]}
            cuts = ((dim, part) for dim, part in wanted.items() if part is not None and len(shape) >= -dim)
            yield node, tuple((d, p.parts[KEPT]) for d, p in cuts if have.dims[d] is None and shape[d] == p.size)


def _tidy(graph: fx.Graph, node: fx.Node, mask_cuts: tuple[Cut, ...]) -> None:
    """Writes an operator of a rank's program as one of a program for a single device."""
    if node.target is ops.attention_of_rows:
        _first_rows(node)
    if node.target is share_of_mean:
        _scale_mean(graph, node)
    for dim, places in mask_cuts:
        mask = operands(node)[3]
        with graph.inserting_before(node):
            taken = graph.call_function(ops.take, (mask, dim % len(mask.meta[SPEC].shape), places.runs))
        shape = list(mask.meta[SPEC].shape)
        shape[dim] = places.size
        taken.meta = {**mask.meta, SPEC: replace(mask.meta[SPEC], shape=tuple(shape))}
        node.replace_input_with(mask, taken)
    if node.target is ops.take:
        _narrow(graph, node)
    if node.target is ops.take_each:
        _split(graph, node)


def _first_rows(node: fx.Node) -> None:
    """Causal attention of the first rows, if they are: to these it is not told which they are."""
    given = bound_arguments(node)
    options = {name: given["options"][name] for name in ("scale", "enable_gqa")}
    if given["mask"] is None and Indices(given["rows"]).is_whole(given["q"].meta[SPEC].shape[-2]):
        node.target, node.args = ops.attention, (given["q"], given["k"], given["v"])
        node.kwargs = {**options, "is_causal": True}


def _scale_mean(graph: fx.Graph, node: fx.Node) -> None:
    """The mean of what is there, as a part of one over `count` elements, of which the others are zero."""
    args: Any = node.args
    x, dims, keepdim, count = args
    own = math.prod(x.meta[SPEC].shape[dim] for dim in dims)
    if not own:
        return
    node.target, node.args = aten.mean.dim, (x, list(dims), keepdim)
    if own != count:
        with graph.inserting_after(node):
            scaled = graph.call_function(aten.mul.Tensor, (node, own / count))
        scaled.meta = dict(node.meta)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _narrow(graph: fx.Graph, node: fx.Node) -> None:
    args: Any = node.args
    x, dim, runs = args
    if x.meta[SPEC].shape == node.meta[SPEC].shape and len(runs) < 2:
        node.replace_all_uses_with(x)
        graph.erase_node(node)
    elif len(runs) == 1:
        [(start, length)] = runs
        node.target, node.args = aten.slice.Tensor, (x, dim, start, start + length)


def _split(graph: fx.Graph, node: fx.Node) -> None:
    """Parts that lie one behind the other are those of a split, others are taken one by one."""
    args: Any = node.args
    x, dim, parts = args
    sizes = [sum(length for _, length in runs) for runs in parts]
    joined = Indices.of_runs(run for runs in parts for run in runs)
    if joined.is_whole(x.meta[SPEC].shape[dim]):
        node.target, node.args = aten.split_with_sizes.default, (x, sizes, dim)
        return
    for item in list(node.users):
        place: Any = item.args[1]
        item.target, item.args = ops.take, (x, dim, parts[place])
        _narrow(graph, item)
    graph.erase_node(node)
