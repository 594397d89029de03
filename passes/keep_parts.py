"""`keep-parts`: of weights of which ranks use their own heads and features only, they hold nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.mesh import FEATURES, Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.stored_weights import cut_outside, cut_weights


@dataclass(frozen=True)
class KeepParts:
    """Where features are divided, a weight that is only ever cut is stored as the parts of it that ranks use, so that
    each reads and keeps its own; a weight that some rank needs whole somewhere stays whole.

    `paired`: the parts of `cfg` run different calls, so nothing is divided between them.
    """

    name: ClassVar[str] = "keep-parts"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    mesh: Mesh
    paired: bool = False

    def apply(self, program: Program) -> Program:
        """The program whose ranks hold parts of such weights."""
        if self.mesh.size(FEATURES) == 1:
            return program
        conditions = cut_weights(program, self.mesh, self.mesh.dims_of_a_call(paired=self.paired))
        return cut_outside(conditions, FEATURES)
