"""What a pass is, and how a list of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from xdit_ir.ir.program import Program
from xdit_ir.sharding.verify import verify


class Pass(Protocol):
    """A frozen dataclass with options; `apply` returns a new program and leaves its input as it was."""

    @property
    def name(self) -> str:
        """The pass's name as users see it."""
        ...

    def apply(self, program: Program) -> Program:
        """The rewritten program."""
        ...


def run_passes(
    program: Program, passes: Sequence[Pass], after: Callable[[Pass, Program], None] | None = None
) -> Program:
    """Apply passes in order, verify after each; `after` sees every intermediate program."""
    for one in passes:
        program = one.apply(program)
        verify(program, one.name)
        if after is not None:
            after(one, program)
    return program
