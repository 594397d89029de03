"""What all specialisations of a module share: channels between stages, the request, and work that was put off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

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
    """One for each module and process. `observe(pass, item)` is told before every run of a stage; `last` is the runner
    that made the last call."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator, self.requests = communicator, Requests()
        self.observe: Observer | None = None
        self.last: Any = None
        self.previous: list[torch.Tensor] = []
        self._queue: list[tuple[StageRun, PendingPass]] = []
        self._running: list[tuple[StageRun, PendingPass]] = []
        self.channels = ChannelMaker(communicator)

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

    def abandon(self) -> list[tuple[StageRun, PendingPass]]:
        """Forget the request; what was still to be done."""
        queue = [*reversed(self._running), *self._queue]
        self._queue, self._running, self.previous, self.last = [], [], [], None
        self.requests.forget()
        return queue
