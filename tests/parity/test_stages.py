"""Full-size models in stages, from the meta device: balanced, and each rank with its own weights and buffers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.passes.partition_stages import PartitionStages
from xdit_ir.program import STAGE
from xdit_ir.report import Report

BALANCE = {
    "flux.1-dev": {2: 0.97, 4: 0.97, 8: 0.93},
    "sd3.5-large": {8: 0.95},
    "wan2.1-t2v-14b": {8: 0.99},
    "hunyuandit": {8: 0.93},
}


@pytest.fixture(scope="module", params=BALANCE)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, TracedProgram]]:
    yield request.param, xir.trace(*models.load(request.param, device="meta"))


def balance(report: Report) -> float:
    return report.flops_total / len(report.flops_per_rank) / max(report.flops_per_rank)


def test_stages_are_balanced_and_nothing_is_done_twice(case: tuple[str, TracedProgram]) -> None:
    name, traced = case
    for count, least in BALANCE[name].items():
        report = traced.parallelize(pipefusion=count, patches=1).report()
        assert balance(report) >= least, count
        assert sum(report.flops_per_rank) <= 1.001 * report.flops_total
        assert sum(report.weight_bytes_per_rank) <= 1.05 * report.weight_bytes_total


def test_patches_add_no_work(case: tuple[str, TracedProgram]) -> None:
    """Text is computed once a step, and so is all that does not depend on the latents."""
    _, traced = case
    report = traced.parallelize(pipefusion=2, patches=4).report()
    assert sum(report.flops_per_rank) <= 1.001 * report.flops_total
    assert min(report.buffer_bytes_per_rank) > 0
    [sends] = [entry for entry in report.collectives if entry.kind == "send"]
    assert sends.count == 4


def test_given_stages_count_blocks() -> None:
    traced = xir.trace(*models.load("pixart-sigma:tiny"))
    calls = len(list(traced.analysed.calls))
    program = PartitionStages(2, (1, calls - 1)).apply(traced.analysed)
    assert [call.meta[STAGE] for call in program.calls] == [0] + [1] * (calls - 1)
    with pytest.raises(xir.ParallelizeError, match="for example"):
        traced.parallelize(pipefusion=2, stages=[calls, 0])
