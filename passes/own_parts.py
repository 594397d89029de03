"""`own-parts`: of weights in parts, those that a rank has itself are read where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.collective_ops import AllGather
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph, operands
from xdit_ir.ir.program import SPEC, Program


@dataclass(frozen=True)
class OwnParts:
    """A weight that lies in `rank`'s own part of what is gathered is taken out of that part, which is on its device for
    good. So a gather need not bring it: a copy within a GPU takes its multiprocessors from the block that is running.
    """

    name: ClassVar[str] = "own-parts"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    rank: int

    def apply(self, program: Program) -> Program:
        """The program of this rank with such weights out of its own parts."""
        graph = copy_graph(program.graph)
        for node in graph.nodes:
            if isinstance(node.target, AllGather) and operands(node)[0].op == "get_attr":
                _take(node, operands(node)[0], node.target.group.index(self.rank))
        return program.replace(graph=graph)


def _take(gathered: fx.Node, part: fx.Node, place: int) -> None:
    """Let what lies in a part alone, which has this place in what is gathered, be taken out of it."""
    size = part.meta[SPEC].nbytes
    for user in [one for one in gathered.users if one.target is ops.unpack]:
        _, start, *rest = user.args
        assert isinstance(start, int)
        if place * size <= start and start + user.meta[SPEC].nbytes <= (place + 1) * size:
            user.args = (part, start - place * size, *rest)
