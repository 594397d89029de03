"""What a graph gives back: a caller may write to it, so that it may not become an input, a weight or another result."""

from __future__ import annotations

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import results_of

aten = torch.ops.aten
# Of operators that PyTorch composes of others, those that never return what they are given.
_COMPUTING = frozenset(
    {
        *(aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default, aten.softmax.int),
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default),
    }
)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def is_new(node: fx.Node) -> bool:
    """Whether a value is in memory of its own, whatever its operands are."""
    if not isinstance(node.target, torch._ops.OpOverload) or ops.is_view(node.target):
        return False
    return node.target in _COMPUTING or not node.target.has_kernel_for_dispatch_key(_COMPOSITE)


def is_needed(copy: fx.Node, source: fx.Node) -> bool:
    """Whether a graph gives back a copy, or a view of it, and the memory of its source is not there for it only."""
    return is_new(copy) and copy in _given_back(copy.graph) and not _is_only_read(source)


def _is_only_read(source: fx.Node) -> bool:
    """Whether nothing else can see the memory of a value that is read once."""
    while len(source.users) == 1 and not is_new(source):
        if not ops.is_view(source.target):
            return False
        [source] = source.all_input_nodes
    return len(source.users) == 1


def _given_back(graph: fx.Graph) -> set[fx.Node]:
    """The results, and what they may be views of."""
    found, waiting = set[fx.Node](), results_of(graph)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(() if is_new(node) else node.all_input_nodes)
    return found
