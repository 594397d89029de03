"""What a pass is, and what it says of itself.

A pass is a frozen dataclass whose fields are its options. It may declare, as class variables, what it does to results
(`numerics`) and which facts a program must have before it (`requires`), has after it (`provides`) and no longer has
(`invalidates`). What it does not declare is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.program import Program

# Bit-equal; sums in another order or rounded elsewhere; values of the step before; values in fewer bits.
NUMERICS = ("exact", "reassociated", "stale", "rounded")


class Pass(Protocol):
    """A frozen dataclass with options; `apply` returns a new program and leaves its input as it was."""

    @property
    def name(self) -> str:
        """The pass's name as users see it."""
        ...

    def apply(self, program: Program) -> Program:
        """The rewritten program."""
        ...


@dataclass(frozen=True)
class Contract:
    """What a pass declares."""

    requires: frozenset[Fact]
    provides: frozenset[Fact]
    invalidates: frozenset[Fact]
    numerics: str

    def after(self, facts: frozenset[Fact]) -> frozenset[Fact]:
        """The facts of what the pass makes of a program with these."""
        return facts - self.invalidates | self.provides


def contract_of(kind: type[Any]) -> Contract:
    """The declarations of a pass's class."""
    requires, provides, invalidates = (
        frozenset(getattr(kind, name, ())) for name in ("requires", "provides", "invalidates")
    )
    return Contract(requires, provides, invalidates, getattr(kind, "numerics", "not declared"))
