"""Messages: tensors of any type and layout arrive as they were."""

from __future__ import annotations

import torch

from xdit_ir.ir.program import TensorSpec
from xdit_ir.transport.messages import ALIGNMENT, Arrival, Channel, Envelope


class Counting(Channel):
    """Gives messages the numbers in which their receives are posted."""

    def __init__(self, device: str) -> None:
        super().__init__(torch.device(device))
        self.posted = 0

    def post_sent(self, limit: float) -> None:
        raise NotImplementedError

    def _send(self, message: torch.Tensor) -> None:
        raise NotImplementedError

    def _receive(self, arrival: Arrival) -> None:
        self.posted += 1
        arrival.message = torch.tensor([self.posted]).view(torch.uint8)


NUMBER = Envelope((TensorSpec((1,), torch.int64),), (0,), 8)


def test_receives_are_posted_ahead_on_the_cpu_and_when_taken_on_gpus() -> None:
    for device, ahead in (("cpu", 3), ("cuda", 0)):
        channel = Counting(device)
        arrivals = [channel.expect(NUMBER, turn) for turn in range(3)]
        assert channel.posted == ahead
        assert [int(arrivals[place].take()[0]) for place in (1, 0, 2)] == [2, 1, 3], "in the order of expectation"


def test_results_that_nobody_reads_make_room_for_later_ones() -> None:
    channel = Counting("cuda")
    arrivals = [channel.expect(NUMBER, turn) for turn in range(4)]
    channel.free(2)
    assert channel.posted == 2 and [one.message is not None for one in arrivals] == [True, True, False, False]


def tensors() -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=make)
    return [x.transpose(0, 2), x > 0, torch.view_as_complex(x[..., :2].contiguous()), x[:0], x.bfloat16(), x[0, 0, 0]]


def test_what_is_packed_is_unpacked() -> None:
    given = tensors()
    envelope = Envelope.of([TensorSpec(tuple(x.shape), x.dtype) for x in given])
    assert all(start % ALIGNMENT == 0 for start in envelope.starts)
    message = envelope.pack(given, torch.device("cpu"))
    assert message.numel() == envelope.size
    for got, want in zip(envelope.unpack(message), given, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
