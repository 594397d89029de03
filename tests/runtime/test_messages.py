"""Messages: tensors of any type and layout arrive as they were."""

from __future__ import annotations

import torch

from xdit_ir.program import TensorSpec
from xdit_ir.runtime.messages import ALIGNMENT, Envelope


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
