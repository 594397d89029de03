"""The number of patches that nobody gave: by what the machine takes."""

from __future__ import annotations

import pytest

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import PipelinedProgram, TracedProgram
from xdit_ir.passes.patch_count import StepTime, step_time
from xdit_ir.sharding.machine import Machine

# GPUs so slow that a step of the tiny model takes some milliseconds, behind wires that take as long, and longer.
QUICK, SLOW, SLOWER = (Machine(flops=2e10, memory=1e9, bytes=speed, latency=1e-6) for speed in (1e9, 3e7, 1e7))


@pytest.fixture(scope="module")
def traced() -> TracedProgram:
    model, example = models.load("plain-mmdit:tiny")
    return xir.trace(model, example)


@pytest.mark.parametrize(("machine", "patches"), [(QUICK, 2), (SLOW, 3), (SLOWER, 4)])
def test_more_patches_than_stages_where_messages_are_slow(
    machine: Machine, patches: int, traced: TracedProgram
) -> None:
    parallel = traced.parallelize(pipefusion=2, machine=machine)
    assert isinstance(parallel, PipelinedProgram)
    assert parallel.pipeline.patches == patches
    assert (
        step_time(parallel.pipeline, machine).seconds
        <= step_time(
            traced.parallelize(pipefusion=2, machine=machine, patches=2).pipeline,
            machine,  # type: ignore[arg-type]
        ).seconds
    )


def test_a_step_waits_where_a_patch_is_not_back_in_time() -> None:
    two = StepTime(patches=2, ranks=2, busy=1.0, started=0.0, between=0.3, latency=0.1)
    assert two.seconds == pytest.approx(1.3)
    assert two.least(3) == pytest.approx(1.0)
    short = StepTime(patches=2, ranks=2, busy=0.0, started=0.5, between=0.3, latency=0.3)
    assert short.least(3) > short.seconds
