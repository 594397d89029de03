"""`cfg` with batches of every size: samples divided unevenly, or shared by ranks where there are fewer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.errors import ParallelizeError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.load("plain-dit:tiny")[0]


def example(samples: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(samples, 4, 32, 32, generator=draw),
        "t": torch.linspace(0, 900, samples),
        "y": torch.arange(samples),
    }


def check(model: nn.Module, parallel: xir.ParallelProgram, given: Any) -> None:
    with torch.no_grad():
        want = model(**given)
        for got in parallel.simulate(model, given):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("samples", "cfg", "most"), [(3, 2, 2), (3, 3, 1), (4, 3, 2), (4, 4, 1), (5, 2, 3)])
def test_branches_in_one_batch(model: nn.Module, samples: int, cfg: int, most: int) -> None:
    """Three branches of guidance over two ranks are 2 + 1."""
    given = example(samples)
    parallel = xir.trace(model, given).parallelize(cfg=cfg)
    check(model, parallel, given)
    report = parallel.report()
    assert max(report.flops_per_rank) <= 1.01 * report.flops_total * most / samples


@pytest.mark.parametrize(("samples", "degrees"), [(2, {"cfg": 3}), (2, {"cfg": 4, "ulysses": 2}), (3, {"cfg": 4})])
def test_samples_that_ranks_share(model: nn.Module, samples: int, degrees: dict[str, int]) -> None:
    """Where guidance has fewer branches for a while: each rank still has one sample, and no sum counts it twice."""
    given = example(samples)
    traced = xir.trace(model, given)
    with pytest.raises(ParallelizeError, match=f"has a batch of {samples}"):
        traced.parallelize(**degrees)
    parallel = traced.parallelize(**degrees, share_samples=True)
    check(model, parallel, given)
    report = parallel.report()
    assert max(report.flops_per_rank) <= 1.05 * report.flops_total / samples / degrees.get("ulysses", 1)


def test_one_sample_is_not_shared(model: nn.Module) -> None:
    with pytest.raises(ParallelizeError, match="has a batch of 1"):
        xir.trace(model, example(1)).parallelize(cfg=2, share_samples=True)
