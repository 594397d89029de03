"""After a rank has failed: what this rank's GPU waits for in symmetric memory lets it pass."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from typing import Any

import torch

from xdit_ir.transport.workspace import PADS, SIGNALS

STEP = 2e-3  # seconds between two looks at the flags
QUIET = 2.0  # seconds without a wait after which none will follow


class Waits:
    """The waits of this rank for flags of one workspace."""

    def __init__(self, handle: Any, device: torch.device) -> None:
        self._pad = handle.get_signal_pad(handle.rank, [PADS * SIGNALS], torch.uint32)
        raised = [torch.zeros(PADS * SIGNALS, dtype=torch.int32, device=device) for _ in range(2)]
        for one in raised:
            one[: 2 * SIGNALS] = 1
        raised[0][-SIGNALS:] = (
            1  # whoever comes to a meeting waits until a word is taken down, then until one is raised
        )
        self._raised = itertools.cycle([one.view(torch.uint32) for one in raised])
        self._seen = torch.zeros(2 * SIGNALS, dtype=torch.int32, pin_memory=True).view(torch.uint32)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def let_pass(self) -> bool:
        """Raise all flags; whether one had been taken down since the last time."""
        with torch.cuda.stream(self._stream):
            self._seen.copy_(self._pad[: 2 * SIGNALS], non_blocking=True)
            self._pad.copy_(next(self._raised), non_blocking=True)
            done = self._stream.record_event()
        while not done.query():  # a thread that waits for the device could be noticed as one that must not
            time.sleep(STEP / 10)
        return bool((self._seen.view(torch.int32) != 1).any())


class Release:
    """Lets everything pass that waits on this rank, from a thread of its own: what comes of it is of no use, but the
    host that waits for the device goes on, and raises."""

    def __init__(self) -> None:
        self._waits: weakref.WeakSet[Waits] = weakref.WeakSet()

    def watch(self, waits: Waits) -> None:
        """Include these, as long as somebody has them."""
        self._waits.add(waits)

    def __call__(self) -> None:
        """Begin; ends by itself when nothing has waited for a while."""
        waits = list(self._waits)
        self._waits.clear()
        if waits:
            threading.Thread(target=_release, args=(waits,), name="xdit_ir release", daemon=True).start()


def _release(waits: list[Waits]) -> None:
    since = time.monotonic()
    while time.monotonic() - since < QUIET:
        taken = [one.let_pass() for one in waits]
        since = time.monotonic() if any(taken) else since
        time.sleep(STEP)
