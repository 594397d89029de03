"""How much memory a rank needs at most, worked out from sizes: weights, buffers between steps, values of a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from xdit_ir.api import ParallelProgram
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import TIME
from xdit_ir.ir.program import LAYOUT, SPEC, TensorSpec, called_block
from xdit_ir.planning.work import Fusion, Kind, behind_views, kind_of
from xdit_ir.sharding.report import Report


def memory_per_rank(parallel: ParallelProgram, report: Report) -> list[int]:
    """Bytes of weights, of buffers and of the most values at a time, on every rank."""
    buffers = report.buffer_bytes_per_rank or [0] * parallel.world_size
    values = _value_bytes(parallel)
    return [sum(each) for each in zip(report.weight_bytes_per_rank, buffers, values, strict=True)]


def _value_bytes(parallel: ParallelProgram) -> list[int]:
    """The most bytes of values that are there at a time, on every rank; of a pipeline for the largest patch."""
    if parallel.pipeline is None:
        return [peak(parallel, rank) for rank in range(parallel.world_size)]
    virtual = parallel.pipeline.virtual
    peaks = [peak(parallel, rank) for rank in range(virtual.world_size)]
    largest = [max(peaks[peer] for peer in virtual.group(rank, (TIME,))) for rank in range(virtual.world_size)]
    found = [0] * parallel.world_size
    for place, amount in enumerate(largest):
        for stage in range(parallel.pipeline.stages):
            found[parallel.pipeline.rank(stage, place)] = amount
    return found


def peak(parallel: ParallelProgram, rank: int) -> int:
    """The most bytes that one rank of the mesh of layouts holds besides weights."""
    program = parallel.ir
    bodies = {name: _graph_peak(block.graph, rank, {}) for name, block in program.blocks.items()}
    return _graph_peak(program.graph, rank, bodies, inputs=True)


def _graph_peak(graph: fx.Graph, rank: int, bodies: Mapping[str, int], *, inputs: bool = False) -> int:
    """`bodies`: what calls need meanwhile; `inputs`: those count as values of this graph."""
    nodes, kept = list(graph.nodes), _kept(graph, inputs)
    last = {behind_views(source): place for place, node in enumerate(nodes) for source in node.all_input_nodes}
    ending: dict[int, list[fx.Node]] = {}
    for node, place in last.items():
        ending.setdefault(place, []).append(node)
    now = most = 0
    for place, node in enumerate(nodes):
        inside = bodies[called_block(node)] if kind_of(node) is Kind.CALL else 0
        made = _bytes(node, rank) if kept(node) else 0
        now += made
        most = max(most, now + max(inside - made, 0))
        now -= sum(_bytes(one, rank) for one in ending.get(place, ()) if kept(one))
    return most


def _kept(graph: fx.Graph, inputs: bool) -> Callable[[fx.Node], bool]:
    """Which nodes stand for memory of their own: what is fused away does not, nor weights, nor views."""
    moved = Fusion(graph).moved

    def kept(node: fx.Node) -> bool:
        if node.op == "placeholder":
            return inputs
        if node.op != "call_function" or kind_of(node) is Kind.VIEW:
            return False
        return node not in moved or moved[node].writes

    return kept


def _bytes(node: fx.Node, rank: int) -> int:
    """Of all results of a node."""
    specs, layouts = node.meta.get(SPEC), node.meta.get(LAYOUT)
    pairs = zip(specs, layouts, strict=True) if isinstance(specs, tuple) and layouts else [(specs, layouts)]
    placed = ((spec, layout) for spec, layout in pairs if isinstance(spec, TensorSpec) and isinstance(layout, Layout))
    return sum(spec.on(layout, rank).nbytes for spec, layout in placed)
