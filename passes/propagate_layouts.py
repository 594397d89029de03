"""`propagate-layouts`: every value gets the layout that follows from those of the seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.program import Program
from xdit_ir.sharding.propagate import Propagation


@dataclass(frozen=True)
class PropagateLayouts:
    """Write down what passes before have decided to divide: bring each seed into its layouts, follow the rules from
    there through all operators and blocks, and insert the changes of layout that they need.
    """

    name: ClassVar[str] = "propagate-layouts"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.SEEDS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.LAYOUTS})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.SEEDS})

    def apply(self, program: Program) -> Program:
        """The program with layouts on the mesh of its seeds."""
        seeding = program.seeding
        assert seeding is not None
        if program.mesh is not None and not seeding.seeds:
            return program.replace(seeding=None)  # its layouts are as they shall be
        divided = Propagation(program, seeding.mesh).run(seeding.seeds)
        return divided.replace(mesh=seeding.mesh, seeding=None)
