"""Submodules that torch.compile wraps are captured as what they wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir.capture import trace

Run = Callable[..., Any]


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))
        for index, layer in enumerate(self.layers):
            if how == "in place":
                layer.compile(backend="eager")
            else:
                self.layers[index] = torch.compile(layer, backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_layers(how: str, run: Run, same: Run) -> None:
    model = Model(how).eval()
    program = trace(model, (torch.randn(2, 8),))
    assert set(program.state) <= set(dict(model.named_parameters()))
    x = torch.randn(2, 8)
    with torch.no_grad():
        same(run(program, model, x), model(x))
