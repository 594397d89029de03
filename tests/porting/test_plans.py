"""`port(plan=...)` in one process: a plan is for one model and number of processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir

EXAMPLE = {"input": torch.ones(2, 8)}


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)).requires_grad_(False)


def test_one_process_runs_the_model_as_before() -> None:
    model = net()
    ported = xir.port(model)
    assert torch.equal(ported(**EXAMPLE), model(**EXAMPLE))
    assert ported.program is not None and ported.program.world_size == 1


def test_a_plan_for_this_model() -> None:
    model = net()
    ported = xir.port(model, plan=xir.plan(model, EXAMPLE, gpus=1))
    assert torch.equal(ported(**EXAMPLE), model(**EXAMPLE))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": "u2"}, r"plan='u2' is no xdit_ir\.Plan"),
        ({"ulysses": 1}, r"ulysses=1 beside plan=, which has u1: give one of them"),
        ({"patches": 4}, r"patches=4 beside plan="),
    ],
)
def test_what_no_port_takes(given: dict[str, Any], said: str) -> None:
    model = net()
    with pytest.raises(xir.ParallelizeError, match=said):
        xir.port(model, **{"plan": xir.plan(model, EXAMPLE, gpus=1), **given})


def test_a_plan_for_another_model_or_job() -> None:
    model = net()
    with pytest.raises(xir.ParallelizeError, match=r"plan= was made for a Sequential with weights .* make one with"):
        xir.port(net(16), plan=xir.plan(model, EXAMPLE, gpus=1))
    with pytest.raises(xir.ParallelizeError, match=r"plan= is for 2 processes, this job has 1"):
        xir.port(model, plan=xir.plan(model, EXAMPLE, gpus=2))
