"""What a ported module has made for calls of one kind: a program, its runner, and what these hold for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from xdit_ir.api import ParallelProgram
from xdit_ir.caching.hooked import states_of
from xdit_ir.capture.binder import BufferGuards
from xdit_ir.capture.inputs import same_tensors
from xdit_ir.capture.mode_guards import check_asked
from xdit_ir.capture.overwrites import overwritten
from xdit_ir.emission.execution import Tensors
from xdit_ir.errors import MismatchError
from xdit_ir.porting.arguments import Arguments
from xdit_ir.porting.settings import ModelSettings
from xdit_ir.runtime.rank_runner import RankRunner
from xdit_ir.sharding.report import Report

Mode = tuple[Any, ...]
Bound = tuple[Tensors, Tensors]


@dataclass(frozen=True, eq=False)
class Specialisation:
    """What runs calls of some kind, and what it was made for besides inputs and weights; `shapes`: of that call, and
    `same`: which of its inputs were one tensor."""

    mode: Mode
    shapes: tuple[torch.Size, ...]
    same: tuple[int, ...]
    settings: ModelSettings
    buffers: BufferGuards
    program: ParallelProgram
    runner: RankRunner

    @staticmethod
    def of(
        model: nn.Module,
        mode: Mode,
        given: Arguments,
        program: ParallelProgram,
        runner: RankRunner,
        earlier: Sequence[ModelSettings],
    ) -> Specialisation:
        """That of the call which a program was made for; `earlier`: settings of others of the model."""
        same = same_tensors(runner.bind(given.args, given.kwargs)[0])
        unread = overwritten(model, program.original.signature.effects) | states_of(model)
        settings = ModelSettings.like(earlier, model, given.objects, unread, runner.places)
        buffers = BufferGuards(model, program.original)
        return Specialisation(mode, given.shapes, same, settings, buffers, program, runner)

    @property
    def report(self) -> Report:
        """That of its program, and how it runs on this rank."""
        return replace(self.program.report(), execution=self.runner.execution, cache=self.runner.cache)

    def bind(self, mode: Mode, given: Arguments) -> Bound | None:
        """The inputs and weights for a call; None if this was not made for it."""
        if mode != self.mode:
            return None
        try:
            bound = self.runner.bind(given.args, given.kwargs)
            self.buffers.check()
        except MismatchError:
            return None
        if same_tensors(bound[0]) != self.same or not check_asked(self.program.original):
            return None
        return bound if self.settings.unchanged() else None
