"""What is taken row by row is taken apart at once, before anything that uses a row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.difference import relative_error


class Rows(nn.Module):
    """Layers that each take a row: all rows first, or each one where it is needed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(10))

    def forward(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if self.how == "all first":
            rows = [states[place] for place in range(10)]
            rows.append(rows[-1])
            rows = [layer(row) for layer, row in zip(self.layers, rows[1:], strict=True)]
        else:
            rows = [layer(states[place]) for place, layer in enumerate(self.layers)]
        for row in rows:
            x = x + row.mean(1, keepdim=True)
        return x


@pytest.mark.parametrize("how", ["all first", "one by one"])
def test_rows_are_there_before_what_uses_them(how: str) -> None:
    torch.manual_seed(0)
    model, example = Rows(how), {"x": torch.randn(2, 16, 8), "states": torch.randn(10, 2, 4, 8)}
    with torch.no_grad():
        want = model(**example)
    parallel = xir.trace(model, example).parallelize(ulysses=2)
    assert "unbind" in str(parallel.ir.graph)
    for output in parallel.simulate(model, example):
        assert relative_error([output], [want]) < 1e-6
