"""Emitted code writes into values that it has just made, and into no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import xdit_ir as xir
from xdit_ir.kernels.write_slice import WRITE, write_slice


class Interleaved(nn.Module):
    """Every second feature turned, into a tensor that is made for it."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 0::2] = -x[..., 1::2]
        out[..., 1::2] = x[..., 0::2]
        return out


class Kept(nn.Module):
    """What is written into is read again."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        ones = zeros.clone()
        ones[:, :2] = 1
        y = x.clone()
        y[:, :2] = 0
        return torch.cat((zeros, ones, x, y))


def emitted_targets(model: nn.Module, x: Tensor) -> list[object]:
    """Operators of the emitted code, whose result was compared with the model's, and which leaves its input alone."""
    given = x.clone()
    emitted = xir.trace(model, (x,)).parallelize().emit(model)
    for _ in range(2):
        assert torch.equal(emitted(given), model(x))
        assert torch.equal(given, x)
    return [node.target for node in emitted._xdit_runner.code.run.graph.nodes]


def test_a_tensor_made_to_be_filled_is_not_copied() -> None:
    targets = emitted_targets(Interleaved(), torch.randn(2, 3, 8))
    assert targets.count(write_slice) == 2
    assert WRITE not in targets


def test_what_is_read_again_is_not_overwritten() -> None:
    assert write_slice not in emitted_targets(Kept(), torch.randn(3, 4))
