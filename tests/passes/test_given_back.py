"""What forward gives back is the caller's to write to: no copy is dropped that keeps it apart from what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir

RESULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a copy of an input": lambda x, w: x.clone(),
    "a view of a copy": lambda x, w: x.clone().t()[1:],
    "an input as it is": lambda x, w: x.view(3, 2),
    "a copy of a weight": lambda x, w: w.clone(),
    "a value and its copy": lambda x, w: (y := x + w, y.clone()),
    "a copy of a view of a value that is given back": lambda x, w: (y := x + w, y.t().clone()),
    "a copy of a view of an input": lambda x, w: x.t().clone()[0],
    "cast to what it is": lambda x, w: x.to(x.dtype, copy=True),
    "joined with nothing": lambda x, w: torch.cat([x, x[:0]]),
    "times one": lambda x, w: (x * 1.0, w / 1, (x + w) * 1),
}


class Model(nn.Module):
    def __init__(self, give: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.give = nn.Parameter(torch.ones(2, 3)), give

    def forward(self, x: torch.Tensor) -> Any:
        return self.give(x, self.weight)


def written(run: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What is there after all results were written to."""
    given = run(x)
    results = list(given) if isinstance(given, tuple) else [given]
    for place, result in enumerate(results):
        result.add_(place + 1)
    return [*results, x]


@torch.no_grad()
@pytest.mark.parametrize("kind", RESULTS)
def test_results_may_be_written_to(kind: str) -> None:
    model = Model(RESULTS[kind])
    wanted, before = written(model, torch.ones(2, 3)), model.weight.clone()
    got = written(xir.port(model), torch.ones(2, 3))
    assert all(map(torch.equal, got, wanted))
    assert torch.equal(model.weight, before)


@torch.no_grad()
def test_a_factor_of_one_is_dropped_only_where_it_changes_nothing() -> None:
    x = torch.tensor([1.0, -0.0, torch.inf, torch.nan])
    model = Model(lambda x, w: (torch.view_as_real((x + 0j) * 1.0), (x > 0) * 1, (x + 1) / 1.0 + 0))
    targets = [node.target for node in xir.trace(model, (x,)).parallelize().ir.graph.nodes]
    assert torch.ops.aten.div.Tensor not in targets
    assert targets.count(torch.ops.aten.mul.Tensor) == 2, "of booleans and complex numbers it changes some"
    for got, wanted in zip(xir.port(model)(x), model(x), strict=True):
        assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))
        assert got.dtype == wanted.dtype
