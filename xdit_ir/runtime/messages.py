"""Messages between stages: tensors of static types as one run of bytes, each kind on a process group of its own."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from xdit_ir.errors import MismatchError
from xdit_ir.program import TensorSpec

ALIGNMENT = 16
Specs = Sequence[TensorSpec]


class LostError(MismatchError):
    """A message did not come, or could not be sent: another rank has stopped."""


@dataclass(frozen=True)
class Envelope:
    """Where tensors of these types lie in a message, and its size in bytes."""

    specs: tuple[TensorSpec, ...]
    starts: tuple[int, ...]
    size: int

    @staticmethod
    def of(specs: Specs) -> Envelope:
        """One tensor after the other, aligned."""
        starts, end = [], 0
        for spec in specs:
            starts.append(end)
            end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        return Envelope(tuple(specs), tuple(starts), end)

    def pack(self, tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """The message, in memory of its own."""
        message = torch.empty(self.size, dtype=torch.uint8, device=device)
        for mine, tensor in zip(self.unpack(message), tensors, strict=True):
            mine.copy_(tensor)
        return message

    def unpack(self, message: torch.Tensor) -> list[torch.Tensor]:
        """The tensors, as views of the message."""
        sizes = [math.prod(spec.shape) * spec.dtype.itemsize for spec in self.specs]
        return [
            message[start : start + size].view(spec.dtype).view(spec.shape)
            for spec, start, size in zip(self.specs, self.starts, sizes, strict=True)
        ]


@dataclass(eq=False)
class Arrival:
    """A message on its way: its memory, and what waits for it."""

    envelope: Envelope
    message: torch.Tensor
    work: Any = None

    def take(self) -> list[torch.Tensor]:
        """The tensors; what the device does from now on comes after they are there.

        Raises:
            LostError: they will not come.
        """
        if self.work is not None:
            with _lost():
                self.work.wait()
            self.work = None
            if self.message.is_cuda:
                self.message.record_stream(torch.cuda.current_stream(self.message.device))
        return self.envelope.unpack(self.message)


class Channel(Protocol):
    """Messages in one direction, in order."""

    def send(self, envelope: Envelope, tensors: Sequence[torch.Tensor]) -> None:
        """Send to the other end; waits for nobody."""
        ...

    def expect(self, envelope: Envelope) -> Arrival:
        """Receive the next message."""
        ...


@dataclass(eq=False)
class Pair:
    """A channel between two ranks, over a process group that nothing else uses, so that messages cannot overtake.

    Receives are posted aside from the stream that computes, so that they start before what was computed before ends.
    """

    group: dist.ProcessGroup
    source: int
    target: int
    device: torch.device
    aside: torch.cuda.Stream | None = None
    leaving: deque[Arrival] = field(default_factory=deque)
    sent: int = 0
    expected: int = 0

    def send(self, envelope: Envelope, tensors: Sequence[torch.Tensor]) -> None:
        """Start to send; the message is kept until it is gone."""
        message = envelope.pack(tensors, self.device)
        with _lost():
            work = dist.isend(message, self.target, group=self.group, tag=self.sent % TAGS)
        self.sent += 1
        keep(self.leaving, Arrival(envelope, message, work))

    def expect(self, envelope: Envelope) -> Arrival:
        """Post the receive."""
        with on_stream(self.aside), _lost():
            message = torch.empty(envelope.size, dtype=torch.uint8, device=self.device)
            work = dist.irecv(message, self.source, group=self.group, tag=self.expected % TAGS)
        self.expected += 1
        return Arrival(envelope, message, work)


@dataclass(eq=False)
class Broadcast:
    """A channel from one rank to all others of a process group that nothing else uses."""

    group: dist.ProcessGroup
    source: int
    device: torch.device
    aside: torch.cuda.Stream | None = None
    leaving: deque[Arrival] = field(default_factory=deque)
    sent: int = 0

    def send(self, envelope: Envelope, tensors: Sequence[torch.Tensor]) -> None:
        """Start to send to all; the message is kept until it is gone."""
        message = envelope.pack(tensors, self.device)
        with _lost():
            work = dist.broadcast(message, self.source, group=self.group, async_op=True)
        self.sent += 1
        keep(self.leaving, Arrival(envelope, message, work))

    def expect(self, envelope: Envelope) -> Arrival:
        """Post the receive."""
        with on_stream(self.aside), _lost():
            message = torch.empty(envelope.size, dtype=torch.uint8, device=self.device)
            work = dist.broadcast(message, self.source, group=self.group, async_op=True)
        return Arrival(envelope, message, work)


TAGS = 2**20
LEAVING = 64  # messages that may be on their way; the receiver is never that far behind, so none waits for it


def keep(leaving: deque[Arrival], message: Arrival) -> None:
    """Hold a message that is being sent, and let go of those that are gone."""
    leaving.append(message)
    while leaving and leaving[0].work.is_completed():
        leaving.popleft()
    while len(leaving) > LEAVING:
        with _lost():
            leaving.popleft().work.wait()


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Whatever is started inside follows this stream instead of the current one."""
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        yield


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostError(f"a message between stages was lost, another rank has stopped: {error}") from error
