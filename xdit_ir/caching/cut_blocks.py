"""A block with `reuse` inside, for steps that reuse some of it: it is given these values, and gives the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_graph, operands, results_of
from xdit_ir.ir.hoist import with_given
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, Block

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class CutBlock:
    """The form of a `block`: its last arguments are what it reuses, its last results what others may reuse. `values`:
    what may be reused, in the order of the body it was."""

    block: Block
    values: Sequence[fx.Node]
    computed: Sequence[fx.Node]

    def types(self, call: fx.Node) -> Mapping[str, Any]:
        """Those of the results of a call."""
        every = (key for key in (SPEC, LAYOUT) if key in call.meta)
        return {key: (*call.meta[key], *(node.meta[key] for node in self.computed)) for key in every}


def cut_block(block: Block, reused: frozenset[int]) -> CutBlock:
    """The form of a block for steps that reuse these groups."""
    values = [node for node in block.graph.nodes if node.target is ops.reuse]
    if not values:
        return CutBlock(block, [], [])
    given = [node for node in values if group_of(node) in reused]
    computed = [node for node in values if node not in given]
    graph = copy_graph(block.graph)
    copies = {node.name: node for node in graph.nodes}
    more = [_kept(graph, copies[node.name]) for node in computed]
    graph.output_node().args = ((*results_of(graph), *more),)
    return CutBlock(with_given(replace(block, graph=graph), given), values, computed)


def group_of(node: fx.Node) -> int:
    """The group of a `reuse`."""
    return int(node.kwargs.get("group", 0))  # type: ignore[arg-type]


def _kept(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What a `reuse` is of, which takes its place, in memory of its own."""
    [source] = operands(node)
    node.replace_all_uses_with(source)
    with graph.inserting_before(graph.output_node()):
        made = graph.create_node("call_function", aten.clone.default, (source,), name=f"{node.name}_kept")
    made.meta = {key: node.meta[key] for key in (SPEC, LAYOUT, WHERE) if key in node.meta}
    graph.erase_node(node)
    return made
