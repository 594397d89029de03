"""What `split-batch` does, and says, where there is no batch to divide."""

from __future__ import annotations

import pytest

import xdit_ir as xir
from xdit_ir import models


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}])
def test_packed_samples_are_cut_between_samples(degrees: dict[str, int]) -> None:
    model, example = models.load("plain-packed-dit:tiny")
    traced = xir.trace(model, example)
    report = traced.parallelize(**degrees).report()
    assert max(report.flops_per_rank) <= 1.1 * report.flops_total / len(report.flops_per_rank)
    inside = [one for one in report.collectives if one.mesh_dim == "cfg" and one.count > 2]
    assert not inside, "attention of one sample needs nothing of the other"
    assert xir.check(model, example, traced=traced, **degrees).ok


def test_more_halves_than_packed_samples() -> None:
    traced = xir.trace(*models.load("plain-packed-dit:tiny"))
    with pytest.raises(xir.ParallelizeError, match=r"batch of 2: give at least 3 samples"):
        traced.parallelize(cfg=3)


def test_too_few_samples() -> None:
    traced = xir.trace(*models.load("plain-dit:tiny"))
    with pytest.raises(xir.ParallelizeError, match=r"batch of 2: give at least 3 samples .* or use cfg=2"):
        traced.parallelize(cfg=3)
