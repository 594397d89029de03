"""How a list of passes runs: what each requires is checked before it, the program after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from xdit_ir.errors import PassError
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.garbage import collector_paused
from xdit_ir.ir.program import Program
from xdit_ir.passes.contract import Contract, Pass, contract_of
from xdit_ir.passes.order import PASSES
from xdit_ir.sharding.verify import Inferred, verify

After = Callable[[Pass, Program], None]


def run_passes(
    program: Program, passes: Sequence[Pass], after: After | None = None, *, familiar: bool = False
) -> Program:
    """Apply passes in order, verify after each; `after` sees every intermediate program.

    `familiar`: a program that differs in sizes only came through the same passes, so only the last is verified.

    Raises:
        PassError: the program lacks what a pass requires; names the pass that provides it.
        VerifyError: a pass made a wrong program.
    """
    inferred: Inferred = {}
    given = set(_graphs(program))
    with collector_paused() if after is None else nullcontext():  # once for all, as each end of a pause collects
        for left, one in zip(reversed(range(len(passes))), passes, strict=True):
            with collector_paused():
                program = program.replace(spare=after is None and _all_new(program, given))
                program = _applied(one, program, None if familiar and left else inferred)
            if after is not None:
                after(one, program)
    return program.replace(spare=False)


def _all_new(program: Program, given: set[int]) -> bool:
    """Whether all graphs are others than these, each with one place."""
    graphs = _graphs(program)
    return given.isdisjoint(graphs) and len(set(graphs)) == len(graphs)


def _graphs(program: Program) -> list[int]:
    return list(map(id, program.graphs))


def _applied(one: Pass, program: Program, inferred: Inferred | None) -> Program:
    contract = contract_of(type(one))
    _check(one, contract, program)
    program = one.apply(program)
    program = program.replace(facts=contract.after(program.facts))
    if inferred is not None:
        verify(program, one.name, runnable=Fact.RUNNABLE in program.facts, inferred=inferred)
    return program


def _check(one: Pass, contract: Contract, program: Program) -> None:
    missing = [fact for fact in Fact if fact in contract.requires - program.facts]
    if not missing:
        return
    reasons = []
    for fact in missing:
        makers = [kind.name for kind in PASSES if fact in contract_of(kind).provides]
        reasons.append(f"{fact.value!r}, which {' or '.join(makers)} provides")
    have = ", ".join(fact.value for fact in Fact if fact in program.facts) or "nothing"
    raise PassError(f"pass {one.name} needs a program with {', and '.join(reasons)}; passes before gave it {have}")
