"""Messages between stages over symmetric memory: copy engines move them, flags tell, no end waits for the other.

The sender copies a message in pieces into slots of the receiver's memory, on a stream of its own, and raises a flag for
each. The receiver waits for the flags where it takes the message, copies it out, and raises flags at the sender that
the slots are free again. No kernel waits on a GPU for a message that has not been asked for, so whatever the host
waits for ends: there is enough room for everything that is sent before its receiver takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from xdit_ir.transport.messages import Arrival, Channel, Slots
from xdit_ir.transport.peer_ops import TIMEOUT_MS, copy_bytes, open_workspace, raise_flag, symmetric
from xdit_ir.transport.release import Waits
from xdit_ir.transport.workspace import HEADER


@dataclass(eq=False)
class PeerLink:
    """One way from a member of a group of two, `source`, to the other. Making it is collective for both."""

    device: torch.device
    group: str
    source: int
    slots: Slots
    timeout: timedelta | None
    pieces: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._workspace = open_workspace(HEADER + self.slots.size * self.slots.count, self.device, self.group)
        self.waits = Waits(self._handle(), self.device)
        self._wire = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._patience = TIMEOUT_MS if self.timeout is None else int(self.timeout.total_seconds() * 1e3)

    def send(self, message: torch.Tensor) -> None:
        """Copy it over when what the current stream does now is done."""
        handle, target = self._handle(), 1 - self.source
        self._wire.wait_stream(torch.cuda.current_stream(self.device))
        message.record_stream(self._wire)
        with torch.cuda.stream(self._wire):
            for slot, start, size, again in self._places(message):
                if again:
                    handle.wait_signal(target, self.slots.count + slot, self._patience)
                there = handle.buffer_ptrs[target] + self._offset(slot)
                copy_bytes(there, message.data_ptr() + start, size, self._wire)
                raise_flag(handle, target, slot, self.source, self._wire)

    def receive(self, message: torch.Tensor) -> None:
        """Fill it; the current stream waits."""
        handle, target = self._handle(), 1 - self.source
        stream = torch.cuda.current_stream(self.device)
        for slot, start, size, _ in self._places(message):
            handle.wait_signal(self.source, slot, self._patience)
            here = handle.buffer_ptrs[target] + self._offset(slot)
            copy_bytes(message.data_ptr() + start, here, size, stream)
            raise_flag(handle, self.source, self.slots.count + slot, target, stream)

    def _places(self, message: torch.Tensor) -> Iterator[tuple[int, int, int, bool]]:
        """Slot, start and bytes of each piece, and whether the slot was used before."""
        for start in range(0, message.numel(), self.slots.size):
            round_, slot = divmod(self.pieces, self.slots.count)
            self.pieces += 1
            yield slot, start, min(self.slots.size, message.numel() - start), round_ > 0

    def _offset(self, slot: int) -> int:
        return HEADER + slot * self.slots.size

    def _handle(self) -> Any:
        return symmetric(self._workspace, self.group)


@dataclass(eq=False)
class PeerChannel(Channel):
    """A channel over links to each receiver; at a receiver, over the one from the sender."""

    links: Sequence[PeerLink]

    def post_sent(self, limit: float) -> None:
        """Nothing: what was sent lies here already."""

    def _send(self, message: torch.Tensor) -> None:
        for link in self.links:
            link.send(message)

    def _receive(self, arrival: Arrival) -> None:
        [link] = self.links
        arrival.message = torch.empty(arrival.envelope.size, dtype=torch.uint8, device=self.device)
        link.receive(arrival.message)
