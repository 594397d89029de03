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
            if how == "in place" or (how == "some" and index % 2):
                layer.compile(backend="eager")
            elif how == "wrapped":
                self.layers[index] = torch.compile(layer, backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("how", ["in place", "some", "wrapped"])
def test_compiled_layers(how: str, run: Run, same: Run) -> None:
    model = Model(how).eval()
    program = trace(model, (torch.randn(2, 8),))
    assert set(program.state) <= set(dict(model.named_parameters()))
    x = torch.randn(2, 8)
    with torch.no_grad():
        same(run(program, model, x), model(x))


@torch.compile(backend="eager")
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return doubled(self.linear(x))


def test_compiled_functions(run: Run, same: Run) -> None:
    model, x = Calls().eval(), torch.randn(2, 8)
    program = trace(model, (x,))
    with torch.no_grad():
        same(run(program, model, x), model(x))


class Result:
    """Neither a dataclass nor anything that pytree knows."""

    def __init__(self, sample: torch.Tensor, extra: dict[str, torch.Tensor]) -> None:
        self.sample, self.extra, self.name = sample, extra, "result"


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Result:
        y = self.linear(x)
        return Result(y, {"squares": y * y})


def test_results_of_a_class_of_ones_own(run: Run) -> None:
    model, x = Returns().eval(), torch.randn(2, 8)
    got = run(trace(model, (torch.randn(2, 8),)), model, x)
    with torch.no_grad():
        want = model(x)
    assert type(got) is Result and got.name == "result"
    assert torch.equal(got.sample, want.sample) and torch.equal(got.extra["squares"], want.extra["squares"])
