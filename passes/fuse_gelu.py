"""`fuse-gelu`: a GELU behind a projection is left to that product's epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.kernels.backends import HALF
from xdit_ir.kernels.linear_gelu import linear_gelu

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseGelu:
    """Where a projection with a bias is used by nothing but a GELU (by tanh), in half precision, one kernel of the GPU
    does both, and rounds once.
    """

    name: ClassVar[str] = "fuse-gelu"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    def apply(self, program: Program) -> Program:
        """The program with such pairs as one operator, where the projection stood."""
        return map_graphs(program, _fuse)


def _fuse(graph: fx.Graph) -> None:
    for gelu in list(graph.nodes):
        linear = projection(gelu)
        if linear is not None:
            gelu.target, gelu.args, gelu.kwargs = linear_gelu, linear.args, {}
            linear.prepend(gelu)
            graph.erase_node(linear)


def projection(gelu: fx.Node) -> fx.Node | None:
    """The projection whose kernel can do this GELU on the way."""
    source = gelu.args[0] if gelu.args else None
    if gelu.target is not aten.gelu.default or gelu.kwargs.get("approximate") != "tanh":
        return None
    if not isinstance(source, fx.Node) or source.target is not aten.linear.default or len(source.users) != 1:
        return None
    fits = len(source.args) == 3 and source.args[2] is not None and source.meta[SPEC].dtype in HALF
    return source if fits and 0 not in source.meta[SPEC].shape else None
