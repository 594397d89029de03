"""What all specialisations of a module share: channels between stages, the request, and work that was put off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.pipelined.channels import ChannelMaker
from xdit_ir.pipelined.requests import Requests
from xdit_ir.pipelined.schedule import StageRun
from xdit_ir.transport.distributed import Communicator


class PendingPass(Protocol):
    """One pass of patches through the stages."""

    number: int

    def execute(self, item: StageRun) -> None:
        """Run a stage."""
        ...


Observer = Callable[[int, StageRun], None]


class StepQueue:
    """One for each module and process. `observe(pass, item)` is told before every run of a stage."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator, self.requests = communicator, Requests()
        self.observe: Observer | None = None
        self._last: object = None
        self._previous: dict[str, torch.Tensor] = {}
        self.voted: int | None = None
        self._queue: list[tuple[StageRun, PendingPass]] = []
        self._running: list[tuple[StageRun, PendingPass]] = []
        self.channels = ChannelMaker(communicator)

    def turn_to(self, runner: object, *, whole: bool) -> None:
        """A runner makes the next call: where that wants `whole` results, or another runner made the last one, all
        that was put off is done first."""
        if whole or self._last is not runner:
            self.run()
        self._last = runner

    def remember(self, inputs: Mapping[str, torch.Tensor], *, at_once: bool) -> dict[str, torch.Tensor]:
        """The inputs of a call that was made; finishes those that stand for something, by name: these, or, unless it
        can be done `at_once`, those of the call before, since what was made of them is. So nothing is remembered for
        more than two steps."""
        waiting: dict[str, torch.Tensor] = {name: x for name, x in inputs.items() if isinstance(x, Deferred)}
        due = waiting if at_once else self._previous
        self._previous = {} if at_once else waiting
        return {name: materialize(x) for name, x in due.items()}

    @property
    def known(self) -> set[int]:
        """The inputs of the call before that stand for something, as ids of their values."""
        return {id(x.value) for x in self._previous.values() if isinstance(x, Deferred)}

    def put_off(self, work: PendingPass, items: list[StageRun]) -> None:
        """Add items to what is to be done."""
        self._queue = sorted([*self._queue, *((item, work) for item in items)], key=lambda entry: entry[0].issue_order)

    def run(self, until: Callable[[], bool] | None = None, before: float = math.inf) -> None:
        """Do it in turn: all, or only until something is true, or what comes before this turn."""
        while self._queue and not (until is not None and until()):
            if self._queue[0][0].issue_order >= before:
                return
            item, work = self._queue.pop(0)
            self._running.append((item, work))
            if self.observe is not None:
                self.observe(work.number, item)
            work.execute(item)
            self._running.pop()

    def settle(self) -> None:
        """Before something is waited for that others make of what this rank sends: do all, unless a run waits for it,
        which then needs nothing that comes later."""
        if not self._running:
            self.run()

    def abandon(self) -> None:
        """Forget the request: it has failed, here or elsewhere."""
        self._queue, self._previous, self._last = [], {}, None
        self._running.clear()
        self.requests.forget()
