"""Hooks run while tracing as in any call: on the model, on submodules and on repeated layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import xdit_ir as xir


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + self.inner(self.norm(x)) * scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_hooks_take_part(check: Any) -> None:
    model = Model().eval()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, result: result + args[0])
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args, kw: (args, {"scale": 0.5}), with_kwargs=True)
        layer.norm.register_forward_hook(lambda module, args, result: result * module.weight.sum())
    model.layers[1].register_forward_hook(lambda module, args, result: result - 1)
    program = check(model, (torch.randn(2, 5, 8),), (torch.randn(2, 5, 8),))
    assert len(list(program.calls)) == 3


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_counter_may_watch_a_port(mode: str) -> None:
    """Its hooks and modes are PyTorch's own, and see the calls, not the trace; compiled code cannot run under them."""
    model, x = Model().eval().requires_grad_(False), torch.randn(2, 5, 8)
    ported = xir.port(model, mode=mode)
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            assert torch.equal(ported(x), model(x))
    assert counter.get_total_flops() == 2 * 3 * 2 * 10 * 64
