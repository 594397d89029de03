"""What Python asks only to raise an error: the answer with which the model's code goes on, read off its bytecode."""

from __future__ import annotations

import dis
import operator
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import CodeType

from xdit_ir.capture.source import is_between, is_torch

Answer = bool | float
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_LEAVES = ("RETURN_", "STORE_", "YIELD", "SEND", "FOR_ITER", "DELETE_", "JUMP_BACKWARD")
_HANDLER = 12  # instructions at the beginning of a handler of errors that tell what it catches


def only_answer(entry: CodeType | None) -> Answer | None:
    """What a tensor is taken to hold that Python reads just now, if any other answer only raises an error.

    So `assert torch.allclose(a, b)` is true, and nothing is NaN where the code says `if x.isnan().any(): raise`. None
    where the code goes on either way, or where it catches the error itself. `entry` is the code that calls the model.
    """
    frame, answer, open_question = sys._getframe(1), None, True
    while frame is not None and frame.f_code is not entry:
        code = frame.f_code
        if not is_between(code.co_filename):
            if open_question:
                answer = _answer(code, frame.f_lasti)
                open_question = answer is None and _returns(code, frame.f_lasti)
            if answer is None and not open_question:
                return None
            if not is_torch(code.co_filename) and _catches(code, frame.f_lasti):
                return None
        frame = frame.f_back  # type: ignore[assignment]
    return answer


@lru_cache(maxsize=1024)
def _instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG", "NOT_TAKEN"))


def _place(code: CodeType, offset: int) -> int:
    return bisect_left(_instructions(code), offset, key=lambda one: one.offset)


def _returns(code: CodeType, offset: int) -> bool:
    """Whether what is read is handed to the caller as it is."""
    found = _instructions(code)[_place(code, offset) + 1 :]
    return bool(found) and found[0].opname == "RETURN_VALUE"


@lru_cache(maxsize=1024)
def _answer(code: CodeType, offset: int) -> Answer | None:
    steps, at = _instructions(code), _place(code, offset)
    compared: tuple[str, float] | None = None
    negated = False
    if at + 2 >= len(steps):
        return None
    if not _is_branch(steps[at]) and steps[at].opname not in ("UNARY_NOT", "TO_BOOL"):
        at += 1
        constant = steps[at].argval if steps[at].opname.startswith("LOAD_CONST") else None
        if isinstance(constant, int | float) and steps[at + 1].opname == "COMPARE_OP":
            compared, at = (str(steps[at + 1].argval).removeprefix("bool(").removesuffix(")"), float(constant)), at + 2
    at = _behind_a_name(steps, at)
    while at < len(steps) and steps[at].opname in ("UNARY_NOT", "TO_BOOL"):
        negated, at = negated != (steps[at].opname == "UNARY_NOT"), _behind_a_name(steps, at + 1)
    if at >= len(steps) or not _is_branch(steps[at]):
        return None
    jumps_if = "IF_TRUE" in steps[at].opname
    sides = {jumps_if: _place(code, steps[at].argval), not jumps_if: at + 1}
    raising = {side for side, place in sides.items() if _raises(code, steps, place, sides[not side])}
    if len(raising) != 1:
        return None
    wanted = (raising == {False}) != negated
    return wanted if compared is None else _compared(*compared, wanted)


def _behind_a_name(steps: Sequence[dis.Instruction], at: int) -> int:
    """The place behind a value's being kept under a name and taken from there, as in asserts that pytest rewrites."""
    names = [(step.opname, step.argval) for step in steps[at : at + 2]]
    if names and names[0][0] == "STORE_FAST_LOAD_FAST" and len({*names[0][1]}) == 1:
        return at + 1
    kept = len(names) == 2 and names[0][0] == "STORE_FAST" and names[1] == ("LOAD_FAST", names[0][1])
    return at + 2 if kept else at


def _compared(name: str, constant: float, wanted: bool) -> Answer | None:
    """A number of which a comparison with a constant says what is wanted."""
    compare = _COMPARISONS.get(name)
    numbers = (constant, constant - 1, constant + 1)
    return next((one for one in numbers if compare is not None and compare(one, constant) == wanted), None)


def _is_branch(step: dis.Instruction) -> bool:
    return step.opname.startswith("POP_JUMP") and step.opname.endswith(("IF_TRUE", "IF_FALSE"))


def _raises(code: CodeType, steps: Sequence[dis.Instruction], at: int, other: int) -> bool:
    """Whether the code from here on only raises an error, or else goes on where the other side of a branch does."""
    while at < len(steps):
        step = steps[at]
        if step.opname == "RAISE_VARARGS":
            return True
        if step.opname.startswith(_LEAVES) and not _tells(step):
            return False
        if _is_branch(step):
            sides = (_place(code, step.argval), at + 1)
            rest = [side for side in sides if not _raises(code, steps, side, other)]
            return len(rest) < len(sides) and all(_goes_on_alike(steps, side, other) for side in rest)
        at = _place(code, step.argval) if step.opname == "JUMP_FORWARD" else at + 1
    return False


def _tells(step: dis.Instruction) -> bool:
    """Whether a step keeps a part of a message: pytest rewrites asserts so, with names that Python does not have."""
    return step.opname.startswith("STORE_FAST") and "@" in str(step.argval)


def _goes_on_alike(steps: Sequence[dis.Instruction], left: int, right: int) -> bool:
    """Whether two places are one, or both return the same constant, of which the compiler makes copies."""
    ends = [[(step.opname, step.argval) for step in steps[at : at + 2]] for at in (left, right)]
    returns = ends[0][0][0] == "RETURN_CONST" or ends[0][-1][0] == "RETURN_VALUE"
    length = 1 if ends[0][0][0] == "RETURN_CONST" else 2
    return left == right or (returns and ends[0][:length] == ends[1][:length])


@lru_cache(maxsize=1024)
def _catches(code: CodeType, offset: int) -> bool:
    """Whether an error at this place is caught in the same function; `with` and `finally` only look at it."""
    steps = _instructions(code)
    for entry in dis.Bytecode(code).exception_entries:  # type: ignore[attr-defined]
        if entry.start <= offset < entry.end:
            start = _place(code, entry.target)
            handler = [step.opname for step in steps[start : start + _HANDLER]]
            first = handler[1] if len(handler) > 1 else ""
            if first != "WITH_EXCEPT_START" and ("CHECK_EXC_MATCH" in handler or first == "POP_TOP"):
                return True
    return False
