"""Behind a value that had to be whole, the work is divided again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.models.kinds.parts import blocks


class Spectrum(nn.Module):
    """A transform over all samples, and then convolutions, which are most of the work."""

    def __init__(self, *, between: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(4))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for place, layer in enumerate(self.layers):
            if place % self.between == 0:
                x = torch.fft.fft(x).real
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("between", [4, 2])
def test_convolutions_behind_a_transform_are_divided(between: int) -> None:
    model, example = Spectrum(between=between).eval(), (torch.randn(1, 1, 60),)
    parallel = xir.trace(model, example).parallelize(ulysses=3)
    assert parallel.report().share <= 0.40
    assert xir.check(model, example, ulysses=3).ok


class SomeTokens(nn.Module):
    """Each layer works on the tokens with the largest scores only."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(4, width), nn.Linear(width, 1)
        self.blocks = blocks(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            chosen = self.score(x).topk(32, dim=1).indices.expand(-1, -1, x.shape[-1])
            x = x.scatter(1, chosen, block(x.gather(1, chosen)))
        return x


def test_tokens_chosen_by_value_are_divided_in_every_layer() -> None:
    model, example = SomeTokens().eval(), (torch.randn(1, 64, 4),)
    result = xir.trace(model, example)
    assert result.parallelize(ulysses=4).report().share <= 0.30
    assert xir.check(model, example, traced=result, ulysses=4).ok
