"""Which operators make Python, or their own code on the host, wait for values that the device computes."""

from __future__ import annotations

import torch
from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.leaf import Leaf
from xdit_ir.ir.program import SPEC

aten = torch.ops.aten
_BY_MASK = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def reads_on_host(node: fx.Node) -> bool:
    """Whether an operator cannot be part of a CUDA graph: its size or its course depends on values.

    An opaque leaf counts, whatever it does: its Python runs at every call.
    """
    if isinstance(node.target, Leaf):
        return True
    if node.target in _BY_MASK:
        return any(source.meta[SPEC].dtype is torch.bool for source in _indices(node))
    return isinstance(node.target, torch._ops.OpOverload) and bool(_TAGS & set(node.target.tags))


def _indices(node: fx.Node) -> list[fx.Node]:
    """Of an operator that takes a list of indices."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs["indices"]
    return [source for source in operands(node) if source in given]  # type: ignore[operator]
