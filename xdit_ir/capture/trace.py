"""`trace`: from a module and an example to a `Program`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from xdit_ir.capture.attempt import Attempt, Captured
from xdit_ir.capture.equality import compute_same
from xdit_ir.capture.inputs import Example, bind_example
from xdit_ir.capture.ladder import FAILURES, Rung
from xdit_ir.capture.leaves import Wanted
from xdit_ir.capture.odd_weights import odd_weight
from xdit_ir.capture.overwrites import trials
from xdit_ir.capture.selected import Selections
from xdit_ir.capture.state import StateWrite, left, refusal
from xdit_ir.errors import TraceError, XditError
from xdit_ir.ir.guards import STATE
from xdit_ir.ir.program import Program
from xdit_ir.reflection.global_hooks import GLOBAL_HOOKS, foreign_hooks, watchers_away
from xdit_ir.reflection.parts import TensorContents

# A trace puts other functions in the place of PyTorch's, for the process.
_TURN = threading.RLock()


def trace(
    model: nn.Module,
    example: Example,
    leaf: Sequence[Wanted] = (),
    *,
    keep: bool = False,
    marked: Mapping[str, int] = MappingProxyType({}),
) -> Program:
    """Capture a module's forward for one input signature as a `Program`.

    `example` holds forward's arguments by name, or its positional arguments. Model and example may be on any
    device, including meta. Nothing is computed but what Python must know, and the model is left as it was.
    Submodules that cannot be captured, and those named in `leaf`, become opaque leaves.

    Tables that forward fills once are left in the model if `keep`. Then the program is that of the calls to come, in
    the mode (gradients, inference) of the caller; otherwise forward is told that there is none.

    What the modules of `marked`, by path, return becomes `reuse` of the group that is given there.

    Raises:
        TraceError: forward cannot be captured, or keeps a state between calls: what it leaves in Python objects is
            written again at every call, changes what it does, or depends on its inputs. What it makes of weights before
            it reads it is no state.
    """
    if (odd := odd_weight(model)) is not None:
        raise TraceError(odd)
    if any(foreign_hooks(name) for name in GLOBAL_HOOKS):
        raise TraceError(
            "hooks of all modules (register_module_forward_hook) would see copies of the model's modules; "
            "register them on the modules that they are for"
        )
    with _TURN, _disable_current_modes(), watchers_away():  # of counters and profilers around the call
        return _Capture(model, example, leaf, keep, marked).program()


@dataclass
class _Capture:
    """What `trace` is asked for; attempts follow each other until one is right for the calls to come. `learnt`: the
    rung of the latest that succeeded, which says what repeats."""

    model: nn.Module
    example: Example
    leaf: Sequence[Wanted]
    keep: bool
    marked: Mapping[str, int]
    learnt: Rung | None = None

    def program(self) -> Program:
        """That of forward, once what it fills is filled."""
        program, writes = self._settled()
        if not writes:
            return program
        with left(writes) as kept:
            again, more = self._settled()
            if more:
                raise refusal(more)
            if not compute_same(program, again, self.model, weights=True):
                raise refusal(writes, ", after which it computes something else")
            if self.keep:
                kept()
        return again if self.keep else _before_and_after(program, writes)

    def _settled(self) -> tuple[Program, list[StateWrite]]:
        """A program, and what forward leaves in Python objects outside of its arguments."""
        program, writes, made = self._tried()
        if made and not all(self._is_same(program, after) for after in trials(made)):
            program, writes, _ = self._tried(overwrite=False)
        if writes.refused is None:
            return program, writes.kept
        if not writes.without or not self._is_same(program, writes.without):
            raise writes.refused from None  # it is read before it is written
        return program, writes.kept

    def _is_same(self, program: Program, writes: Iterable[StateWrite]) -> bool:
        """Whether forward is captured as this program too behind these writes."""
        with left(writes):
            try:
                again, *_ = self._tried()
            except XditError:
                return False
        return compute_same(program, again, self.model)

    def _tried(self, *, overwrite: bool = True) -> Captured:
        """The first attempt that succeeds, from all blocks and no leaves downwards."""
        named, by_name = bind_example(self.model, self.example), isinstance(self.example, Mapping)
        rung = Rung.top(self.model, self.leaf, self.learnt)
        while True:
            selections = Selections() if rung.selects else None
            attempt = Attempt(rung, named, by_name, self.keep, overwrite, self.marked)
            try:
                found = attempt.run(selections)
            except FAILURES as failure:
                rung = rung.below(failure)
                continue
            if selections is None or all(self._same_if(case, found[0], attempt) for case in selections.cases):
                self.learnt = rung
                return found
            rung = replace(rung, selects=False)

    def _same_if(self, empty: frozenset[int], program: Program, attempt: Attempt) -> bool:
        """Whether a program also does what forward does where these masks select nothing."""
        try:
            other, *_ = attempt.run(Selections(empty))
        except (*FAILURES, XditError):
            return False
        return compute_same(program, other, self.model, empty)


def _before_and_after(program: Program, writes: Iterable[StateWrite]) -> Program:
    """A program that was found to be right before these writes and after them: it does not ask what they fill."""
    filled = {f"{STATE}{write.part.label}" for write in writes if isinstance(write.part, TensorContents)}
    guards = tuple(guard for guard in program.signature.guards if guard.path not in filled)
    return replace(program, signature=replace(program.signature, guards=guards)) if filled else program
