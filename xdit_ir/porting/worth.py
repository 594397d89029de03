"""What beside denoisers is divided where that pays: other calls run whole, as they would without a port."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.api import ParallelProgram
from xdit_ir.errors import ParallelizeError, XditError
from xdit_ir.porting.arguments import Arguments
from xdit_ir.porting.settings import ModelSettings
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.report import Report
from xdit_ir.transport.handshake import fact

# Seconds that a call must save, as FLOPs at full speed: a trace takes seconds, and most kernels are slower than that.
SAVED = 0.002
# Seconds that a whole call of an encoder of ids must take, and how long a text may be: other lengths are traced anew.
ENCODER, LONGEST = 0.02, 4096


@dataclass(eq=False)
class Whole:
    """Calls that run whole, and why: of these shapes and settings; of up to so many elements, if it is for their
    size."""

    settings: ModelSettings
    shapes: Any
    elements: int
    reason: str
    small: bool

    def covers(self, given: Arguments) -> bool:
        """Whether a call is one of them."""
        alike = _elements(given) <= self.elements if self.small else _shapes(given) == self.shapes
        return alike and self.settings.unchanged()

    def settle(self, model: nn.Module) -> None:
        """What such a call has itself changed, such as the lists in which it keeps frames, is no change."""
        if not self.settings.unchanged():
            self.settings = ModelSettings(model)


class TooSmallError(ParallelizeError):
    """Dividing a call would not save enough."""


@dataclass(eq=False)
class Worth:
    """Decides for one `model` which calls are divided. `traced`: without a trace, calls with other tensors than ids are
    not tried, since nothing is known of what they cost. `always`: they are divided wherever they can be, as weights
    are. `machine`: that which is given, or as slow a one as there may be; that on which all ranks agree decides when a
    program is made. `last`: what the last call was, if it runs whole."""

    model: nn.Module
    machine: Machine
    traced: bool
    always: bool = False
    found: list[Whole] = field(default_factory=list)
    last: Whole | None = None

    def whole(self, given: Arguments) -> str:
        """Why a call is known to run whole, or is too small in any case; empty if it may be divided."""
        self.last = next((one for one in self.found if one.covers(given)), None)
        if self.last is not None:
            return self.last.reason
        if self.traced or self.always:
            return ""
        if any(x.is_floating_point() for x in given.tensors):
            return self._note(given, "it was not asked for: name it in components=[...]", small=False)
        reason = self._short(given, self.machine)
        return self._note(given, reason, small=True) if reason else ""

    def check_call(self, given: Arguments, machine: Machine) -> None:
        """Raise `TooSmallError` for a call that takes too little on this machine to be traced."""
        if not (self.traced or self.always) and (reason := self._short(given, machine)):
            raise TooSmallError(reason)

    def check(self, program: ParallelProgram) -> None:
        """Raise `TooSmallError` where a program saves too little on the machine that it was made for."""
        if self.always:
            return
        saved = _saved(program.report(), program.machine)
        if saved < SAVED:
            raise TooSmallError(_too_small(saved))

    def _short(self, given: Arguments, machine: Machine) -> str:
        """Why a call with ids takes too little there; empty if it does not."""
        seconds = _token_seconds(self.model, max((x.numel() for x in given.tensors), default=0), machine)
        return "" if seconds >= ENCODER else f"it takes about {seconds * 1e3:.1f} ms, and each length of text a trace"

    def refuse(self, given: Arguments, refusal: XditError) -> str:
        """Calls like this one run whole from now on; why."""
        if self.always:
            warnings.warn(f"{type(self.model).__name__} runs whole, with all of its weights: {refusal}", stacklevel=2)
        return self._note(given, str(refusal), small=isinstance(refusal, TooSmallError))

    def _note(self, given: Arguments, reason: str, *, small: bool) -> str:
        self.found = [one for one in self.found if one.settings.unchanged()]
        self.last = Whole(ModelSettings(self.model), _shapes(given), _elements(given), reason, small)
        self.found.append(self.last)
        return reason


def may_pay(model: nn.Module, machine: Machine) -> bool:
    """Whether an encoder of texts is so large that dividing it may pay."""
    return _token_seconds(model, LONGEST, machine) >= ENCODER


def _token_seconds(model: nn.Module, tokens: int, machine: Machine) -> float:
    """Time in which every weight is applied to every token."""
    return machine.seconds(2 * sum(x.numel() for x in model.parameters()) * tokens, 0)


def _saved(report: Report, machine: Machine) -> float:
    """Seconds that a call takes less, at full speed."""
    exchanges = sum(one.count for one in report.collectives)
    sent = sum(one.bytes_per_rank for one in report.collectives)
    divided = machine.seconds(max(report.flops_per_rank), sent) + exchanges * machine.latency
    return machine.seconds(report.flops_total, 0) - divided


def _too_small(seconds: float) -> str:
    return f"dividing it saves at most {max(seconds, 0) * 1e3:.1f} ms a call"


def _elements(given: Arguments) -> int:
    return sum(x.numel() for x in given.tensors)


def _shapes(given: Arguments) -> Any:
    """What calls are told apart by, alike on all ranks: shapes and dtypes of tensors, and other arguments as facts."""
    leaves, spec = pytree.tree_flatten((list(given.args), dict(given.kwargs)))
    return spec, [(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else fact(x) for x in leaves]
