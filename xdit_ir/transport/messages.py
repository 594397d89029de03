"""Messages between stages: tensors of static types as one run of bytes, each kind on a process group of its own."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.errors import LostError
from xdit_ir.ir.program import TensorSpec
from xdit_ir.transport.groups import Leaving

ALIGNMENT = 16
SMALLEST, LARGEST = 2**12, 2**22  # bytes of a slot of a peer channel
MOST = 128  # slots; a message that finds none free waits on the device for the receiver to take one
Specs = Sequence[TensorSpec]


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
    """A message that will come through a channel; `message` is its memory once it is posted, `due` the turn in which
    it is sent."""

    envelope: Envelope
    channel: Channel
    due: int
    message: torch.Tensor | None = None
    work: Any = None

    def take(self) -> list[torch.Tensor]:
        """The tensors; what the device does from now on comes after they are there.

        Raises:
            LostError: they will not come.
        """
        self.channel.post(self)
        assert self.message is not None
        if self.work is not None:
            with lost():
                self.work.wait()
            self.work = None
            if self.message.is_cuda:
                self.message.record_stream(torch.cuda.current_stream(self.message.device))
        return self.envelope.unpack(self.message)


@dataclass(eq=False)
class Channel(ABC):
    """Messages in one direction, in order.

    On GPUs no receive is posted before its message is sent: until that is there it holds up whoever waits for the
    device, a caller who times or a kernel that is loaded at its first use, and with it what others wait for.
    """

    device: torch.device
    sent: int = field(default=0, init=False)
    expected: deque[Arrival] = field(default_factory=deque, init=False)

    def send(self, envelope: Envelope, tensors: Sequence[torch.Tensor]) -> None:
        """Send to the other end; the host waits for nobody."""
        self._send(envelope.pack(tensors, self.device))
        self.sent += 1

    def expect(self, envelope: Envelope, due: int) -> Arrival:
        """The next message to come."""
        arrival = Arrival(envelope, self, due)
        self.expected.append(arrival)
        if self.device.type == "cpu":
            self.post(arrival)
        return arrival

    def post(self, arrival: Arrival) -> None:
        """Start to receive it, after what comes before it."""
        while arrival.message is None:
            first = self.expected.popleft()
            self._receive(first)

    def free(self, limit: float) -> None:
        """Fetch what was sent before a turn, if nobody asked for it: the sender may wait for the room that it takes."""
        while self.expected and self.expected[0].due < limit:
            self.post(self.expected[0])

    @abstractmethod
    def post_sent(self, limit: float) -> None:
        """Post what was sent before this turn, if a sender's device waits for that."""

    def connect(self, *, source: bool) -> None:
        """Exchange a first message and wait for it, at all ends.

        A backend may connect ranks at their first message of a kind and block the hosts until then (NCCL does). Ranks
        that wait for others like that would wait for ever, so it is done before anybody waits for anything else.
        """
        greeting = Envelope.of([TensorSpec((1,), torch.int64)])
        if source:
            self.send(greeting, [torch.ones(1, dtype=torch.int64, device=self.device)])
        else:
            self.expect(greeting, 0).take()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.sent = 0

    @abstractmethod
    def _send(self, message: torch.Tensor) -> None: ...

    @abstractmethod
    def _receive(self, arrival: Arrival) -> None:
        """Fill in the message's memory, and the work to wait for if there is any."""


@dataclass(eq=False)
class CollectiveChannel(Channel):
    """A channel over a process group that nothing else uses, so that messages cannot overtake, and run on a stream
    aside from the one that computes."""

    group: dist.ProcessGroup
    source: int
    aside: torch.cuda.Stream | None = None
    leaving: Leaving = field(default_factory=deque, init=False)

    def _send(self, message: torch.Tensor) -> None:
        """Start to send; the message is kept until it is gone."""
        with lost():
            work = self._start(message, outgoing=True)
        keep(self.leaving, message, work)

    def post_sent(self, limit: float) -> None:
        """Post what was sent before this turn."""
        while self.expected and self.expected[0].due < limit:
            self._receive(self.expected.popleft())

    def _receive(self, arrival: Arrival) -> None:
        with on_stream(self.aside), lost():
            arrival.message = torch.empty(arrival.envelope.size, dtype=torch.uint8, device=self.device)
            arrival.work = self._start(arrival.message, outgoing=False)

    @abstractmethod
    def _start(self, message: torch.Tensor, *, outgoing: bool) -> Any: ...


@dataclass(eq=False)
class Pair(CollectiveChannel):
    """Between two ranks."""

    target: int = field(kw_only=True)

    def _start(self, message: torch.Tensor, *, outgoing: bool) -> Any:
        if outgoing:
            return dist.isend(message, self.target, group=self.group)
        return dist.irecv(message, self.source, group=self.group)


@dataclass(eq=False)
class Broadcast(CollectiveChannel):
    """From one rank to all others of the group."""

    def _start(self, message: torch.Tensor, *, outgoing: bool) -> Any:
        return dist.broadcast(message, self.source, group=self.group, async_op=True)


LEAVING = 64  # messages that may be on their way; the receiver is never that far behind, so none waits for it


def keep(leaving: Leaving, message: torch.Tensor, work: Any) -> None:
    """Hold a message that is being sent, and let go of those that are gone."""
    leaving.append((message, work))
    while leaving and leaving[0][1].is_completed():
        leaving.popleft()
    while len(leaving) > LEAVING:
        with lost():
            leaving.popleft()[1].wait()


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Whatever is started inside follows this stream instead of the current one."""
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        yield


@contextlib.contextmanager
def lost() -> Iterator[None]:
    """A failure inside means that a message is lost."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(f"a message between stages was lost, another rank has stopped: {error}") from error


@dataclass(frozen=True)
class Slots:
    """Places for messages on their way: `count` pieces of `size` bytes, enough for two passes of patches."""

    size: int
    count: int

    @staticmethod
    def of(sizes: Sequence[int]) -> Slots:
        """For messages of these sizes in a pass; rounded, so that programs for similar inputs share a channel."""
        size = min(LARGEST, _power_of_two(max(*sizes, SMALLEST)))
        return Slots(size, min(MOST, _power_of_two(2 * sum(-(-one // size) for one in sizes))))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
