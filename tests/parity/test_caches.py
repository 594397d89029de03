"""Caches of keys and values under PipeFusion: read by patches, written by calls with one."""

from __future__ import annotations

import pytest
import torch

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture.effects import copied
from xdit_ir.ir.difference import relative_error, tensors_of


def test_a_call_that_reads_caches_is_displaced() -> None:
    model, example = models.load("kind-causal-video:tiny")
    traced = xir.trace(model, example)
    result = xir.check(model, example, traced=traced, pipefusion=2)
    assert result.ok, str(result)
    report = traced.parallelize(pipefusion=2).report()
    assert min(report.buffer_bytes_per_rank) > 0 and sum(report.flops_per_rank) <= 1.01 * report.flops_total


@pytest.mark.parametrize("patches", [None, 2])
def test_a_call_that_writes_caches_takes_one_patch_and_is_exact(patches: int | None) -> None:
    model, example = models.load("kind-causal-video-written:tiny")
    traced, ours, its = xir.trace(model, example), copied(example), copied(example)
    with pytest.warns(
        UserWarning, match=r"leaves tensors in cache\[0\]\['k'\], cache\[0\]\['v'\] and 4 more.*patches=1"
    ):
        parallel = traced.parallelize(pipefusion=2, ulysses=2, patches=patches)
    parallel.simulate_steps(model, [ours])
    with torch.no_grad():
        model(**its)
    left, expected, before = (tensors_of(one["cache"]) for one in (ours, its, example))
    assert relative_error(left, expected) <= 1e-5 < relative_error(expected, before)
    assert ours["note"] == its["note"] == {"cached": 128}
    with pytest.warns(UserWarning, match="patches=1"):
        result = xir.check(model, example, traced=traced, pipefusion=2)
    assert result.ok, str(result)
