"""Where values can be divided from: what the prologue hands to the blocks, and the inputs."""

from __future__ import annotations

from torch import fx

from xdit_ir.ir.graphs import operands, placeholders
from xdit_ir.ir.program import SPEC, is_block_call


def leading_values(graph: fx.Graph) -> list[fx.Node]:
    """Floating-point values of an outer graph that enter block calls and do not come out of one, then the inputs."""
    after: set[fx.Node] = set()
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        sources = operands(node)
        if is_block_call(node):
            found |= dict.fromkeys(source for source in sources if source not in after)
        if is_block_call(node) or any(source in after for source in sources):
            after.add(node)
    found |= dict.fromkeys(placeholders(graph))
    return [node for node in found if node.meta[SPEC].dtype.is_floating_point and node.op != "get_attr"]
