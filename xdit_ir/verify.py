"""The verifier, run after every pass."""

from __future__ import annotations

from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.program import Program


def verify(program: Program, after: str = "") -> None:
    """Raise `VerifyError` where the program breaks an invariant."""
    for graph in (program.graph, *(block.graph for block in program.blocks.values())):
        graph.lint()


_ = (fx, VerifyError)
